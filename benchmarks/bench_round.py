"""Whole rounds of one model shape with an EAGLE-3-shaped head: time, idle, memory, and every part against its floor.

    bench_round.py --shape llama-3.1-8b --json round.json --seconds 400              # the most important cells first
    bench_round.py --shapes 5/1/6 none --batches 1 8 --contexts 512 --json a.json    # a part of the grid
    bench_round.py --merge a.json b.json --json round.json --plot round              # one table of several runs
    bench_round.py --adaptive-grid --json adaptive.json                              # adaptive against off and fixed
    bench_round.py --shape tiny --device cpu --compile none                          # a smoke test

RANDOM WEIGHTS, and acceptance is SIMULATED: rounds are timed at an accept length of 4.0 and hardly depend on it (cells with
a budget are timed at the others too). Prompts are not computed: rows begin behind random keys and values. Everything else is
``generate()``'s own loop: its launches, its copies to the host, one round behind. README.md says what each column means.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import floors
import round_cells
import round_plots
import round_report
import shapes
import torch
from report import describe, environment, exit_if_plain, read, save, settings
from round_adaptive import run_adaptive
from round_cells import BATCHES, CHAIN, CONTEXTS, PARTS, Cell, Stage, accept_lengths, grid, in_order, label, parse_rounds
from round_parts import kernels, launch_ms, measure_parts
from torch import nn

from spec_compile.config import RoundShape, SpecConfig
from spec_compile.drafts.eagle import EagleDraft
from spec_compile.drafts.head_runner import HeadRunner
from spec_compile.errors import SpecCompileError
from spec_compile.hardware import Hardware, detect_hardware
from spec_compile.runtime.decode import Timing, decode
from spec_compile.runtime.engine import Engine, Request
from spec_compile.runtime.model_runner import ModelRunner
from spec_compile.runtime.options import RuntimeOptions
from spec_compile.runtime.program import SegmentCompiler
from spec_compile.runtime.state import DecodeState, SamplingPlan

ROOM = 256  # new tokens that a row may get
FIRST = 3  # rounds of a run that are not timed: the host has not run ahead yet
PLAN = SamplingPlan()


class FilledEngine(Engine):
    """An engine for prompts that nobody computed: rows begin behind whatever their caches hold."""

    def _prefill(self, state: DecodeState, request: Request) -> None:
        state.cache_len[: len(request.prompts)] += 1  # the first new token is the root


@dataclass
class Bench:
    """The model, its head and what runs them; programs are built once and shared by all engines.

    Attributes:
        plain: the target without taps, for rounds that draft nothing.
        target: the same with the head's taps.
    """

    args: argparse.Namespace
    model: nn.Module
    head: nn.Module
    hardware: Hardware
    compiler: SegmentCompiler
    plain: ModelRunner
    target: ModelRunner
    draft: HeadRunner

    @classmethod
    def build(cls, args: argparse.Namespace) -> Bench:
        hardware = detect_hardware(args.device)
        model = shapes.build_random(args.shape, getattr(torch, args.dtype), args.device)
        head = shapes.random_head(args.shape, model)
        compiler = SegmentCompiler(args.compile, hardware)
        options = RuntimeOptions(hardware, compiler, backend=args.backend, page_size=SpecConfig.page_size)
        return cls(
            args, model, head, hardware, compiler,
            ModelRunner(model, "verify", options), ModelRunner(model, "verify", options, head.taps), HeadRunner(head, options),
        )  # fmt: skip

    @property
    def weights(self) -> int:
        return floors.distinct_bytes([self.model, self.head])

    def engine(self, rounds: RoundShape) -> FilledEngine:
        """An engine of such rounds, without a pool; the pools of others are dropped, so no two may live at once."""
        for runner in (self.plain, self.target, self.draft):
            runner.programs.drop_pool()
        shapes.reset_peaks()
        config = SpecConfig(adaptive=False, compile=self.args.compile, progress=False)
        if rounds.num_steps == 0:
            return FilledEngine(self.plain, None, config)
        config = SpecConfig(
            num_steps=rounds.num_steps, topk=rounds.topk, num_draft_tokens=rounds.num_draft_tokens, adaptive=False,
            compile=self.args.compile, progress=False, simulate_accept_length=1.0,
        )  # fmt: skip
        source = EagleDraft(self.draft, rounds, self.model.config.vocab_size)
        return FilledEngine(self.target, source, config)


# ----------------------------------------------------------------------------------------------------------------------
# Rounds


def fill_caches(engine: Engine) -> None:
    """Random keys, values and states: zeros would need less power than real ones, and the clocks would show it."""
    for programs in engine.programs():
        for cache in programs.pool.caches.values():
            cache.normal_()
        if programs.states is not None:
            programs.states.state.normal_()
            programs.states.conv.normal_()
    if engine.draft is not None:
        engine.draft.level_logits.normal_()
        engine.draft.level_states.normal_()


def request_of(engine: Engine, batch: int, context: int) -> Request:
    """Prompts of ``context`` random tokens, the same in every row."""
    vocabulary = engine.target.model.config.vocab_size
    prompt = torch.randint(3, vocabulary, (context,), generator=torch.Generator().manual_seed(0))
    return Request(
        prompts=[prompt] * batch, end_len=[context + ROOM] * batch, min_len=[0] * batch, eos_ids=[], seed=list(range(batch)),
        plan=PLAN,
    )  # fmt: skip


def simulate(engine: Engine, accept: float) -> None:
    """Decree another mean accept length; the captured rounds read the rates from this tensor."""
    if engine._rates is not None:
        config = SpecConfig(simulate_accept_length=accept)
        engine._rates.copy_(torch.tensor(config.simulated_rates(engine.shape.num_steps)))


def drive(engine: Engine, request: Request, rounds: int) -> tuple[list[float], float | None, float]:
    """Decode ``rounds`` rounds as ``generate()`` does: milliseconds of each, GPU idle share, tokens a row and round.

    A round's milliseconds go from its start to the next one's start on the device, waits for the host included.
    """
    timing, emitted, times = Timing(), [], []
    loop = decode(engine, request, timing)
    next(loop)  # what prefill would have given
    begin = time.perf_counter()
    for result in itertools.islice(loop, rounds):
        emitted.append(statistics.mean(map(len, result.tokens)))
        times.append((time.perf_counter() - begin) * 1e3)
        begin = time.perf_counter()
    loop.close()
    times = timing.round_milliseconds() or times
    return times[min(FIRST, rounds - 1) :], timing.idle_fraction(), statistics.mean(emitted)


def measure(engine: Engine, cell: Cell, args: argparse.Namespace, every_length: bool) -> dict[str, Any]:
    """Times of one cell; at every accept length if asked, else at the one of the cell."""
    request = request_of(engine, cell.batch, cell.context)
    begin = time.perf_counter()
    simulate(engine, cell.accept)
    drive(engine, request, 2)  # compiles and captures
    if engine.hardware.is_cuda and engine.graphs is None:
        raise RuntimeError("the round could not be captured as a CUDA graph; see the log")
    row: dict[str, Any] = {"setup_seconds": time.perf_counter() - begin, "accept": cell.accept}

    def at(accept: float, passes: int) -> dict[str, Any]:
        simulate(engine, accept)
        rounds = min(args.rounds, int((ROOM - 8) / accept))  # no row may reach its end
        runs = [drive(engine, request, rounds) for _ in range(passes)]
        times = sorted(ms for run in runs for ms in run[0])
        idle = [run[1] for run in runs if run[1] is not None]
        return {
            "ms": statistics.median(times),
            "ms_range": [times[len(times) // 10], times[-1 - len(times) // 10]],
            "timed": len(times),
            "idle": statistics.median(idle) if idle else None,
            "accept_measured": statistics.mean(run[2] for run in runs),
        }

    row |= at(cell.accept, args.passes)
    others = [accept for accept in accept_lengths(cell.rounds) if accept != cell.accept] if every_length else []
    row["at_accept"] = {str(accept): at(accept, 1) for accept in others if cell.rounds.num_steps}
    simulate(engine, cell.accept)
    return row


def memory(engine: Engine, weights: int) -> dict[str, Any]:
    """Bytes beyond weights and KV pools that stay allocated and reserved, and what the driver holds besides."""
    gc.collect()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    known, reserved = weights + engine.kv_bytes(), torch.cuda.memory_reserved()
    return {
        "buckets": sorted(key[0] for key in engine.graphs.rounds) if engine.graphs is not None else [],
        "extra_allocated": torch.cuda.memory_allocated() - known,
        "extra_reserved": reserved - known,
        "driver": total - free - reserved,  # the context, loaded kernels and the graphs' nodes
        "graphs": sum(size for _, size in engine.captured()),
        "kv_bytes": engine.kv_bytes(),
    }


# ----------------------------------------------------------------------------------------------------------------------
# A run


class Run:
    """One process's share of the grid, saved after every cell."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.deadline = args, time.monotonic() + args.seconds
        self.stages = in_order(grid(args.shapes, args.batches, args.contexts), args.shape)
        told = settings(args) | {"shapes": [label(rounds) for rounds in args.shapes]}
        self.result: dict[str, Any] = {"meta": {**environment(args.device), "random_weights": True}, "args": told}
        self.result["rows"] = [
            {"rounds": label(cell.rounds), "batch": cell.batch, "context": cell.context, "status": "not reached"}
            for stage in self.stages
            for cell in stage.cells
        ]

    def row(self, cell: Cell) -> dict[str, Any]:
        key = (label(cell.rounds), cell.batch, cell.context)
        [row] = [row for row in self.result["rows"] if (row["rounds"], row["batch"], row["context"]) == key]
        return row

    def execute(self) -> dict[str, Any]:
        bench = Bench.build(self.args)
        self.result["build_seconds"] = self.args.seconds - (self.deadline - time.monotonic())
        wanted = [cell for stage in self.stages for cell in stage.cells if self.wants_parts(cell)]
        tokens = {cell.batch * cell.rounds.num_draft_tokens for cell in wanted}
        linears, how = floors.linears_alone(bench.model, tokens, self.args.device) if tokens else ({}, "not measured")
        self.result["floor"] = {
            "bandwidth": floors.read_bandwidth(self.args.device),
            "launch_ms": launch_ms(self.args.device),
            "linears": how,
            "linears_ms": {str(tokens): ms for tokens, ms in linears.items()},
        }
        shapes.reset_peaks()
        print(f"built after {self.result['build_seconds']:.0f} s", file=sys.stderr, flush=True)
        full = Stage(CHAIN if CHAIN in self.args.shapes else self.args.shapes[0], min(self.args.contexts), ())
        budgets = round_cells.BUDGETS.get(self.args.shape, {})
        last = max(  # of the stages that come before it
            number
            for number, stage in enumerate(self.stages)
            if (stage.rounds, stage.context) == (full.rounds, full.context) or any(cell in budgets for cell in stage.cells)
        )
        for number, stage in enumerate(self.stages):
            if time.monotonic() > self.deadline:
                break
            self.run_stage(bench, stage)
            if number == last and self.hardware_is_cuda and self.args.buckets:  # what it needs is compiled now
                self.measure_memory(bench, full)
        self.save(f"compiled for {bench.compiler.seconds:.0f} s")
        return self.result

    def wants_parts(self, cell: Cell) -> bool:
        return self.args.parts == "all" or (self.args.parts == "chosen" and cell in PARTS)

    def run_stage(self, bench: Bench, stage: Stage) -> None:
        left, engine = list(stage.cells), None
        while left and time.monotonic() < self.deadline:
            engine = engine or self.start(bench, stage, left)
            if engine is None:
                return
            cell = left.pop(0)
            row = self.row(cell)
            if row["status"] == "skipped":
                continue
            begin = time.perf_counter()
            try:
                with shapes.time_limit(self.args.cell_budget):
                    row |= measure(engine, cell, self.args, cell in round_cells.BUDGETS.get(self.args.shape, {}))
                    row["status"] = "ok"
                    if self.hardware_is_cuda:
                        row["memory"] = memory(engine, bench.weights)
                    if self.wants_parts(cell):
                        self.add_parts(engine, cell, row)
            except Exception as error:  # the others go on, with a fresh engine
                row.update(reason=describe(error), **({} if row["status"] == "ok" else {"status": "error"}))
                engine = None
            row["seconds"] = time.perf_counter() - begin
            self.save(round_report.line(row))

    @property
    def hardware_is_cuda(self) -> bool:
        return self.args.device.startswith("cuda")

    def start(self, bench: Bench, stage: Stage, cells: list[Cell]) -> FilledEngine | None:
        """An engine with room for the largest batch that fits; cells of larger ones are skipped by name."""
        engine = bench.engine(stage.rounds)
        for batch in sorted({cell.batch for cell in cells}, reverse=True):
            try:
                engine.reserve(engine.bucket(batch), stage.context + ROOM + engine.reach)
                fill_caches(engine)
                return engine
            except SpecCompileError as error:
                for cell in (cell for cell in cells if cell.batch == batch):
                    self.row(cell).update(status="skipped", reason=describe(error))
                    self.save(round_report.line(self.row(cell)))
        return None

    def add_parts(self, engine: Engine, cell: Cell, row: dict[str, Any]) -> None:
        request = request_of(engine, cell.batch, cell.context)
        state = engine.admit(request)
        if self.hardware_is_cuda:
            row["kernels"] = kernels(lambda: engine.launch(state, PLAN, engine.shape))
        state = engine.admit(request)
        row["parts"] = measure_parts(engine, state, PLAN, cell.context, self.result["floor"], self.args.device)

    def measure_memory(self, bench: Bench, stage: Stage) -> None:
        """Memory with the rounds of every bucket captured in one engine, largest first: what a user's process would hold."""
        buckets = sorted(self.args.buckets, reverse=True)
        engine = bench.engine(stage.rounds)
        try:
            engine.reserve(engine.bucket(buckets[0]), stage.context + ROOM + engine.reach)
            for batch in buckets:
                with shapes.time_limit(self.args.cell_budget):
                    drive(engine, request_of(engine, batch, stage.context), 2)
            self.result["memory"] = {"rounds": label(stage.rounds), "context": stage.context} | memory(engine, bench.weights)
        except Exception as error:
            self.result["memory_error"] = describe(error)
        self.save(f"memory of buckets {buckets}: {self.result.get('memory_error', 'measured')}")

    def save(self, message: str) -> None:
        save(self.result, self.args.json)
        print(f"[{self.args.seconds - (self.deadline - time.monotonic()):4.0f} s] {message}", file=sys.stderr, flush=True)


# ----------------------------------------------------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=[name for name, shape in shapes.SHAPES.items() if shape.config], default="llama-3.1-8b")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", help="default: bfloat16 on CUDA, float32 on a CPU")
    add("--shapes", nargs="+", type=parse_rounds, default=[parse_rounds(s) for s in ("none", "5/1/6", "5/4/8", "6/10/32")])
    add("--batches", nargs="+", type=int, default=sorted(BATCHES))
    add("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    add("--buckets", nargs="*", type=int, help="batches captured together for the memory figure; default: --batches")
    add("--parts", choices=("chosen", "all", "none"), default="chosen", help="cells whose parts are timed")
    add("--rounds", type=int, default=40, help="rounds of a pass, fewer where rows would reach their ends")
    add("--passes", type=int, default=2)
    add("--seconds", type=float, default=400, help="no cell is begun later")
    add("--cell-budget", type=float, default=120, help="seconds a cell may take, compiling included")
    add("--backend", default="auto")
    add("--compile", choices=["inductor", "none"], default="inductor")
    add("--adaptive-grid", action="store_true", help="measure adaptive rounds against none and fixed ones instead")
    add("--rates", nargs="+", type=float, default=[0.05, 0.3, 0.6, 0.9], help="of the adaptive grid, per draft position")
    add("--new-tokens", type=int, default=192, help="of the adaptive grid")
    add("--merge", nargs="+", metavar="JSON", help="measure nothing, join these results")
    add("--show", metavar="JSON", help="measure nothing, print the tables of an earlier run")
    add("--json")
    add("--plot", metavar="PREFIX", help="writes PREFIX-time.png, PREFIX-tokens.png, PREFIX-parts.png")
    args = parser.parse_args(arguments)
    args.buckets = args.batches if args.buckets is None else args.buckets
    args.dtype = args.dtype or ("bfloat16" if args.device.startswith("cuda") else "float32")
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    if args.show or args.merge:
        result = round_report.merge([read(name) for name in args.merge or [args.show]])
        save(result, args.json)
    else:
        with torch.inference_mode(False), torch.no_grad():
            result = run_adaptive(args) if args.adaptive_grid else Run(args).execute()
    print(round_report.markdown(result))
    if args.plot:
        round_plots.plot(result, args.plot)
    exit_if_plain(result)


if __name__ == "__main__":
    main()
