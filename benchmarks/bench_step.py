"""The whole verify forward of one model shape, per attention provider, against the floor of its linears alone.

    bench_step.py --shape llama-3.1-8b --json step.json                        # every provider, the steps with a budget
    bench_step.py --shape llama-3.1-8b --providers fa4 triton --steps 1x8@2048 8x8@4096
    bench_step.py --shape tiny --device cpu --providers torch --steps 2x4@48   # a smoke test

A step BxN@C verifies windows of N tokens for B rows that have C committed tokens each: the library's own window program,
captured in a CUDA graph and replayed. RANDOM WEIGHTS, random keys and values: the time of a dense model does not depend on
them. Beside each time stand, from the same process: the same compiled segments with the attention ops taken out; all linear
layers alone; and weights and keys and values over the read bandwidth.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import floors
import shapes
import torch
from report import describe, environment, save, settings
from torch import nn

from spec_compile.errors import SpecCompileError
from spec_compile.hardware import detect_hardware
from spec_compile.ops import providers
from spec_compile.passes.graph import fake
from spec_compile.passes.node_description import provided_nodes
from spec_compile.runtime.model_runner import ModelRunner
from spec_compile.runtime.options import RuntimeOptions
from spec_compile.runtime.program import SegmentCompiler, StageProgram

PAGE_SIZE = 64
LINEARS_SHARE = 1.25  # of linears + keys and values, where a budget is relative


@dataclass(frozen=True)
class Step:
    """Windows of ``tokens`` tokens for ``batch`` rows of ``context`` committed tokens."""

    batch: int
    tokens: int
    context: int

    @classmethod
    def parse(cls, text: str) -> Step:
        match = re.fullmatch(r"(\d+)x(\d+)@(\d+)", text)
        if match is None:
            raise argparse.ArgumentTypeError(f"{text!r}: a step is BATCHxTOKENS@CONTEXT, as in 1x8@2048")
        return cls(*map(int, match.groups()))

    @property
    def capacity(self) -> int:
        """Slots a row, as the library would reserve for this context: the next power of two."""
        return max(PAGE_SIZE, 1 << (self.context + self.tokens - 1).bit_length())

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens}@{self.context}"


# Most milliseconds of a step on an H200; None: LINEARS_SHARE times the linears' floor plus the time to read keys and values.
BUDGETS = {
    ("llama-3.1-8b", Step(1, 8, 2048)): 4.8,
    ("llama-3.1-8b", Step(1, 8, 16384)): 5.3,
    ("llama-3.1-8b", Step(32, 4, 2048)): None,
}


def without_attention(program: StageProgram, runner: ModelRunner) -> StageProgram:
    """The same segments, with a constant of the right shape where each attention op's output was: no kernel runs for it."""
    graph = program.graph.copy()
    constants: dict[tuple, str] = {}
    for node in provided_nodes(graph):
        value = fake(node)
        shape = tuple(value.shape)
        if shape not in constants:
            constants[shape] = f"no_attention_{len(constants)}"
            graph.gm.register_buffer(constants[shape], torch.randn(shape, dtype=value.dtype, device=runner.device))
        with graph.gm.graph.inserting_before(node):
            constant = graph.gm.graph.get_attr(constants[shape])
        node.replace_all_uses_with(constant)
        graph.gm.graph.erase_node(node)
    graph.gm.recompile()
    bare = StageProgram(program.graph)
    bare.install(graph)
    bare.bind(runner.programs.pool.caches)
    return bare


def step_inputs(runner: ModelRunner, step: Step) -> dict[str, torch.Tensor]:
    """Random windows behind full contexts."""
    device, vocabulary = runner.device, runner.model.config.vocab_size
    cache_len = torch.full((step.batch,), step.context, dtype=torch.int32, device=device)
    return {
        "input_ids": torch.randint(vocabulary, (step.batch, step.tokens), device=device),
        "position_ids": cache_len[:, None].long() + torch.arange(step.tokens, device=device),
        "page_table": runner.programs.pool.page_table[: step.batch],
        "cache_len": cache_len,
    }


def step_ms(call: Callable[[], object], device: str, repeats: int) -> float:
    """Milliseconds of a call: replayed as a CUDA graph on a GPU."""
    if not device.startswith("cuda"):
        return shapes.median_ms(call, device, min(repeats, 5))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compiles, and builds what may not be built in a capture
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return shapes.median_ms(graph.replay, device, repeats)


def measure(runner: ModelRunner, step: Step, args: argparse.Namespace) -> dict[str, Any]:
    """Times of one step with the runner's provider, and of its segments without attention."""
    runner.programs.drop_pool()  # each step reserves what it needs, no more
    runner.programs.reserve(step.batch, step.capacity)
    for cache in runner.programs.pool.caches.values():
        cache.normal_()
    program = runner.window_program(step.batch, step.tokens, argmax=True)
    inputs = step_inputs(runner, step)
    took = [step_ms(lambda: program(**inputs), args.device, args.repeats)]
    bare = without_attention(program, runner)
    segments = step_ms(lambda: bare(**inputs), args.device, args.repeats)
    took.append(step_ms(lambda: program(**inputs), args.device, args.repeats))  # again: the difference is noise
    [choices] = [c for name, c in runner.programs.choices.items() if name != "prefill"]
    return {
        "status": "ok",
        "ms": statistics.mean(took),
        "ms_each": took,
        "segments_ms": segments,
        "chosen": sorted({choice.provider for choice in choices}),
        "versions": {choice.provider: providers.load(choice.provider).probe().version for choice in choices},
    }


def step_floors(model: nn.Module, steps: list[Step], device: str) -> dict[str, Any]:
    """Read bandwidth, and by step: linears alone, and milliseconds of reading weights, keys and values."""
    bandwidth = floors.read_bandwidth(device)
    linears, how = floors.linears_alone(model, [step.batch * step.tokens for step in steps], device)
    gc.collect()
    per_second = bandwidth["bytes_per_second"]
    weights = floors.weight_bytes_read(model) / per_second * 1e3
    kv = {str(step): step.batch * step.context * floors.kv_bytes_per_token(model) / per_second * 1e3 for step in steps}
    alone = {str(step): linears[step.batch * step.tokens] for step in steps}
    return {"bandwidth": bandwidth, "linears": how, "linears_ms": alone, "weights_ms": weights, "kv_ms": kv}


def judge(row: dict[str, Any], floor: dict[str, Any], shape: str, step: Step) -> dict[str, Any]:
    """The budget of a measured row, if it has one, and whether it was kept.

    A relative budget is judged by both readings of "linears alone": GEMMs only, and the compiled segments without attention.
    """
    if (shape, step) not in BUDGETS or row["status"] != "ok":
        return {}
    most, kv = BUDGETS[shape, step], floor["kv_ms"][str(step)]
    if most is not None:
        return {"budget_ms": most, "verdict": "pass" if row["ms"] <= most else "MISS"}
    strict = LINEARS_SHARE * (floor["linears_ms"][str(step)] + kv)
    segments = LINEARS_SHARE * (row["segments_ms"] + kv)
    verdict = (
        "pass" if row["ms"] <= strict else "pass with norms and activations in the floor" if row["ms"] <= segments else "MISS"
    )
    return {"budget_ms": strict, "budget_segments_ms": segments, "verdict": verdict}


def run(args: argparse.Namespace) -> dict[str, Any]:
    hardware = detect_hardware(args.device)
    model = shapes.build_random(args.shape, getattr(torch, args.dtype), args.device)
    result: dict[str, Any] = {
        "meta": {**environment(args.device), "random_weights": True},
        "args": settings(args) | {"steps": [str(step) for step in args.steps]},
        "floor": step_floors(model, args.steps, args.device),
        "rows": [],
    }
    compiler = SegmentCompiler(args.compile, hardware)  # shared: segments do not depend on the provider
    for name in args.providers:
        runner: ModelRunner | None = None
        for step in args.steps:
            row: dict[str, Any] = {"provider": name, "step": str(step), "status": "error"}
            begin = time.perf_counter()
            try:
                with shapes.time_limit(args.cell_budget):
                    options = RuntimeOptions(hardware, compiler, backend={"verify": name}, page_size=PAGE_SIZE)
                    runner = runner or ModelRunner(model, "verify", options)
                    row |= measure(runner, step, args)
            except SpecCompileError as error:
                row |= {"status": "refused", "reason": describe(error)}
            except Exception as error:  # the other providers go on
                row |= {"reason": describe(error)}
            row |= judge(row, result["floor"], args.shape, step)
            row["seconds"] = time.perf_counter() - begin
            result["rows"].append(row)
            print(line(row), flush=True)
            save(result, args.json)
        del runner
        shapes.reset_peaks()
    return result


# ----------------------------------------------------------------------------------------------------------------------
# Printing


def line(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['provider']} {row['step']}: {row['status']}: {row['reason']}"
    return f"{row['provider']} {row['step']}: {row['ms']:.3f} ms, without attention {row['segments_ms']:.3f} ms"


def markdown(result: dict[str, Any]) -> str:
    """The table, and what it was measured on."""
    meta, floor = result["meta"], result["floor"]
    lines = [
        f"**{result['args']['shape']}, RANDOM WEIGHTS, {result['args']['dtype']}, verify forward, {meta['device']}**",
        "",
        "| step (batch x tokens @ context) | backend | ran | ms | without attention | linears alone | weights read | KV read "
        "| budget | verdict |",
        "|" + "---|" * 10,
    ]
    for row in result["rows"]:
        step = row["step"]
        alone = f"{floor['linears_ms'][step]:.3f} | {floor['weights_ms']:.3f} | {floor['kv_ms'][step]:.3f}"
        if row["status"] != "ok":
            lines.append(f"| {step} | {row['provider']} | {row['status']} | – | – | {alone} | – | {row['reason']} |")
            continue
        budget = f"{row['budget_ms']:.2f}" if "budget_ms" in row else "–"
        budget += f" ({row['budget_segments_ms']:.2f})" if "budget_segments_ms" in row else ""
        lines.append(
            f"| {step} | {row['provider']} | {', '.join(row['chosen'])} | {row['ms']:.3f} | {row['segments_ms']:.3f} | {alone} "
            f"| {budget} | {row.get('verdict', '–')} |"
        )
    names = ("date", "commit", "torch", "transformers", "triton", "driver")
    origin = ", ".join(f"{name} {meta[name]}" for name in names if meta.get(name))
    bandwidth = floor["bandwidth"]["bytes_per_second"] / 1e12
    share = (
        f"a relative budget is {LINEARS_SHARE} × (linears alone + KV read), in brackets with the segments in the linears' place"
    )
    return "\n".join([*lines, "", f"Linears {floor['linears']}; read bandwidth {bandwidth:.2f} TB/s; {share}.", "", origin])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape",
        choices=[name for name, shape in shapes.SHAPES.items() if shape.family == "llama" and shape.config],
        default="llama-3.1-8b",
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--providers", nargs="+", default=["fa4", "flashinfer", "triton", "auto"])
    budgeted = [step for shape, step in BUDGETS if shape == "llama-3.1-8b"]
    parser.add_argument("--steps", nargs="+", type=Step.parse, default=budgeted, metavar="BxN@C")
    parser.add_argument("--compile", choices=["inductor", "none"], default="inductor")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument(
        "--cell-budget", type=float, default=150, help="seconds a provider may take for a step, compiling included"
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--show", metavar="FILE", help="measure nothing, print the table of an earlier run")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.show:
        with open(args.show) as file:
            print(markdown(json.load(file)))
        return
    print(markdown(run(args)))


if __name__ == "__main__":
    main()
