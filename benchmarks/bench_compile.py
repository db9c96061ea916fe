"""torch.compile's ways to compile a model's forward, backend="spec_compile" among them: compile time, graphs, step time.

    bench_compile.py --shape llama-3.1-8b --device cuda --json compile.json      # every way, cold and warm
    bench_compile.py --shape smollm2 --device cpu --json compile.json            # a real model; ways that a CPU has
    bench_compile.py --shape tiny --device cpu --systems inductor spec_compile   # a smoke test
    bench_compile.py --show compile.json                                         # its table as markdown

Each way runs in two fresh processes with a private disk cache of Inductor and Triton, empty in the first (cold) and full in the
second (warm). Both compile (a) the decode step over a static cache, as transformers' generate() does, and time it; (b) the
forward over prompts of changing batches and lengths, counting the graphs that they make. No speculation anywhere.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import shapes
import torch
from report import describe, environment, read, save, settings
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn


@dataclass(frozen=True)
class System:
    """Arguments of ``torch.compile``; ``backend`` None leaves the forward as it is."""

    name: str
    backend: str | None
    mode: str | None = None

    def compiled(self, call: Callable) -> Callable:
        return call if self.backend is None else torch.compile(call, backend=self.backend, mode=self.mode)


SYSTEMS = {
    system.name: system
    for system in (
        System("eager", None),
        System("inductor", "inductor"),
        System("spec_compile", "spec_compile"),
        System("reduce-overhead", "inductor", "reduce-overhead"),
        System("spec_compile reduce-overhead", "spec_compile", "reduce-overhead"),
        System("max-autotune", "inductor", "max-autotune"),
        System("spec_compile max-autotune", "spec_compile", "max-autotune"),
    )
}
ON_A_CPU = ["eager", "inductor", "spec_compile"]  # the modes are about CUDA graphs and GPU kernels


def parse_shape(text: str) -> tuple[int, int]:
    """``"2x70"``: batch and length of prompts."""
    rows, _, length = text.partition("x")
    if not (rows.isdigit() and length.isdigit() and int(rows) and int(length)):
        raise argparse.ArgumentTypeError(f"{text!r}: a prompt shape is BATCHxLENGTH, as in 2x70")
    return int(rows), int(length)


# ----------------------------------------------------------------------------------------------------------------------
# One way, in a process of its own


def graphs_so_far() -> tuple[int, int]:
    """Graphs that Dynamo has compiled in this process, and breaks between them."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def timed(call: Callable[[], Tensor], device: str) -> tuple[float, Tensor]:
    """Seconds of one call, and a copy of its result, which a CUDA graph would overwrite."""
    shapes.sync(device)
    begin = time.perf_counter()
    out = call().clone()
    shapes.sync(device)
    return time.perf_counter() - begin, out


def decode_step(model: nn.Module, system: System, args: argparse.Namespace) -> dict[str, Any]:
    """The forward of one token a row behind a prompt in a static cache."""
    from transformers import StaticCache

    ids = shapes.random_prompts(model.config.vocab_size, args.batch, args.prompt_len, args.device)["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=args.prompt_len + 64)
    model(input_ids=ids, past_key_values=cache)  # uncompiled, as in generate()
    position = torch.full((args.batch, 1), args.prompt_len, device=args.device)
    compiled = system.compiled(model.forward)

    def forward(call: Callable) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        for layer in cache.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length.fill_(args.prompt_len)  # the same step again
        return call(input_ids=ids[:, :1], position_ids=position, past_key_values=cache).logits

    _, own = timed(lambda: forward(model.forward), args.device)
    first, out = timed(lambda: forward(compiled), args.device)
    for _ in range(3):  # CUDA graphs are recorded in the second call
        timed(lambda: forward(compiled), args.device)
    graphs, breaks = graphs_so_far()
    return {
        "decode_compile_s": first,
        "decode_ms": shapes.median_ms(lambda: forward(compiled), args.device, args.repeats),
        "decode_graphs": graphs,
        "decode_breaks": breaks,
        "decode_difference": float((out.float() - own.float()).abs().max()),
    }


def changing_prompts(model: nn.Module, system: System, args: argparse.Namespace) -> dict[str, Any]:
    """The forward over whole prompts, one shape behind the other."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = system.compiled(model.forward)
    seconds, graphs, difference = [], [], 0.0
    for rows, length in args.prompts:
        ids = shapes.random_prompts(model.config.vocab_size, rows, length, args.device)["input_ids"]
        torch.compiler.cudagraph_mark_step_begin()
        took, out = timed(lambda ids=ids: compiled(input_ids=ids, use_cache=False).logits, args.device)
        own = model.forward(input_ids=ids, use_cache=False).logits
        difference = max(difference, float((out.float() - own.float()).abs().max()))
        seconds.append(took)
        graphs.append(graphs_so_far()[0])
    rows, length = args.prompts[0]
    ids = shapes.random_prompts(model.config.vocab_size, rows, length, args.device)["input_ids"]
    repeats = max(3, args.repeats // 4)
    return {
        "prompt_compile_s": seconds[0],
        "prompt_further_s": sum(seconds[1:]),
        "prompt_graphs": graphs,
        "prompt_breaks": graphs_so_far()[1],
        "prompt_ms": shapes.median_ms(lambda: compiled(input_ids=ids, use_cache=False).logits, args.device, repeats),
        "prompt_difference": difference,
    }


@torch.no_grad()
def child(args: argparse.Namespace) -> None:
    system, dtype = SYSTEMS[args.child], getattr(torch, args.dtype)
    if shapes.SHAPES[args.shape].config is None:
        model, _ = shapes.load_real(dtype, args.device)
    else:
        model = shapes.build_random(args.shape, dtype, args.device)
    figures = decode_step(model, system, args)
    print(json.dumps(figures | changing_prompts(model, system, args)))


# ----------------------------------------------------------------------------------------------------------------------
# All ways


def run(args: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {
        "meta": {**environment(args.device), "random_weights": shapes.SHAPES[args.shape].config is not None},
        "args": settings(args),
        "rows": [],
    }
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("compiling", total=2 * len(args.systems))
        for name in args.systems:
            with tempfile.TemporaryDirectory() as folder:
                for state in ("cold", "warm"):
                    progress.update(bar, description=f"{name}, {state}")
                    row = {"system": name, "cache": state} | run_child(name, Path(folder), args)
                    result["rows"].append(row)
                    save(result, args.json)
                    progress.advance(bar)
                    if not console.is_terminal:
                        print(line(row), file=sys.stderr, flush=True)
    return result


def run_child(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one process; what went wrong, where it did."""
    private = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}
    command = [sys.executable, __file__, "--child", name, "--shape", args.shape, "--device", args.device]
    command += ["--dtype", args.dtype, "--batch", str(args.batch), "--prompt-len", str(args.prompt_len)]
    command += ["--repeats", str(args.repeats), "--prompts", *(f"{rows}x{length}" for rows, length in args.prompts)]
    try:
        done = subprocess.run(
            command, env=os.environ | private, capture_output=True, text=True, timeout=args.child_budget, check=False
        )
        lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
        return json.loads(lines[-1]) if done.returncode == 0 else {"error": lines[-1][:300]}
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"error": describe(error)}


# ----------------------------------------------------------------------------------------------------------------------
# Printing


def line(row: dict[str, Any]) -> str:
    what = f"{row['system']}, {row['cache']}"
    if "error" in row:
        return f"{what}: {row['error']}"
    return f"{what}: decode compiled in {row['decode_compile_s']:.1f} s, {row['decode_ms']:.2f} ms a step"


def markdown(result: dict[str, Any]) -> str:
    meta, args = result["meta"], result["args"]
    weights = "RANDOM WEIGHTS" if meta["random_weights"] else "real weights"
    names = [
        "torch.compile", "decode: compile s, cold / warm", "graphs (breaks)", "ms a step", "prompts: compile s, cold / warm",
        "further shapes: graphs, s cold / warm", "ms a forward", "largest difference",
    ]  # fmt: skip
    lines = [
        f"**{args['shape']}, {weights}, {args['dtype']}, batch {args['batch']}, prompt {args['prompt_len']}, {meta['device']}**"
    ]
    lines += ["", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    notes = []
    for name in dict.fromkeys(row["system"] for row in result["rows"]):
        pair = {row["cache"]: row for row in result["rows"] if row["system"] == name}
        notes += [f"{name}, {state}: {row['error']}" for state, row in pair.items() if "error" in row]
        lines.append(f"| {' | '.join([name, *_cells(pair)])} |")
    origin = ("date", "commit", "torch", "transformers", "triton", "driver", "load_average")
    shown = ", ".join(f"{rows} × {length}" for rows, length in args["prompts"])
    notes += [
        "decode: one token a row behind the prompt in a static cache, compiled as generate() does; prompts: whole forwards "
        f"without a cache, shapes {shown}, the forward timed is the first; times of steps and forwards are the warm process'",
        ", ".join(f"{key} {meta[key]}" for key in origin if meta.get(key) is not None),
    ]  # fmt: skip
    return "\n".join([*lines, "", *(f"{note}  " for note in notes)])


def _cells(pair: dict[str, dict[str, Any]]) -> list[str]:
    """Of one way: a dash where a process failed."""

    def both(key: str) -> str:
        return " / ".join(
            "–" if (value := pair.get(state, {}).get(key)) is None else f"{value:.1f}" for state in ("cold", "warm")
        )

    row = next((pair[state] for state in ("warm", "cold") if "error" not in pair.get(state, {"error": ""})), None)
    if row is None:
        return [both("decode_compile_s"), *["–"] * 6]
    return [
        both("decode_compile_s"),
        f"{row['decode_graphs']} ({row['decode_breaks']})",
        f"{row['decode_ms']:.2f}",
        both("prompt_compile_s"),
        f"{row['prompt_graphs'][-1] - row['prompt_graphs'][0]}, {both('prompt_further_s')}",
        f"{row['prompt_ms']:.2f}",
        f"{max(row['decode_difference'], row['prompt_difference']):.2g}",
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="llama-3.1-8b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", help="bfloat16 on a GPU, float32 on a CPU unless given")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), help="on a CPU the first three unless given")
    parser.add_argument("--batch", type=int, default=1, help="rows of the decode step")
    parser.add_argument("--prompt-len", type=int, default=512, help="tokens in front of the decode step")
    parser.add_argument(
        "--prompts", nargs="+", type=parse_shape, metavar="BxN", help="shapes of whole forwards, in order",
        default=[(1, 128), (1, 192), (1, 500), (2, 256), (4, 200), (8, 100)],
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--child-budget", type=float, default=900, help="seconds a process may take")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--show", metavar="FILE", help="measure nothing, print the table of an earlier run")
    parser.add_argument("--child", choices=list(SYSTEMS), help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    cuda = args.device.startswith("cuda")
    args.dtype = args.dtype or ("bfloat16" if cuda else "float32")
    args.systems = args.systems or (list(SYSTEMS) if cuda else ON_A_CPU)
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.child:
        child(args)
    else:
        print(markdown(read(args.show) if args.show else run(args)))


if __name__ == "__main__":
    main()
