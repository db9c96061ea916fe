"""Turns the JSON of bench_generate.py into a table (terminal, markdown) and a plot, and says where a result came from.

python benchmarks/report.py results/llama-3.1-8b.json            # markdown on stdout, for README and docs
python benchmarks/report.py results/llama-3.1-8b.json --plot results/llama-3.1-8b.png
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# Figures of another engine, not measured in this run. Shown only beside a run of the same shape, prompt and GPU kind.
PUBLISHED = {
    "engine": "vLLM 0.24.0",
    "source": (
        "vLLM 0.24.0 on one NVIDIA H200, Llama-3.1-8B shape, dummy bf16 weights, prompt 512, 128 new tokens, full CUDA "
        "graphs, FA3; EAGLE-3: 5 draft tokens, 32000-row head, synthetic acceptance 4.0; n-gram: 7 draft tokens at synthetic "
        "acceptance 3.65; from the project's reference measurements, NOT measured in this run"
    ),
    "device": "H200",
    "shape": "llama-3.1-8b",
    "prompt_len": 512,
    "new_tokens": 128,
    "dtype": "bfloat16",
    "ms_and_tokens_per_second": {
        "ours": {1: (4.91, 204), 8: (5.16, 1551), 32: (5.85, 5466)},
        "ours_eagle": {1: (6.52, 608), 8: (7.25, 4381), 32: (9.89, 12845), 64: (15.1, 16816)},
        "ours_ngram": {1: (6.03, 601), 8: (6.70, 4336), 32: (9.57, 11791)},
    },
}


def environment(device: str) -> dict[str, Any]:
    """What a figure needs to be believed or repeated."""
    import torch
    import transformers

    def answer(*command: str) -> str | None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    cuda = device.startswith("cuda")
    commit = os.environ.get("SPEC_COMPILE_COMMIT") or answer("git", "rev-parse", "HEAD") or "unknown"
    changed = answer("git", "status", "--porcelain", "--untracked-files=no")
    driver = answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": driver,
        "triton": triton_version,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],  # before the run: a busy machine shows
        "commit": commit + (" with local changes" if changed else ""),
    }


_FILES = ("json", "plot", "merge", "show")


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a result says about how it was made: the command's arguments, but no file of the machine it ran on."""
    return {name: value for name, value in vars(args).items() if name not in _FILES}


def read(path: str | Path) -> dict[str, Any]:
    return json.loads(Path(path).read_text())


def save(result: dict[str, Any], path: str | None) -> None:
    """After every cell, and atomically: a run that is cut off keeps what it measured."""
    if path is None:
        return
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_suffix(".part")
    scratch.write_text(json.dumps(result, indent=1, default=str) + "\n")
    scratch.replace(target)


# ----------------------------------------------------------------------------------------------------------------------
# What a result holds


def new_cell(system: Any, batch: int, floor: dict[str, Any] | None) -> dict[str, Any]:
    cell: dict[str, Any] = {"system": system.name, "label": system.label, "batch": batch, "status": "pending"}
    cell.update(draft_steps=system.steps, simulated_accept_length=system.simulate, reason="not reached")
    if system.batch_one_only and batch > 1:
        cell.update(status="skipped", reason="Hugging Face speculates at batch 1 only")
    if floor:
        cell["floor_bytes_ms"], cell["floor_linears_ms"] = floor["cells"][f"{system.name}/{batch}"]
    return cell


def describe(error: Exception) -> str:
    """A text, not the exception: its traceback would keep the memory of the system that failed."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def fail(cell: dict[str, Any], error: Exception) -> None:
    if cell["status"] == "pending":
        cell.update(status="error", reason=describe(error))


def exit_if_plain(result: dict[str, Any]) -> None:
    """End with an error when calls of ours ran as plain transformers: the result then lacks what it was made for."""
    if told := sorted(set(_told_plain(result))):
        sys.exit("\n".join(["error: calls that were to be accelerated ran as plain transformers.", *told]))


def _told_plain(value: object) -> Iterator[str]:
    if isinstance(value, str) and "RanPlainError: " in value:  # as describe() and a child's traceback tell it
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _told_plain(item)


def memory_beyond(cell: dict[str, Any], weights: int, kv: int) -> None:
    """Peaks over the weights on the device and the keys and values: of the pool if known, else of the tokens in use."""
    cell["kv_bytes"] = (cell.get("library_stats") or {}).get("kv_bytes") or kv
    for name in ("setup_peak", "peak"):
        values = cell.get(f"{name}_bytes", [])
        cell[f"{name}_extra_bytes"] = [value - weights - cell["kv_bytes"] for value in values] or None


def compare_tokens(cells: list[dict[str, Any]], outputs: dict[tuple[str, int], Any], prompt_len: int) -> None:
    """How many new tokens equal HF eager's up to each row's first difference; simulated acceptance has no say."""
    for cell in cells:
        mine, plain = (outputs.get((name, cell["batch"])) for name in (cell["system"], "hf_eager"))
        if mine is None or plain is None or cell["simulated_accept_length"] or cell["system"] == "hf_eager":
            continue
        equal = (mine == plain)[:, prompt_len:]
        cell["same_tokens"] = [int(equal.int().cumprod(1).sum()), equal.numel()]


def prompt_row(outputs: Sequence[Any], plain: list[float], ours: list[float]) -> dict[str, Any]:
    """Of one prompt, from the last outputs and the tokens/s of runs by turns: a pair of neighbours gives a ratio."""
    ratios = [b / a for a, b in zip(plain, ours, strict=True)]
    length = min(map(len, outputs))
    differs = (outputs[0][:length] != outputs[1][:length]).nonzero().flatten().tolist()
    same = not differs and len(outputs[0]) == len(outputs[1])
    return {
        "tokens": len(outputs[0]),
        "plain": statistics.median(plain),
        "ours": statistics.median(ours),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "ratio_of_best": max(ours) / max(plain),  # what a busy machine disturbs least
        "same_output": same,
        "first_difference": None if same else (differs or [length])[0],
    }


def acceptance_lines(rows: list[dict[str, Any]]) -> list[str]:
    lines = []
    for kind, bound in (("quoting", 1.5), ("free", 0.95)):
        ratios = [row["ratio"] for row in rows if row["kind"] == kind]
        if not ratios or any("ratio" not in row for row in rows):
            lines.append(f"{kind} prompts: not all measured, bound {bound} NOT CHECKED")
        else:
            verdict = "met" if min(ratios) >= bound else "MISSED"
            lines.append(f"{kind} prompts: ratio at least {min(ratios):.2f}, bound {bound} {verdict}")
    spread = max((row["ratio_range"][1] / row["ratio_range"][0] for row in rows if "ratio_range" in row), default=1)
    if spread > 1.3:
        lines.append(f"ratios of one prompt differ by up to {spread:.1f}×: the machine was busy, repeat on an idle one")
    return lines


# ----------------------------------------------------------------------------------------------------------------------
# Tables: (header, rows of strings, notes)

_TEXT_COLUMNS = ("system", "prompt", "start, fresh process, batch 1", "error")
Table = tuple[Sequence[str], list[list[str]], list[str]]


def _number(value: float | None, pattern: str) -> str:
    return "–" if value is None else format(value, pattern)


def published(result: dict[str, Any], cell: dict[str, Any]) -> tuple[float, float] | None:
    """The other engine's figure for this cell, or None where the conditions are not the same."""
    meta, args = result["meta"], result["args"]
    same = all(args.get(name) == PUBLISHED[name] for name in ("shape", "prompt_len", "new_tokens", "dtype"))
    if not same or PUBLISHED["device"] not in meta["device"]:
        return None
    return PUBLISHED["ms_and_tokens_per_second"].get(cell["system"], {}).get(cell["batch"])


def percent_of_floor(cell: dict[str, Any], which: str) -> float | None:
    floor, step = cell.get(which), cell.get("ms_per_step")
    return 100 * floor / step if floor and step else None


def _idle(cell: dict[str, Any]) -> str:
    profiled, between = cell.get("gpu_idle_fraction"), (cell.get("library_stats") or {}).get("gpu_idle_fraction")
    if between is not None:
        return f"{between:.1%} between rounds"
    return "–" if profiled is None else f"{max(0.0, profiled):.1%}"


def cells_table(result: dict[str, Any]) -> Table:
    header = [
        "batch", "system", "ms/step", "range", "tokens/s", "accept", "% bytes floor", "% linears floor", "GPU idle",
        "first token ms", "extra GiB", "same tokens", f"published: {PUBLISHED['engine']} ms (tok/s)",
    ]  # fmt: skip
    rows, notes = [], []
    for cell in sorted(result["cells"], key=lambda cell: cell["batch"]):  # systems side by side
        row = [str(cell["batch"]), cell["label"]]
        if cell["status"] != "ok":
            notes.append(f"[{len(notes) + 1}] {cell['system']}, batch {cell['batch']}: {cell['reason']}")
            row += [f"{cell['status']} [{len(notes)}]"] + ["–"] * 9
        else:
            low, high = cell["ms_per_step_range"]
            extra = cell.get("peak_extra_bytes")
            same = cell.get("same_tokens")
            row += [
                f"{cell['ms_per_step']:.3f}",
                f"{low:.3f}–{high:.3f} ({cell['repeats']})",
                f"{cell['tokens_per_second']:,.1f}",
                f"{cell['accept_length']:.2f}",
                _number(percent_of_floor(cell, "floor_bytes_ms"), ".0f"),
                _number(percent_of_floor(cell, "floor_linears_ms"), ".0f"),
                _idle(cell),
                f"{cell['first_token_ms']:.1f}",
                "–" if extra is None else f"{extra[0] / 2**30:.2f} / {extra[1] / 2**30:.2f}",
                "–" if same is None else "{}/{}".format(*same),
            ]
        other = published(result, cell)
        rows.append([*row, "–" if other is None else f"{other[0]:.2f} ({other[1]:,.0f})"])
    if any(row[-1] != "–" for row in rows):
        notes.append(f"published column: {PUBLISHED['source']}")
    if "floor_error" in result:
        notes.append(f"no floor: {result['floor_error']}")
    if "CPU" in result["meta"]["device"]:
        notes.append("on a CPU Hugging Face does not compile for a static cache by itself")
    if not any(row[-1] != "–" for row in rows):  # a column of dashes tells nothing
        header, rows = header[:-1], [row[:-1] for row in rows]
    return header, rows, notes


def starts_table(result: dict[str, Any]) -> Table:
    rows = [
        [
            s["label"],
            s["cache"],
            *(_number(s.get(k), ".1f") for k in ("first_token_s", "tokens_s")),
            s.get("error") or "",
        ]
        for s in result["starts"]
    ]
    header = ["start, fresh process, batch 1", "disk cache", "s to first token", "s to 16 tokens", "error"]
    return header, rows, ["from spec_compile() (for HF: generate()) with the model already on the device"]


def prompts_table(result: dict[str, Any]) -> Table:
    header = ["prompt", "quoted", "tokens", "plain tok/s", "ours tok/s", "ratio", "range", "best/best", "accept", "same output"]
    rows, notes = [], []
    for p in result["prompts"]:
        if "ratio" not in p:
            notes.append(f"{p['name']}: {p.get('error', 'not reached')}")
            rows.append([p["name"], "–", "–", "–", "–", "error", "–", "–", "–", "–"])
            continue
        rows.append([
            p["name"], f"{p['quoted_share']:.0%}", str(p["tokens"]), f"{p['plain']:.1f}", f"{p['ours']:.1f}",
            f"{p['ratio']:.2f}", "{:.2f}–{:.2f}".format(*p["ratio_range"]), f"{p['ratio_of_best']:.2f}",
            _number(p["accept_length"], ".2f"),
            "yes" if p["same_output"] else f"no, from token {p['first_difference']}",
        ])  # fmt: skip
    for line in result.get("acceptance", []):
        notes.append(line)
    return header, rows, notes


def tables(result: dict[str, Any]) -> list[Table]:
    made = ((cells_table, "cells"), (starts_table, "starts"), (prompts_table, "prompts"))
    return [make(result) for make, key in made if result.get(key)]


def title(result: dict[str, Any]) -> str:
    meta, args = result["meta"], result["args"]
    weights = "RANDOM WEIGHTS" if meta["random_weights"] else "real weights"
    lengths = f"prompt {args['prompt_len']}, {args['new_tokens']} new tokens" if result.get("cells") else ""
    return ", ".join(part for part in (args["shape"], weights, args["dtype"], lengths, meta["device"]) if part)


def origin(result: dict[str, Any]) -> str:
    meta, floor = result["meta"], result.get("floor")
    names = ("date", "commit", "torch", "transformers", "triton", "driver", "attention", "load_average")
    text = ", ".join(f"{name} {meta[name]}" for name in names if meta.get(name))
    if floor:
        linears = ", ".join(f"M={m}: {ms:.2f}" for m, ms in floor["linears_ms"].items())
        text += f"; read bandwidth {floor['bandwidth']['bytes_per_second'] / 1e9:,.0f} GB/s"
        text += f"; linears alone ({floor['linears']}), ms: {linears}"
    return text


def progress(cell: dict[str, Any]) -> str:
    if "kind" in cell:  # of a prompt
        return f"{cell['name']}: " + (f"{cell['ratio']:.2f}×" if "ratio" in cell else cell["error"])
    figure = f"{cell['ms_per_step']:.3f} ms/step" if cell["status"] == "ok" else f"{cell['status']}: {cell['reason']}"
    return f"{cell['label']}, batch {cell['batch']}: {figure}"


def markdown(result: dict[str, Any]) -> str:
    lines = [f"**{title(result)}**", ""]
    for header, rows, notes in tables(result):
        lines += [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
        lines += ["", *(f"{note}  " for note in notes), ""]
    return "\n".join([*lines, origin(result)])


def show(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table as RichTable

    console = Console(width=None if os.environ.get("COLUMNS") else 200, highlight=False)
    console.print(escape(title(result)), style="bold")
    for header, rows, notes in tables(result):
        table = RichTable()
        for name in header:
            table.add_column(escape(name), justify="left" if name in _TEXT_COLUMNS else "right", overflow="fold")
        for row, following in zip(rows, [*rows[1:], None], strict=True):
            ends = following is not None and header[0] == "batch" and following[0] != row[0]
            table.add_row(*map(escape, row), end_section=ends)
        console.print(table)
        for note in notes:
            console.print(escape(note))
    console.print(escape(origin(result)))


def plot(result: dict[str, Any], path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5))
    for axis, key, name in zip(axes, ("ms_per_step", "tokens_per_second"), ("ms a step", "tokens/s"), strict=True):
        cells = [cell for cell in result["cells"] if cell["status"] == "ok"]
        for label in dict.fromkeys(cell["label"] for cell in cells):
            points = sorted((cell["batch"], cell[key]) for cell in cells if cell["label"] == label)
            axis.plot(*zip(*points, strict=True), marker="o", label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        ticks = sorted({cell["batch"] for cell in cells})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set(xlabel="batch", ylabel=name)
        axis.grid(True, which="both", alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.suptitle(title(result), fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--plot", metavar="PNG")
    options = parser.parse_args()
    result = read(options.json)
    print(markdown(result))
    if options.plot and result.get("cells"):
        plot(result, options.plot)


if __name__ == "__main__":
    main()
