"""``bench_compile.py``: what it is asked, and the table of what processes answered."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))  # scripts, not a package: they import one another by name

import bench_compile

FIGURES = {
    "decode_compile_s": 20.0, "decode_ms": 6.5, "decode_graphs": 1, "decode_breaks": 0, "decode_difference": 1e-6,
    "prompt_compile_s": 30.0, "prompt_further_s": 31.0, "prompt_graphs": [1, 2, 2], "prompt_breaks": 0, "prompt_ms": 70.0,
    "prompt_difference": 2e-6,
}  # fmt: skip


def test_a_cpu_runs_what_it_has_and_shapes_are_parsed() -> None:
    args = bench_compile.parse(["--device", "cpu", "--prompts", "2x70", "1x9"])
    assert (args.systems, args.dtype, args.prompts) == (["eager", "inductor", "spec_compile"], "float32", [(2, 70), (1, 9)])
    assert bench_compile.parse([]).systems == list(bench_compile.SYSTEMS)
    for wrong in ("70", "0x4", "axb"):
        with pytest.raises(SystemExit):
            bench_compile.parse(["--prompts", wrong])


def test_the_table_of_two_ways_one_of_which_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    answers = {
        ("inductor", "cold"): FIGURES,
        ("inductor", "warm"): FIGURES | {"decode_compile_s": 4.0, "decode_ms": 6.25},
    }
    asked: list[str] = []

    def answer(name: str, folder: Path, args: object) -> dict[str, object]:
        asked.append(name)
        return answers.get((name, "cold" if asked.count(name) == 1 else "warm"), {"error": "out of memory"})

    monkeypatch.setattr(bench_compile, "run_child", answer)
    out = tmp_path / "compile.json"
    command = ["--shape", "tiny", "--device", "cpu", "--systems", "inductor", "spec_compile", "--json", str(out)]
    bench_compile.main(command)
    printed = capsys.readouterr().out
    assert "RANDOM WEIGHTS" in printed
    assert "| inductor | 20.0 / 4.0 | 1 (0) | 6.25 | 30.0 / 30.0 | 1, 31.0 / 31.0 | 70.00 | 2e-06 |" in printed
    assert "| spec_compile | – / – | – | – | – | – | – | – |" in printed and "spec_compile, cold: out of memory" in printed
    assert len(json.loads(out.read_text())["rows"]) == 4
    bench_compile.main(["--show", str(out)])
    assert capsys.readouterr().out.strip() == printed.strip()


@pytest.mark.slow
def test_a_process_measures_without_compiling(tmp_path: Path) -> None:
    command = ["--shape", "tiny", "--device", "cpu", "--systems", "eager", "--prompt-len", "16", "--prompts", "1x8", "2x9"]
    row = bench_compile.run_child("eager", tmp_path, bench_compile.parse([*command, "--repeats", "2"]))
    assert row.get("error") is None and set(row) == set(FIGURES) and row["decode_difference"] == 0
