"""``bench_step.py``: its budgets, and a verify forward of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import bench_step
import pytest


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
