"""The benchmark, end to end on a tiny model: it measures, drops no system silently, writes what report.py reads."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))  # scripts, not a package: they import one another by name

import attention_grid  # noqa: E402
import attention_measure  # noqa: E402
import attention_report  # noqa: E402
import bench_attention  # noqa: E402
import bench_generate  # noqa: E402
import bench_round  # noqa: E402
import bench_step  # noqa: E402
import floors  # noqa: E402
import report  # noqa: E402
import round_cells  # noqa: E402
import round_plots  # noqa: E402
import round_report  # noqa: E402
import shapes  # noqa: E402

from spec_compile.hardware import Hardware  # noqa: E402
from spec_compile.passes.preference import rule_for  # noqa: E402

TINY = [
    "--shape", "tiny", "--device", "cpu", "--batch", "1", "2", "--prompt-len", "16", "--new-tokens", "16",
    "--repeats", "2", "--max-warmups", "1",
]  # fmt: skip


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "220"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=240, env=environment, cwd=FOLDER.parent
    )


def cell_of(result: dict, system: str, batch: int) -> dict:
    [cell] = [c for c in result["cells"] if (c["system"], c["batch"]) == (system, batch)]
    return cell


def test_baselines_end_to_end(tmp_path: Path) -> None:
    """Eager and prompt lookup agree token for token in fp32; JSON, table, plot and markdown all appear."""
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    systems = ("hf_eager", "hf_lookup", "hf_assistant")
    files = ["--json", str(out)]
    if importlib.util.find_spec("matplotlib"):
        files += ["--plot", str(plot)]
    done = run_script("benchmarks/bench_generate.py", *TINY, "--systems", *systems, *files)
    assert done.returncode == 0, done.stderr
    assert "RANDOM WEIGHTS" in done.stdout
    result = json.loads(out.read_text())
    for name in ("torch", "transformers", "device", "commit", "date"):
        assert result["meta"][name]
    eager = cell_of(result, "hf_eager", 1)
    assert eager["status"] == "ok" and eager["accept_length"] == 1
    assert eager["floor_bytes_ms"] > 0 and eager["floor_linears_ms"] > 0
    for system in systems[1:]:
        cell = cell_of(result, system, 1)
        assert cell["same_tokens"] == [16, 16], cell
        assert cell["accept_length"] >= 1
        assert cell_of(result, system, 2)["status"] == "skipped"  # named in the table, with its reason
    assert plot.exists() == ("--plot" in files)
    markdown = run_script("benchmarks/report.py", str(out))
    assert markdown.returncode == 0 and "HF prompt lookup 7" in markdown.stdout
    assert "batch 1 only" in markdown.stdout


def bench(monkeypatch: pytest.MonkeyPatch, attach: object, *arguments: str) -> dict:
    """A run in this process with ``attach`` in the place of spec_compile."""
    monkeypatch.setattr(bench_generate, "attach_ours", attach)
    args = bench_generate.parse([*TINY, "--no-floor", *arguments])
    result: dict = {"meta": {"device": "CPU", "random_weights": True}, "args": vars(args)}
    bench_generate.run_cells(args, result)
    return json.loads(json.dumps(result, default=str))


def stub(rounds_per_token: float, mode: str = "rounds") -> object:
    """The plain model with a ``spec`` that counts as if each round had given 1 / rounds_per_token tokens."""

    def attach(model: torch.nn.Module, *_: object) -> torch.nn.Module:
        plain, last = type(model).generate, {}

        def generate(input_ids: torch.Tensor, max_new_tokens: int, **kwargs: object) -> torch.Tensor:
            last["rounds"] = int((max_new_tokens - 1) * rounds_per_token)
            return plain(model, input_ids, max_new_tokens=max_new_tokens, **kwargs)

        def remove() -> None:
            del model.generate, model.spec

        model.generate = generate
        model.spec = SimpleNamespace(stats=lambda: SimpleNamespace(mode=mode, **last), remove=remove)
        return model

    return attach


def test_a_system_that_fails_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ImportError("no spec_compile here")

    result = bench(monkeypatch, broken, "--systems", "ours", "hf_eager")
    assert [cell_of(result, "ours", batch)["status"] for batch in (1, 2)] == ["error"] * 2
    assert cell_of(result, "hf_eager", 2)["status"] == "ok"
    assert "no spec_compile here" in report.markdown(result)


def test_ours_is_counted_by_its_own_rounds_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    result = bench(monkeypatch, stub(1 / 3), "--systems", "ours", "ours_ngram", "hf_eager")
    assert cell_of(result, "ours", 2)["same_tokens"] == [32, 32]
    speculative = cell_of(result, "ours_ngram", 1)
    assert speculative["tokens_per_round"] == pytest.approx(3)  # 12 tokens between n1 = 4 and n2 = 16: 1 and 5 rounds
    assert "same_tokens" not in speculative  # simulated acceptance emits other tokens than the model's
    assert "SIMULATED" in speculative["label"]


def test_a_call_that_ran_plain_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    result = bench(monkeypatch, stub(1, mode="plain"), "--systems", "ours")
    assert "plain transformers" in cell_of(result, "ours", 1)["reason"]


def test_time_limit_ends_what_runs_even_if_it_wraps_errors() -> None:
    with pytest.raises(shapes.OverBudget, match="time budget"), shapes.time_limit(0.05):
        try:
            time.sleep(5)
        except Exception as error:
            raise RuntimeError("a compiler's own error") from error


def test_published_figures_only_beside_the_same_conditions() -> None:
    args = {"shape": "llama-3.1-8b", "prompt_len": 512, "new_tokens": 128, "dtype": "bfloat16"}
    result = {"meta": {"device": "NVIDIA H200"}, "args": args}
    cell = {"system": "ours", "batch": 8}
    assert report.published(result, cell) == (5.16, 1551)
    assert report.published(result, {"system": "hf_eager", "batch": 8}) is None
    assert report.published({**result, "args": {**args, "prompt_len": 2048}}, cell) is None
    assert report.published({**result, "meta": {"device": "CPU, 2 threads"}}, cell) is None


def test_shapes_have_the_published_sizes() -> None:
    """Parameter counts of the public checkpoints, without allocating them."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    for name, parameters in (("llama-3.1-8b", 8_030_261_248), ("llama-3.2-1b", 1_235_814_400)):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LlamaConfig(**shapes.SHAPES[name].config), dtype=torch.bfloat16)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert floors.kv_bytes_per_token(model) == {"llama-3.1-8b": 131072, "llama-3.2-1b": 32768}[name]
        untied = name == "llama-3.1-8b"
        assert floors.parameter_bytes(model) - floors.weight_bytes_read(model) == (128256 * 4096 * 2 if untied else 0)


def test_prompt_row_finds_the_first_difference() -> None:
    same = report.prompt_row([torch.tensor([1, 2, 3])] * 2, [10.0, 10.0], [20.0, 30.0])
    assert same["same_output"] and same["ratio"] == 2.5 and same["ratio_range"] == [2.0, 3.0]
    longer = report.prompt_row([torch.tensor([1, 2]), torch.tensor([1, 2, 3])], [1.0], [1.0])
    assert not longer["same_output"] and longer["first_difference"] == 2
    rows = [{"kind": "quoting", "ratio": 1.4}, {"kind": "free", "ratio": 0.97}]
    lines = report.acceptance_lines(rows)
    assert "MISSED" in lines[0] and "0.97, bound 0.95 met" in lines[1]
    lines = report.acceptance_lines([*rows, {"kind": "unknown"}])
    assert "NOT CHECKED" in lines[0] and "NOT CHECKED" in lines[1]


def test_quoted_share_counts_tokens_in_runs_of_the_prompt() -> None:
    prompt = list(range(20))
    assert shapes.quoted_share(prompt, [3, 4, 5, 6, 7]) == 1.0
    assert shapes.quoted_share(prompt, [3, 4, 5, 90, 91, 92]) == 0.0, "three in a row are no quotation"
    assert shapes.quoted_share(prompt, [90, 3, 4, 5, 6, 91]) == pytest.approx(4 / 6)


def test_device_visit_is_portable() -> None:
    script = FOLDER / "device_visit.sh"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert "${OUT:-results}" in script.read_text()


# ----------------------------------------------------------------------------------------------------------------------
# bench_attention.py


FULL = attention_grid.GRIDS["full"]


def test_the_committed_grids_auto_is_what_the_table_says_today() -> None:
    """``auto`` is looked up, not measured: a change of the preferences has to show in the committed figures."""
    rows = attention_report.read(FOLDER / "results" / "h200-attention.json")["rows"]
    able: dict[attention_grid.Cell, set[str]] = {}
    for row in rows:
        if row["status"] == "ok":
            able.setdefault(attention_grid.cell_of(row), set()).add(row["provider"])
    h200 = Hardware("nvidia", "sm90", 132, "NVIDIA H200")
    for row in (row for row in rows if row["provider"] == "auto"):
        cell = attention_grid.cell_of(row)
        order = rule_for(cell.node(), h200).providers
        assert row["choice"] == next(name for name in order if name in able[cell]), cell
    summary = attention_report.merge(rows, FULL)["summary"]
    assert (summary["auto_near_best"], summary["auto_judged"]) == (1588, 1620), "the README says 98 %"


def test_the_grid_is_the_whole_product_once() -> None:
    cells = FULL.cells()
    assert len(cells) == len(set(cells)) == 5 * 4 * 3 * 3 * (1 + 4 * 2)  # a tree of one token is a chain
    assert {c.batch for c in cells} == {1, 4, 8, 32, 64} and {c.context for c in cells} == {1024, 4096, 16384, 32768}
    assert {c.tokens for c in cells} == {1, 4, 8, 16, 64} and {c.head_dim for c in cells} == {64, 128, 256}
    assert {c.group for c in cells} == {1, 4, 8} and not any(c.tree and c.tokens == 1 for c in cells)
    every = FULL.all_cells()
    assert [c.context for c in every[:2]] == [2048, 16384] and set(every) - set(cells) == {every[0]}


def test_workers_share_the_grid_by_what_is_compiled() -> None:
    """Every cell in exactly one group, every group of one (head dim, group, tokens), the headline's first."""
    groups = attention_grid.by_spec(FULL.all_cells())
    assert next(iter(groups)) == (128, 4, 8) and len(groups) == 45
    assert sorted((c for cells in groups.values() for c in cells), key=lambda c: c.key) == sorted(
        FULL.all_cells(), key=lambda c: c.key
    )
    assert all({c.spec for c in cells} == {spec} for spec, cells in groups.items())


def test_parts_of_the_grid_can_be_asked_for() -> None:
    args = bench_attention.parse(["--out", "x", "--specs", "128,4,8", "64,1,1", "--batch", "1", "--seconds", "9"])
    cells = bench_attention.chosen_cells(args, FULL)
    assert {c.spec for c in cells} == {(128, 4, 8), (64, 1, 1)} and {c.batch for c in cells} == {1}
    assert args.seconds == 9 and args.gpus == 1
    for wrong in (["--out", "x", "--specs", "128,4"], ["--out", "x", "--providers", "fa9"], []):
        with pytest.raises(SystemExit):
            bench_attention.parse(wrong)


def test_a_cell_knows_its_bytes_and_its_node() -> None:
    cell = attention_grid.Cell(2, 1000, 8, True, 128, 4)
    assert cell.capacity == 1024 and attention_grid.Cell(1, 1024, 8, False, 64, 1).capacity == 2048
    assert cell.pages == 1 + 2 * 16 and cell.layer_bytes == 2 * 2 * 33 * 64 * 8 * 128
    context, window, outputs = 2 * 1000 * 8 * 128 * 2, 2 * 2 * 8 * 8 * 128 * 2, 2 * 8 * 32 * 128 * 2
    assert cell.bytes_moved == 2 * (context + window + outputs)
    node = cell.node()
    assert (node.num_q_heads, node.num_kv_heads, node.max_context, node.is_tree) == (32, 8, 1024, True)


def test_trees_of_the_benchmark_are_trees() -> None:
    """Each token sees itself and exactly what its parent sees."""
    from spec_compile.ops.attention import window_visibility

    sees = window_visibility(attention_measure.random_trees(3, 40, "cpu"), 3, 40, torch.device("cpu"))
    for row in sees:
        assert row.diagonal().all() and not row.triu(1).any()
        for token in range(1, 40):
            parent = int(row[token, :token].nonzero().max())
            assert torch.equal(row[token, :token], row[parent, :token])
    assert not torch.equal(sees[0], sees[1])


def synthetic_row(cell: attention_grid.Cell, provider: str, us: float, **changes: object) -> dict:
    """SYNTHETIC: no figure here was measured."""
    row = {**vars(cell), "provider": provider, "status": "ok", "us": us, "us_layer": us, "us_plan": 0.0, "spread": 0.0}
    return row | {"bandwidth_percent": 50.0, "error": 0.002, "layers": 4, "version": "synthetic"} | changes


def synthetic_rows() -> list[dict]:
    """Five cells of the grid: auto best; auto 20 % off; auto's choice wrong; the fastest wrong; an error beside a time."""
    cells, auto = FULL.cells()[:5], {"provider": "auto", "status": "ok", "choice": "fa4", "reason": "synthetic"}
    rows: list[dict] = [{"meta": {"device": "SYNTHETIC", "bandwidth": {"bytes_per_second": 4e12}}}]
    times = [(10.0, 12.0), (12.0, 10.0), (8.0, 10.0), (10.0, 7.0), (9.0, None)]
    for number, (cell, (fa4, triton)) in enumerate(zip(cells, times, strict=True)):
        rows.append({**vars(cell), **auto})
        rows.append(synthetic_row(cell, "fa4", fa4, error=0.5 if number == 2 else 0.002))
        if triton is None:
            rows.append({**vars(cell), "provider": "triton", "status": "error", "reason": "synthetic failure"})
        else:
            rows.append(synthetic_row(cell, "triton", triton, error=0.5 if number == 3 else 0.002))
    rows.append({**vars(cells[0]), "provider": "torch", "status": "refused", "reason": "synthetic refusal"})
    return rows


def test_the_summary_of_synthetic_rows() -> None:
    summary = attention_report.merge(synthetic_rows(), FULL)["summary"]
    assert summary["cells_measured"] == 5 and summary["fastest"] == {"fa4": 3, "triton": 2}
    assert (summary["auto_judged"], summary["auto_near_best"]) == (5, 3)
    wrong, slow = summary["auto_misses"]
    assert wrong["us"] is None and wrong["best"] == "triton"
    assert slow["ratio"] == pytest.approx(1.2) and slow["cell"] == str(FULL.cells()[1])
    assert len(summary["wrong"]) == 2 and len(summary["errors"]) == 1 and "synthetic failure" in summary["errors"][0]
    assert len(summary["not_run"]) == len(FULL.all_cells()) - 5  # listed by name, not invented
    assert summary["not_complete"][str(FULL.cells()[1])] == ["torch"]
    assert summary["left_out"] == {"torch, refused: synthetic refusal": 1}
    assert [row["verdict"] for row in summary["budget"]] == ["NOT RUN", "NOT RUN"]


def test_budgets_are_judged_by_the_fastest() -> None:
    (short, _), (long, _) = FULL.budget_cells()
    rows = [synthetic_row(short, "fa4", 10.9), synthetic_row(short, "triton", 13.0), synthetic_row(long, "fa4", 27.1)]
    budget = attention_report.merge(rows, FULL)["summary"]["budget"]
    assert [(row["best"], row["verdict"]) for row in budget] == [("fa4", "pass"), ("fa4", "MISS")]


def test_the_latest_row_counts_and_the_files_read_back(tmp_path: Path) -> None:
    rows = synthetic_rows()
    cell = FULL.cells()[1]
    rows.append(synthetic_row(cell, "fa4", 9.0))  # measured again
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"batch": 1, "con')  # cut off mid-line
    result = attention_report.merge(attention_report.load(tmp_path / "rows.jsonl"), FULL)
    assert result["summary"]["auto_near_best"] == 4
    attention_report.write(result, tmp_path, "synthetic")
    again = attention_report.read(tmp_path / "synthetic.json")
    assert again["summary"] == json.loads(json.dumps(result["summary"]))
    assert len(again["rows"]) == len(result["rows"]) and again["rows"][0]["provider"] in ("auto", "fa4", "torch", "triton")
    text = (tmp_path / "synthetic.md").read_text()
    assert "SYNTHETIC" in text and "Cells not run" in text and "80.0%" in text and "**9.0 (50)**" in text
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "synthetic-time.png").exists() and (tmp_path / "synthetic-winner.png").exists()


def test_a_second_run_measures_what_is_missing_and_what_failed() -> None:
    done = bench_attention.finished(synthetic_rows())
    first, *_, last = FULL.cells()[:5]
    assert done[first] == {"auto", "fa4", "triton", "torch"} and done[last] == {"auto", "fa4"}


def test_a_crash_costs_one_provider_of_one_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What crashed is a row, its provider's other cells of the spec too; everything else goes to a new process."""
    args = bench_attention.parse(["--out", str(tmp_path), "--providers", "triton", "torch"])
    cells = [cell for cell in FULL.cells() if cell.spec == (128, 4, 8)][:3]
    run = bench_attention.Run(args, FULL, cells)
    monkeypatch.setattr(run, "_start", lambda number, gpu: "a new worker")
    process = SimpleNamespace(kill=lambda: None, join=lambda seconds: None)
    task = bench_attention.Task(cells)
    worker = SimpleNamespace(number=0, gpu=0, process=process, task=task, trying=(cells[1], "triton"))
    run.workers = [worker]
    for cell in cells[:1]:
        run._write({**vars(cell), "provider": "triton", "status": "ok"})
    tasks: deque = deque()
    run._replace(worker, "exit code -11", tasks)
    rows = attention_report.load(tmp_path / "rows.jsonl")
    errors = {attention_grid.cell_of(row): row["reason"] for row in rows if row["status"] == "error"}
    assert errors == {cells[1]: "exit code -11", cells[2]: f"not run: exit code -11 at {cells[1]}"}
    assert run.workers == ["a new worker"]
    [again] = tasks
    assert again.cells == cells and all(again.skip[cell] == {"triton"} for cell in cells)
    assert bench_attention.finished(rows) == {cells[0]: {"triton"}}  # the next run tries the others again


@pytest.mark.slow
def test_bench_attention_end_to_end(tmp_path: Path) -> None:
    """Workers, rows, a second run that finds nothing to do, merged files: the GPU's way through, on a CPU."""
    command = ["benchmarks/bench_attention.py", "--out", str(tmp_path), "--grid", "tiny", "--device", "cpu", "--gpus", "1"]
    done = run_script(*command, "--providers", "torch", "triton")
    assert done.returncode == 0, done.stderr + done.stdout
    cells = attention_grid.GRIDS["tiny"].all_cells()
    rows = attention_report.load(tmp_path / "rows.jsonl")
    assert len(rows) == 1 + 3 * len(cells) and rows[0]["meta"]["bandwidth"]["bytes_per_second"] > 0
    measured = [row for row in rows if row.get("provider") == "torch"]
    assert len(measured) == len(cells) and all(row["error"] < 0.008 and row["us"] > 0 for row in measured)
    assert {row["status"] for row in rows if row.get("provider") == "triton"} <= {"refused", "skipped"}
    result = attention_report.read(tmp_path / "attention.json")
    assert result["summary"]["auto_near_best"] == len(cells) and not result["summary"]["not_run"]
    bench_attention.main([*command[1:], "--providers", "torch", "triton"])
    assert len(attention_report.load(tmp_path / "rows.jsonl")) == len(rows), "a second run finds nothing to do"


# ----------------------------------------------------------------------------------------------------------------------
# bench_step.py


def test_steps_are_parsed_and_have_budgets() -> None:
    args = bench_step.parse([])
    assert [str(step) for step in args.steps] == ["1x8@2048", "1x8@16384", "32x4@2048"]
    assert args.steps[0].capacity == 4096 and bench_step.parse(["--steps", "2x3@4"]).steps == [bench_step.Step(2, 3, 4)]
    with pytest.raises(SystemExit):
        bench_step.parse(["--steps", "8@2048"])


def test_budgets_of_synthetic_steps() -> None:
    floor = {"kv_ms": {"32x4@2048": 2.0, "1x8@2048": 0.1}, "linears_ms": {"32x4@2048": 4.0, "1x8@2048": 4.0}}
    step, row = bench_step.Step(32, 4, 2048), {"status": "ok", "segments_ms": 4.4}
    verdicts = [bench_step.judge({**row, "ms": ms}, floor, "llama-3.1-8b", step)["verdict"] for ms in (7.4, 7.9, 8.1)]
    assert verdicts == ["pass", "pass with norms and activations in the floor", "MISS"]
    assert bench_step.judge({**row, "ms": 4.9}, floor, "llama-3.1-8b", bench_step.Step(1, 8, 2048))["verdict"] == "MISS"
    assert bench_step.judge({**row, "ms": 4.9}, floor, "tiny", step) == {}


@pytest.mark.slow
def test_bench_step_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step on a tiny model; a provider that cannot is a row with its reason, and attention can be taken out."""
    out = tmp_path / "step.json"
    command = ["--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--compile", "none"]
    bench_step.main([*command, "--providers", "torch", "triton", "--steps", "2x4@40", "1x1@9", "--json", str(out)])
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    by = {(row["provider"], row["step"]): row for row in result["rows"]}
    for step in ("2x4@40", "1x1@9"):
        row = by["torch", step]
        assert row["status"] == "ok" and row["chosen"] == ["torch"] and 0 < row["segments_ms"] < row["ms"]
        assert by["triton", step]["status"] == "refused" and "CUDA" in by["triton", step]["reason"]
    assert "RANDOM WEIGHTS" in printed and "| 2x4@40 | torch | torch |" in printed
    bench_step.main(["--show", str(out)])
    assert capsys.readouterr().out.strip() in printed


# ----------------------------------------------------------------------------------------------------------------------
# bench_round.py


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
