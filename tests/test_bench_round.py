"""``bench_round.py``: its cells and budgets, and rounds of tiny models."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import bench_round
import floors
import pytest
import report
import round_adaptive
import round_cells
import round_plots
import round_report
import shapes
import torch

from spec_compile.errors import RanPlainError
from spec_compile.runtime.stats import SpecStats


def test_budgeted_rounds_come_first_and_every_cell_once() -> None:
    args = bench_round.parse([])
    cells = round_cells.grid(args.shapes, args.batches, args.contexts)
    stages = round_cells.in_order(cells, "llama-3.1-8b")
    flat = [cell for stage in stages for cell in stage.cells]
    assert len(flat) == 4 * 7 * 3 and set(flat) == set(cells)
    budgeted = list(round_cells.BUDGETS["llama-3.1-8b"])
    assert flat[:5] == budgeted and set(round_cells.PARTS) <= set(cells)
    assert all((cell.rounds, cell.context) == (stage.rounds, stage.context) for stage in stages for cell in stage.cells)
    assert [cell.context for cell in flat[5:]] == sorted(cell.context for cell in flat[5:])


def test_rounds_are_parsed_as_sglang_names_them() -> None:
    assert round_cells.parse_rounds("6/10/32") == round_cells.LARGE_TREE and round_cells.parse_rounds("none").num_steps == 0
    assert [round_cells.label(round_cells.parse_rounds(text)) for text in ("none", "5/1/6")] == ["none", "5/1/6"]
    assert round_cells.accept_lengths(round_cells.CHAIN) == [1.0, 2.0, 3.0, 4.0, 6.0]
    for wrong in ("5", "5/1/7", "x"):
        with pytest.raises((ValueError, bench_round.SpecCompileError)):
            round_cells.parse_rounds(wrong)


def synthetic_rounds() -> dict:
    """SYNTHETIC: no figure here was measured."""

    def row(rounds: str, batch: int, context: int, ms: float, **changes: object) -> dict:
        made = {"rounds": rounds, "batch": batch, "context": context, "status": "ok", "ms": ms, "ms_range": [ms, ms]}
        return made | {"idle": 0.01, "accept": 4.0, "accept_measured": 4.0, "at_accept": {}} | changes

    part = {"part": "verify", "calls": 1, "ms": 4.5, "bytes": 16e9, "floor_ms": 4.0, "floor": "bytes", "ratio": 1.125}
    slow = {**part, "part": "draft", "ms": 1.0, "floor_ms": 0.5, "ratio": 2.0}
    rows = [
        row("5/1/6", 1, 512, 5.0, parts=[part, slow], at_accept={"1.0": {"ms": 4.0, "accept_measured": 1.0}}),
        row("5/1/6", 8, 512, 7.0, idle=0.05),
        row("5/4/8", 1, 512, 6.0, accept_measured=3.0),
        row("none", 1, 512, 4.0, accept=1.0, accept_measured=1.0),
        {"rounds": "5/1/6", "batch": 32, "context": 512, "status": "skipped", "reason": "synthetic"},
    ]
    extra = {"extra_allocated": 2**30, "extra_reserved": 3 * 2**30, "driver": 2**29, "graphs": 2**29, "kv_bytes": 2**33}
    meta = {"device": "SYNTHETIC H200", "torch": "synthetic", "date": "never"}
    return {
        "meta": meta,
        "args": {"shape": "llama-3.1-8b", "dtype": "bfloat16"},
        "rows": rows,
        "floor": {"bandwidth": {"bytes_per_second": 4e12}, "launch_ms": 0.002, "linears": "synthetic"},
        "memory": {"rounds": "5/1/6", "buckets": [1, 2, 4, 8, 16, 32, 64], **extra},
    }


def test_budgets_of_synthetic_rounds() -> None:
    by = {line[0]: line[3] for line in round_report.verdicts(synthetic_rounds())}
    assert by["round 5/1/6 x1 @512"] == "pass" and by["round 5/1/6 x8 @512"] == "MISS"
    assert by["round 5/1/6 x32 @512"] == "NOT RUN" and by["round 5/1/6 x1 @2048"] == "NOT RUN"
    assert by["round 5/4/8 x1 @512"] == "pass"
    assert by["GPU idle between rounds, 5/1/6 x1 @512"] == "pass" and by["GPU idle between rounds, 5/1/6 x8 @512"] == "MISS"
    [speed] = [line for line in round_report.verdicts(synthetic_rounds()) if line[0].startswith("tokens/s")]
    assert speed[1:] == ["800", "≥ 680", "pass"] and "SIMULATED" in speed[0]
    assert by["memory beyond weights and KV, buckets 1 to 64"] == "MISS"
    few = synthetic_rounds()
    few["memory"]["buckets"] = [1, 2]
    assert round_report.verdicts(few)[-1][3] == "NOT RUN", "the bound is on all buckets"


def test_tokens_per_second_say_what_was_timed() -> None:
    chain, _, tree, none, _ = synthetic_rounds()["rows"]
    assert round_report.tokens_per_second(chain) == {
        1.0: (250.0, True), 2.0: (400.0, False), 3.0: (600.0, False), 4.0: (800.0, True), 6.0: (1200.0, False)
    }  # fmt: skip
    assert round_report.tokens_per_second(tree)[4.0][1] is False, "a tree that is not deep enough did not emit 4"
    assert round_report.tokens_per_second(none) == {1.0: (250.0, True)}


def test_the_report_of_synthetic_rounds(tmp_path: Path) -> None:
    result = synthetic_rounds()
    text = round_report.markdown(result)
    assert "6.52 (608)" in text and "NOT measured in this run" in text and "2.00 !" in text and "1.12 |" in text
    assert "skipped: synthetic" in text and "RANDOM WEIGHTS" in text and "3.00 GiB reserved" in text
    assert "| glue (rest) | – | -0.500 |" in text, "parts that take longer alone than in the round are not hidden"
    result["meta"]["device"] = "CPU"
    assert "6.52" not in round_report.markdown(result)
    if importlib.util.find_spec("matplotlib"):
        round_plots.plot(synthetic_rounds(), str(tmp_path / "round"))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["round-parts.png", "round-time.png", "round-tokens.png"]


def test_results_of_several_runs_are_joined() -> None:
    first, second = synthetic_rounds(), synthetic_rounds()
    del second["memory"]
    second["rows"] = [{**first["rows"][4], "status": "not reached"}, {**first["rows"][0], "ms": 5.5}]
    rows = {(row["rounds"], row["batch"]): row for row in round_report.merge([first, second])["rows"]}
    assert len(rows) == 5 and rows["5/1/6", 1]["ms"] == 5.5 and rows["5/1/6", 32]["status"] == "skipped"
    assert round_report.merge([second, first])["memory"] == first["memory"]
    second["args"] = {**second["args"], "dtype": "float16"}
    with pytest.raises(ValueError, match="do not go into one table"):
        round_report.merge([first, second])


def test_adaptive_rounds_are_judged_against_none() -> None:
    result = synthetic_rounds() | {"rows": []}
    speeds = {"off": 100.0, "adaptive": 97.0, "fixed": 60.0}
    cell = {way: {"tokens_per_second": v, "first_call": v, "all_rows_live": 1.1 * v} for way, v in speeds.items()}
    result["adaptive"] = [
        {"batch": 64, "rate": 0.05, "context": 512, **cell},
        {"batch": 64, "rate": 0.9, "context": 512, **cell, "adaptive": {**cell["adaptive"], "tokens_per_second": 99.0}},
        {"batch": 1, "rate": 0.9, "context": 512, "off": cell["off"], "adaptive": {"error": "synthetic"}},
    ]
    lines = [line for line in round_report.markdown(result).splitlines() if line.startswith("| 64") or line.startswith("| 1 ")]
    assert [line.split(" | ")[-1] for line in lines] == ["MISS |", "pass |", "NOT RUN |"]


@pytest.mark.slow
def test_bench_round_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Chain, tree and no speculation on a tiny model: times, parts with their floors, one file again from two."""
    out = tmp_path / "round.json"
    command = ["--shape", "tiny", "--device", "cpu", "--compile", "none", "--contexts", "24"]
    rounds = ["--shapes", "none", "5/1/6", "5/4/8", "--rounds", "6", "--passes", "1", "--parts", "all"]
    bench_round.main([*command, *rounds, "--batches", "2", "--json", str(out)])
    rows = {row["rounds"]: row for row in json.loads(out.read_text())["rows"]}
    assert {row["status"] for row in rows.values()} == {"ok"}, capsys.readouterr().out
    assert rows["5/1/6"]["accept_measured"] == pytest.approx(4.0) and rows["none"]["accept_measured"] == 1.0
    calls = {name: {part["part"]: part["calls"] for part in row["parts"]} for name, row in rows.items()}
    assert calls["5/1/6"]["draft"] == 4 and calls["5/1/6"]["draft_topk"] == 5 and calls["5/1/6"]["draft_extend"] == 1
    assert calls["5/4/8"]["build_tree"] == calls["5/4/8"]["kv_commit"] == calls["5/4/8"]["verify"] == 1
    assert calls["5/4/8"]["expand_beam"] == 5 and "draft" not in calls["none"]
    assert all(part["ms"] > 0 and part["bytes"] > 0 for row in rows.values() for part in row["parts"])
    tiny = shapes.build_random("tiny", torch.float32, "cpu")
    [verify] = [part for part in rows["none"]["parts"] if part["part"] == "verify"]
    least = floors.weight_bytes_read(tiny) + 2 * 24 * floors.kv_bytes_per_token(tiny)
    assert least <= verify["bytes"] <= 1.01 * least
    capsys.readouterr()
    bench_round.main(["--merge", str(out), str(out)])
    assert "Parts of a round, 5/4/8 x2 @24" in capsys.readouterr().out


def test_rounds_of_a_recurrent_target_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its MTP head: the states it reads and writes are in the bytes."""
    out = tmp_path / "hybrid.json"
    sizes = ["--contexts", "24", "--batches", "2", "--json", str(out)]
    command = ["--shape", "tiny-hybrid", "--device", "cpu", "--compile", "none", *sizes]
    bench_round.main([*command, "--shapes", "none", "3/1/4", "--rounds", "6", "--passes", "1", "--parts", "all"])
    printed = capsys.readouterr().out
    rows = {row["rounds"]: row for row in json.loads(out.read_text())["rows"]}
    assert {row["status"] for row in rows.values()} == {"ok"}, printed
    bench_round.main(["--show", str(out)])
    assert capsys.readouterr().out == printed and "MTP-shaped head" in printed
    parts = {part["part"]: part for part in rows["3/1/4"]["parts"]}
    assert parts["draft"]["calls"] == 2 and parts["gdn_commit"]["calls"] == 1
    hybrid = shapes.build_random("tiny-hybrid", torch.float32, "cpu")
    states = floors.state_bytes_per_row(hybrid)
    assert states == 4 * 4 * 16 * 16
    [verify] = [part for part in rows["none"]["parts"] if part["part"] == "verify"]
    least = floors.weight_bytes_read(hybrid) + 2 * (24 * floors.kv_bytes_per_token(hybrid) + states)
    assert least <= verify["bytes"] <= 1.02 * least
    assert 4 * states <= parts["gdn_commit"]["bytes"] <= 8 * states


def test_systems_of_a_shape_have_its_head() -> None:
    assert "ours_mtp" in shapes.systems_of("qwen3.5-4b") and "ours_eagle" not in shapes.systems_of("qwen3.5-4b")
    assert "ours_eagle" in shapes.systems_of("llama-3.1-8b") and "ours_mtp" not in shapes.systems_of("llama-3.1-8b")


def test_a_call_that_ran_plain_ends_the_adaptive_grid_with_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its figures would be transformers'; the cells beside it are printed first."""
    with pytest.raises(RanPlainError, match=r"ran as plain transformers: torch\.autocast is on") as told:
        round_adaptive.figures(SpecStats(mode="plain", plain_because="torch.autocast is on"), 1)
    row = {"batch": 1, "rate": 0.3, "context": 24, "off": {"error": report.describe(told.value)}}
    args = report.settings(bench_round.parse(["--shape", "tiny", "--device", "cpu"])) | {"shapes": []}
    result = {"meta": {**report.environment("cpu"), "random_weights": True}, "args": args, "rows": [], "adaptive": [row]}
    out = tmp_path / "adaptive.json"
    report.save(result, out)
    with pytest.raises(SystemExit, match=r"error: calls that were to be accelerated .*\nRanPlainError: .*autocast is on"):
        bench_round.main(["--show", str(out)])
    assert "| 1 | 0.3 |" in capsys.readouterr().out


@pytest.mark.slow
def test_adaptive_grid_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "adaptive.json"
    command = ["--adaptive-grid", "--shape", "tiny", "--device", "cpu", "--compile", "none"]
    sizes = ["--batches", "1", "--contexts", "24", "--rates", "0.0", "1.0", "--new-tokens", "24", "--passes", "1"]
    bench_round.main([*command, *sizes, "--json", str(out)])
    never, always = json.loads(out.read_text())["adaptive"]
    assert never["fixed"]["accept_length"] == 1.0 and always["fixed"]["accept_length"] > 5
    assert never["off"] == always["off"] and always["adaptive"]["tokens_per_second"] > 0
    assert "| 1 | 1.0 |" in capsys.readouterr().out
