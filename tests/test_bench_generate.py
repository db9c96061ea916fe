"""``bench_generate.py`` on a tiny model: it measures, drops no system silently, writes what ``report.py`` reads."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import bench_generate
import floors
import pytest
import report
import shapes
import torch
from bench_scripts import FOLDER, run_script

from spec_compile.runtime.stats import SpecStats

TINY = [
    "--shape", "tiny", "--device", "cpu", "--batch", "1", "2", "--prompt-len", "16", "--new-tokens", "16",
    "--repeats", "2", "--max-warmups", "1",
]  # fmt: skip


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
        model.spec = SimpleNamespace(stats=lambda: SpecStats(mode=mode, total_ms=1.0, **last), remove=remove)
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


def test_a_run_without_our_figures_is_no_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd) -> None:
    """autocast stands for whatever makes calls plain. The other systems' figures are kept, the reason is the last word."""
    out = tmp_path / "out.json"
    arguments = [*TINY, "--batch", "1", "--no-floor", "--systems", "ours", "hf_eager", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_generate.py", *arguments])
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(SystemExit) as ended:
        bench_generate.main()
    assert re.match(r"error: calls that were to be accelerated ran as plain .*\nRanPlainError: .*autocast", ended.value.code)
    result = json.loads(out.read_text())
    assert cell_of(result, "hf_eager", 1)["status"] == "ok" and cell_of(result, "ours", 1)["status"] == "error"
    child = {"starts": [{"error": "spec_compile.errors.RanPlainError: generate() was to be accelerated"}]}
    with pytest.raises(SystemExit, match=r"RanPlainError: generate\(\) was to be"):
        report.exit_if_plain(child)
    report.exit_if_plain({"cells": [{"status": "error", "reason": "OutOfMemoryError: 3 GiB"}]})


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
