"""``bench_attention.py``: the grid, its budgets, what ``"auto"`` is worth in it, and a run of a tiny one."""

from __future__ import annotations

import importlib.util
import json
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import attention_grid
import attention_measure
import attention_report
import bench_attention
import pytest
import torch
from bench_scripts import FOLDER, run_script

from spec_compile.hardware import Hardware
from spec_compile.passes.preference import rule_for

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
