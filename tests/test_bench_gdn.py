"""bench_gdn.py on a CPU: every kind of cell gives a figure and an error, nothing is dropped silently, and a run goes on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import bench_gdn
import floors
import gdn_report
import pytest
import torch

from spec_compile.ops import linear_attention as ops

TINY = ["--shapes", "tiny", "--device", "cpu", "--providers", "torch", "flashinfer", "fla", "--batches", "2", "--tokens", "4"]
TINY += ["--committed", "3", "--prompts", "70"]


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "read_bandwidth", lambda device: {"bytes_per_second": 1e9})


def test_every_kind_of_cell(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out, plot = tmp_path / "gdn.json", tmp_path / "gdn.png"
    drawn = ["--plot", str(plot)] if importlib.util.find_spec("matplotlib") else []
    bench_gdn.main([*TINY, "--json", str(out), *drawn])
    result = json.loads(out.read_text())
    assert str(tmp_path) not in out.read_text(), "results are committed: they name no file of the machine they were made on"
    rows = {(row["kind"], row["tree"], row["provider"]): row for row in result["rows"]}
    assert len(rows) == len(result["rows"]) == 2 * 3 + 1 + 3
    state = 4 * 2 * 16 * 16
    for tree in (False, True):
        row = rows["verify", tree, "torch"]
        assert row["status"] == "ok" and row["us"] > 0 and row["error"] < 1e-2 and row["auto"] == "torch"
        assert row["state_bytes"] == 2 * state and row["state_per_token_bytes"] == 4 * 2 * state
        assert row["floor_us"] == pytest.approx(2 * state / 1e3, abs=1e-3)
    commit = rows["commit", False, "library"]
    assert commit["status"] == "ok" and commit["error"] < 1e-5
    assert commit["state_bytes"] == 2 * 2 * 2 * state, "two rows, two layers, read and written"
    assert rows["prefill", False, "torch"]["error"] < 1e-2 and rows["prefill", False, "torch"]["tokens_per_second"] > 0
    assert rows["prefill", False, "torch"]["auto"] == "torch"
    assert "NVIDIA" in rows["verify", False, "flashinfer"]["reason"]
    assert "prompts only" in rows["verify", True, "fla"]["reason"] and "ROCm device" in rows["prefill", False, "fla"]["reason"]
    printed = capsys.readouterr().out
    assert "| 2 | 4 tree | **" in printed and "2 cells of flashinfer, verify: refused" in printed
    assert "| prompt tokens | torch: µs a layer (error) | auto |" in printed, "those without any figure have no column"
    assert gdn_report.markdown(result) in printed and plot.exists() == bool(drawn)


def test_a_second_run_measures_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, asked = tmp_path / "gdn.json", []

    def run(self: bench_gdn.Bench, cell: bench_gdn.Cell) -> dict:
        asked.append(cell)
        status = {"status": "ok", "us": 1.0} if cell.kind != "prefill" else {"status": "error", "reason": "no"}
        return {**vars(cell), **status}

    monkeypatch.setattr(bench_gdn.Bench, "run", run)
    monkeypatch.setattr(gdn_report, "markdown", lambda result: "")
    bench_gdn.main([*TINY, "--json", str(out)])
    first = list(asked)
    asked.clear()
    bench_gdn.main([*TINY, "--json", str(out), "--batches", "2", "5"])
    assert set(asked) == {cell for cell in first if cell.kind == "prefill"} | {c for c in asked if c.batch == 5}
    assert len(json.loads(out.read_text())["rows"]) == len(first) + 7, "six windows and a commit more"
    changed = json.loads(out.read_text())
    changed["meta"]["device"] = "another"
    out.write_text(json.dumps(changed))
    with pytest.raises(SystemExit, match="another device"):
        bench_gdn.main([*TINY, "--json", str(out)])


def test_a_run_ends_in_time_and_says_where(capsys: pytest.CaptureFixture) -> None:
    assert bench_gdn.main([*TINY, "--seconds", "-1"])["rows"] == []
    assert "time is over before tiny verify B2 N4 torch" in capsys.readouterr().out


def test_a_wrong_kernel_shows_in_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes a tree for a chain: the expected values are not the implementation's own."""
    bench = bench_gdn.Bench("cpu")
    cell = bench_gdn.Cell("verify", "tiny", 2, 8, True, "torch")
    star = torch.tensor([1 | 1 << token for token in range(8)], dtype=torch.int32)[None, :, None].repeat(2, 1, 1)
    monkeypatch.setattr(bench_gdn, "random_trees", lambda *args: star)
    assert bench.run(cell)["error"] < 1e-2

    class Chain:
        warm_up = staticmethod(lambda node, device: None)
        lower = staticmethod(lambda node: lambda *args: ops.gdn_verify(*args[:11], None, args[12]))

    monkeypatch.setattr(bench_gdn.providers, "load_for", lambda node, name: Chain)
    monkeypatch.setattr(bench_gdn.select_backend, "refusal", lambda *args: None)
    monkeypatch.setattr(bench_gdn.select_backend, "choose", lambda *args: Chain)
    Chain.provider = "chain"
    assert bench.run(cell)["error"] > 0.1


def test_the_whole_grid_in_order() -> None:
    """Every window of both models by every provider, chains and trees; the quick one is a part of it."""
    cells = list(bench_gdn.cells(bench_gdn.parse(["--device", "cuda"])))
    windows = [cell for cell in cells if cell.kind == "verify"]
    assert len(set(cells)) == len(cells) and len(windows) == 2 * 3 * 4 * 2 * 3
    assert {(c.batch, c.tokens) for c in windows} == {(b, n) for b in (1, 8, 32) for n in (2, 4, 8, 16)}
    quick = list(bench_gdn.cells(bench_gdn.parse(["--device", "cuda", "--quick"])))
    assert set(quick) < set(cells) and len(quick) == 2 * 6 + 2 + 3
    prompts = list(bench_gdn.cells(bench_gdn.parse(["--device", "cuda", "--kinds", "prefill"])))
    assert prompts == [cell for cell in cells if cell.kind == "prefill"]
    assert {(c.shape, c.tokens, c.provider) for c in prompts} == {
        (s, n, p) for s in ("qwen3-next", "qwen3.5-27b") for n in (512, 2048, 8192) for p in ("triton", "flashinfer", "fla")
    }
    assert bench_gdn.SHAPES["qwen3-next"].state_bytes == 2 * 2**20
