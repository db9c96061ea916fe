"""The parts of a round: each program and op that one real round called, replayed alone as a CUDA graph, next to its floor.

A round is run once while every call of a stage program and of one of the library's ops outside of programs is written down
with its arguments; the calls of one name, replayed one behind another, are a part. So parts have the round's own programs,
ops and shapes, and a round that is built differently tomorrow shows other parts. What is left of the round's time is glue:
small tensor operations between the parts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import floors
import torch
from bench_step import step_ms
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from spec_compile.runtime.engine import Engine
from spec_compile.runtime.program import StageProgram
from spec_compile.runtime.round import run_round
from spec_compile.runtime.state import DecodeState, SamplingPlan

_SHORT_MS = 0.25  # a graph shorter than this is timed many calls at once: starting a graph takes microseconds too
_LAUNCHES = 100


@dataclass(frozen=True)
class Call:
    """A call that a round made, ready to be made again.

    Attributes:
        nbytes: of the tensors it must read or write, weights and committed keys and values not among them.
    """

    name: str
    run: Callable[[], object]
    nbytes: int


class _OpRecorder(TorchDispatchMode):
    def __init__(self, calls: list[Call], looked_up: set[int]) -> None:
        super().__init__()
        self.calls, self.looked_up = calls, looked_up

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace == "spec_compile":
            name = func._schema.name.split("::")[1]
            call = partial(func, *args, **(kwargs or {}))
            self.calls.append(Call(name, call, _op_bytes(name, args, out, self.looked_up)))
        return out


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _nbytes(values: object, looked_up: set[int] = frozenset()) -> int:
    """Bytes of all tensors in ``values`` but those in ``looked_up``, of which a call reads a few entries."""
    tensors = (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))
    return sum(tensor.nbytes for tensor in tensors if _storage(tensor) not in looked_up)


def _op_bytes(name: str, args: tuple, out: object, looked_up: set[int]) -> int:
    if name == "kv_commit":
        caches, _, _, path = args
        return 2 * path.numel() * sum(cache[0, 0].nbytes for cache in caches)
    if name == "gdn_commit":  # of whole pools, the rows' states read and written, and the windows' entries that stand
        state, conv, *windows, slots, _, _ = args
        rows, kept = slots.numel(), sum(window[:, 0].nbytes for window in windows)
        return rows * (2 * state[:, 0].nbytes + 2 * conv[:, 0].nbytes + kept)
    return _nbytes((args, out), looked_up)


@contextmanager
def recording(engine: Engine) -> Iterator[list[Call]]:
    """Write down what rounds of ``engine`` call. Everything must be compiled already."""
    stages = {id(program): key[0] for programs in engine.programs() for key, program in programs.built.items()}
    tables = [engine._buffers.tokens, engine._buffers.page_table]  # whole texts, and tables of ids and pages
    if engine.draft is not None and engine.draft.head.draft_ids is not None:
        tables.append(engine.draft.head.draft_ids)
    looked_up = {_storage(table) for table in tables}
    calls: list[Call] = []
    run = StageProgram.__call__

    def record(program: StageProgram, **inputs: Tensor | int) -> tuple[Tensor, ...]:
        with _disable_current_modes():  # the ops inside are the program's
            out = run(program, **inputs)
        calls.append(Call(stages[id(program)], partial(run, program, **inputs), _nbytes((inputs, out), looked_up)))
        return out

    with mock.patch.object(StageProgram, "__call__", record), _OpRecorder(calls, looked_up):
        yield calls


# ----------------------------------------------------------------------------------------------------------------------
# Floors


def weight_bytes(engine: Engine) -> dict[str, int]:
    """Weights by stage."""
    read = {"verify": floors.weight_bytes_read(engine.target.model)}
    return read | (floors.head_bytes_read(engine.draft.head) if engine.draft is not None else {})


def kv_bytes(engine: Engine, batch: int, context: int) -> dict[str, int]:
    """Committed keys and values, and recurrent states, by stage."""
    model = engine.target.model
    read = {"verify": batch * (context * floors.kv_bytes_per_token(model) + floors.state_bytes_per_row(model))}
    if engine.draft is not None:
        read["draft"] = read["draft_extend"] = batch * context * floors.kv_bytes_per_token(engine.draft.head)
    return read


def launch_ms(device: str) -> float:
    """Milliseconds of the smallest kernel inside a CUDA graph, behind one it depends on: no part is under its launches."""
    x = torch.zeros(1, device=device)

    def many() -> None:
        for _ in range(_LAUNCHES):
            x.add_(1)

    return step_ms(many, device, 20) / _LAUNCHES


# ----------------------------------------------------------------------------------------------------------------------


def measure_parts(
    engine: Engine, state: DecodeState, plan: SamplingPlan, context: int, floor: dict[str, Any], device: str
) -> list[dict[str, Any]]:
    """Milliseconds of every part of a round over ``state``, whose rows have ``context`` tokens; bytes and floors beside.

    Args:
        floor: ``bandwidth`` (as ``floors.read_bandwidth``), ``launch_ms``, ``linears_ms`` by tokens in a window.
    """
    batch = state.cache_len.shape[0]
    rates = None if engine._rates is None else engine._rates[:batch]
    with recording(engine) as calls:
        run_round(engine.target, engine.draft, state, plan, engine.shape, simulated_rates=rates)
    by_name: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        by_name[call.name].append(call)
    weights, kv = weight_bytes(engine), kv_bytes(engine, batch, context)
    rows = []
    for name, group in by_name.items():  # as they first ran
        once = weights.get(name, 0) + kv.get(name, 0)
        size = sum(call.nbytes + once for call in group)
        by_bytes = size / floor["bandwidth"]["bytes_per_second"] * 1e3
        by_launches = len(group) * floor["launch_ms"]
        took = calls_ms([call.run for call in group], device)
        row = {"part": name, "calls": len(group), "ms": took, "bytes": size, "floor_ms": max(by_bytes, by_launches)}
        row |= {"floor": "bytes" if by_bytes >= by_launches else "launch", "ratio": took / row["floor_ms"]}
        if name == "verify":
            row["linears_ms"] = floor["linears_ms"].get(str(batch * engine.shape.num_draft_tokens))
        rows.append(row)
    return rows


def calls_ms(calls: list[Callable[[], object]], device: str) -> float:
    """Milliseconds of ``calls`` one behind another."""

    def run(times: int) -> None:
        for _ in range(times):
            for call in calls:
                call()

    once = step_ms(lambda: run(1), device, 20)
    if once >= _SHORT_MS or not device.startswith("cuda"):
        return once
    times = max(1, round(2 * _SHORT_MS / once))
    return step_ms(lambda: run(times), device, 20) / times


def kernels(replay: Callable[[], object]) -> dict[str, Any]:
    """Kernels of one replayed round by name: [name, launches, microseconds], the longest first.

    A profiler stretches the gaps between kernels, so nothing but the kernels' own times is read from it.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        replay()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(list)
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[re.sub(r"_\d+$", "", event.name)[:90]].append(event.device_time)
    table = sorted(([name, len(took), sum(took)] for name, took in times.items()), key=lambda row: -row[2])
    return {"us": sum(row[2] for row in table), "launches": sum(row[1] for row in table), "kernels": table}
