"""Times and checks one cell of ``bench_attention.py``'s grid on one device.

How. One CUDA graph calls a provider's op once per layer, each layer over keys and values of its own, so that no layer finds
its keys in L2 because the call before put them there: together they are at least ``L2_MULTIPLE`` times the L2. The time of a
call is the median over replays divided by the layers. What a provider plans once per forward is timed apart, and a
``MODEL_LAYERS``-th of it is added. Everything is called as the library calls it: ``Provider.warm_up``, then the op and the
plan of ``Provider.lower``.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import floors
import shapes
import torch
from attention_grid import PAGE_SIZE, Cell
from torch import Tensor

from spec_compile.hardware import detect_hardware
from spec_compile.ops import attention as generic
from spec_compile.ops import providers
from spec_compile.ops.providers import Lowered
from spec_compile.passes import select_backend

AUTO = "auto"
L2_MULTIPLE = 3
MODEL_LAYERS = 32  # a plan is made once for so many layers
MIN_LAYERS, CPU_LAYERS = 4, 2
SAMPLES = 3  # (row, key/value head) pairs checked against float64
POOL_SHARE = 0.45  # of the free memory
TORCH_LIMIT = 2**17  # it reads all a row could hold, in float32: no figure where batch * capacity * kv_heads is more
PLAN_REPEATS = 8


def random_trees(batch: int, num_tokens: int, device: str) -> Tensor:
    """int32 [batch, num_tokens, words]: packed ancestors (self included) of random trees, a different one for each row."""
    sees = torch.eye(num_tokens, dtype=torch.bool, device=device).repeat(batch, 1, 1)
    rows = torch.arange(batch, device=device)
    for token in range(1, num_tokens):
        parent = torch.randint(token, (batch,), device=device)
        sees[:, token] |= sees[rows, parent]
    words = -(-num_tokens // 32)
    bits = torch.zeros(batch, num_tokens, words * 32, dtype=torch.int64, device=device)
    bits[..., :num_tokens] = sees
    packed = (bits.unflatten(-1, (words, 32)) << torch.arange(32, device=device)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


@dataclass
class Problem:
    """A cell's tensors; ``caches`` holds (keys, values) of every layer."""

    cell: Cell
    q: Tensor  # [B, N, Hq, D]
    k: Tensor  # [B, N, Hkv, D]
    v: Tensor
    caches: list[tuple[Tensor, Tensor]]  # [pages, page_size, Hkv, D]
    page_table: Tensor  # int32 [B, capacity / page_size]; columns nobody reads name page 0
    cache_len: Tensor  # int32 [B]
    tree_mask: Tensor | None

    def args(self, layer: int) -> tuple:
        scale = self.cell.head_dim**-0.5
        rows = (self.page_table, self.cache_len, self.tree_mask)
        return (self.q, self.k, self.v, *self.caches[layer], *rows, scale, 0, 0.0, None)


def tabulate_pages(cell: Cell, device: str) -> Tensor:
    """Shuffled pages for what the rows hold, page 0 for what they could hold: int32 [B, capacity / page_size]."""
    table = torch.zeros(cell.batch, cell.capacity // PAGE_SIZE, dtype=torch.int32, device=device)
    live = (cell.pages - 1) // cell.batch
    shuffled = torch.randperm(cell.pages - 1, device=device) + 1
    table[:, :live] = shuffled.view(cell.batch, live).to(torch.int32)
    return table


def expected_sample(problem: Problem, layer: int, row: int, head: int) -> Tensor:
    """The generic op in float64 for one row and one key/value head of a layer: [1, N, G, D]."""
    cell = problem.cell
    live = (cell.pages - 1) // cell.batch
    pages = problem.page_table[row, :live].long()
    caches = []
    for cache in problem.caches[layer]:
        pages_of_row = cache[pages, :, head : head + 1].double()
        caches.append(torch.cat([torch.zeros_like(pages_of_row[:1]), pages_of_row]))  # page 0 is the null page
    table = torch.arange(1, live + 1, dtype=torch.int32, device=problem.q.device)[None]
    heads = slice(head * cell.group, (head + 1) * cell.group)
    new = [problem.q[row : row + 1, :, heads], *(x[row : row + 1, :, head : head + 1] for x in (problem.k, problem.v))]
    mask = None if problem.tree_mask is None else problem.tree_mask[row : row + 1]
    return generic.attention(
        *(x.double() for x in new), *caches, table, problem.cache_len[row : row + 1], mask, cell.head_dim**-0.5, 0, 0.0, None
    )


class Bench:
    """Measures cells on one device. The memory for keys and values is taken once and shared by all cells."""

    def __init__(self, device: str, names: list[str], dtype: torch.dtype = torch.bfloat16) -> None:
        self.device, self.names, self.dtype = device, names, dtype
        self.cuda = device.startswith("cuda")
        self.hardware = detect_hardware(device)
        self.probes = {name: providers.load(name).probe() for name in names}
        self.l2 = torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 2**20
        self.memory: Tensor | None = None
        self.bandwidth = 0.0

    def prepare(self) -> dict[str, Any]:
        """Measure the read bandwidth, then take the pool: random values, because zeros run faster than data."""
        measured = floors.read_bandwidth(self.device)
        self.bandwidth = measured["bytes_per_second"]
        if self.cuda:
            torch.cuda.empty_cache()
            free = torch.cuda.mem_get_info()[0]
            self.memory = torch.empty(int(free * POOL_SHARE) // 2, dtype=self.dtype, device=self.device)
        else:
            self.memory = torch.empty(2**22, dtype=self.dtype)
        for chunk in self.memory.split(2**30):
            chunk.normal_()
        return {"bandwidth": measured, "pool_bytes": self.memory.nbytes, "l2_bytes": self.l2}

    # ------------------------------------------------------------------------------------------------------------------

    def refusal(self, name: str, cell: Cell) -> tuple[str, str] | None:
        """(status, reason) where a provider is not to be timed on a cell."""
        if not self.probes[name].ok:
            return "skipped", str(self.probes[name].problem)
        reason = providers.load(name).supports(cell.node(self.dtype), self.hardware)
        if reason is not None:
            return "refused", reason
        if name == "torch" and self.cuda and cell.batch * cell.capacity * cell.kv_heads > TORCH_LIMIT:
            return "skipped", "the reference reads every slot a row could hold, in float32: not timed at this size"
        return None

    def auto(self, cell: Cell) -> dict[str, str]:
        """What ``backend="auto"`` would take."""
        return {"choice": select_backend.choose(cell.node(self.dtype), (0,), self.hardware).provider}

    def layers(self, cell: Cell) -> int:
        """Layers for one graph: enough bytes to make L2 useless, as far as the memory goes; 0 if not one fits."""
        fitting = self.memory.nbytes // cell.layer_bytes
        if not self.cuda:
            return min(CPU_LAYERS, fitting)
        return min(max(MIN_LAYERS, math.ceil(L2_MULTIPLE * self.l2 / cell.layer_bytes)), fitting)

    def problem(self, cell: Cell, layers: int) -> Problem:
        size = cell.pages * PAGE_SIZE * cell.kv_heads * cell.head_dim
        views = [
            self.memory[i * size : (i + 1) * size].view(cell.pages, PAGE_SIZE, cell.kv_heads, cell.head_dim)
            for i in range(2 * layers)
        ]
        return self._with_inputs(cell, list(zip(views[::2], views[1::2], strict=True)), tabulate_pages(cell, self.device))

    def _with_inputs(
        self, cell: Cell, caches: list[tuple[Tensor, Tensor]], table: Tensor, context: int | None = None
    ) -> Problem:
        heads = cell.kv_heads * cell.group
        fused = torch.randn(cell.batch, cell.tokens, heads + 2 * cell.kv_heads, cell.head_dim, device=self.device)
        q, k, v = fused.to(self.dtype).split([heads, cell.kv_heads, cell.kv_heads], dim=2)
        length = cell.context if context is None else context
        cache_len = torch.full((cell.batch,), length, dtype=torch.int32, device=self.device)
        tree = random_trees(cell.batch, cell.tokens, self.device) if cell.tree else None
        return Problem(cell, q, k, v, caches, table, cache_len, tree)

    def compile(self, name: str, cells: list[Cell]) -> None:
        """Build whatever ``name`` needs for ``cells``: its warm-up, then one call with the cell's shapes over empty rows."""
        for cell in cells:
            if self.refusal(name, cell) is not None:
                continue
            provider, node = providers.load(name), cell.node(self.dtype)
            provider.warm_up(node, torch.device(self.device))
            cache = torch.zeros(2, 1, PAGE_SIZE, cell.kv_heads, cell.head_dim, dtype=self.dtype, device=self.device)
            table = torch.zeros(cell.batch, cell.capacity // PAGE_SIZE, dtype=torch.int32, device=self.device)
            problem = self._with_inputs(cell, [(cache[0], cache[1])], table, context=0)
            providers.as_lowered(provider.lower(node))(*problem.args(0))
        shapes.sync(self.device)

    # ------------------------------------------------------------------------------------------------------------------

    def measure(self, cell: Cell, skip: set[str], announce: Callable[[str], None]) -> Iterator[dict[str, Any]]:
        """A result row for what ``auto`` takes and for every provider, those in ``skip`` left out, over the same tensors.

        Args:
            announce: told each provider's name before it runs, for whoever has to explain a crash.
        """
        base = vars(cell)
        if AUTO not in skip:
            yield {**base, "provider": AUTO, "status": "ok", **self.auto(cell)}
        layers = self.layers(cell)
        problem: Problem | None = None
        samples: list[tuple[int, int, Tensor]] = []
        for name in self.names:
            if name in skip:
                continue
            announce(name)
            row = {**base, "provider": name, "version": self.probes[name].version}
            refused = self.refusal(name, cell)
            if layers == 0:
                free = self.memory.nbytes / 2**30
                refused = (
                    "skipped",
                    f"a layer takes {cell.layer_bytes / 2**30:.1f} GiB of keys and values, there are {free:.1f}",
                )
            if refused is not None:
                yield {**row, "status": refused[0], "reason": refused[1]}
                continue
            if problem is None:
                problem = self.problem(cell, layers)
                samples = self._samples(problem)
            try:
                yield {**row, "status": "ok", **self._measure(name, problem, samples)}
            except Exception as error:  # a row like any other; the next provider goes on
                yield {**row, "status": "error", "reason": f"{type(error).__name__}: {error}"[:300]}
                shapes.sync(self.device)  # raises where the CUDA context is broken: the worker ends, another is started

    def _samples(self, problem: Problem) -> list[tuple[int, int, Tensor]]:
        """(row, key/value head, expected [1, N, G, D]) of random places in the last layer."""
        picks = {
            (int(torch.randint(problem.cell.batch, ())), int(torch.randint(problem.cell.kv_heads, ()))) for _ in range(SAMPLES)
        }
        return [(row, head, expected_sample(problem, len(problem.caches) - 1, row, head)) for row, head in sorted(picks)]

    def _measure(self, name: str, problem: Problem, samples: list[tuple[int, int, Tensor]]) -> dict[str, Any]:
        provider, node, cell = providers.load(name), problem.cell.node(self.dtype), problem.cell
        provider.warm_up(node, torch.device(self.device))
        lowered = providers.as_lowered(provider.lower(node))
        planned, plan_us = self._plan(lowered, problem)
        calls = [
            functools.partial(lowered.op, *problem.args(layer), *planned) for layer in range(len(problem.caches))
        ]  # of every layer
        out = calls[-1]()
        error = max(self._error(out, problem.cell, *sample) for sample in samples)
        del out
        layer_us, spread = time_calls(calls, self.cuda)
        us = layer_us + plan_us / MODEL_LAYERS
        return {
            "us": round(us, 3),
            "us_layer": round(layer_us, 3),
            "us_plan": round(plan_us, 3),
            "spread": round(spread, 3),
            "bandwidth_percent": round(100 * cell.bytes_moved / (us * 1e-6) / self.bandwidth, 2),
            "error": float(f"{error:.3g}"),
            "layers": len(calls),
        }

    def _plan(self, lowered: Lowered, problem: Problem) -> tuple[tuple[Tensor, ...], float]:
        """The plan's outputs, and the microseconds it takes."""
        if lowered.plan is None:
            return (), 0.0
        call = functools.partial(lowered.plan, *lowered.row_arguments(problem.args(0)), *lowered.plan_args)
        planned = call()
        return ((planned,) if isinstance(planned, Tensor) else tuple(planned)), time_calls([call] * PLAN_REPEATS, self.cuda)[0]

    def _error(self, out: Tensor, cell: Cell, row: int, head: int, expected: Tensor) -> float:
        found = out[row : row + 1, :, head * cell.group : (head + 1) * cell.group].double()
        error = ((found - expected).norm() / expected.norm()).item()
        return error if math.isfinite(error) else 1e9  # JSON has no NaN


def time_calls(calls: list[Callable[[], object]], cuda: bool) -> tuple[float, float]:
    """(median microseconds of one of ``calls`` run together, in a CUDA graph on a device; relative spread between the 10th and
    90th percentile)."""
    replay: Callable[[], object] = lambda: [call() for call in calls]  # noqa: E731
    if cuda:
        calls[0]()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replay()
        replay = graph.replay
    replay()
    times = [_clock(replay, cuda)]
    repeats = min(20, max(5, int(0.02 / max(times[0], 1e-6))))
    times = sorted(_clock(replay, cuda) for _ in range(repeats))
    low, high = times[len(times) // 10], times[-1 - len(times) // 10]
    middle = statistics.median(times)
    return middle / len(calls) * 1e6, (high - low) / middle


def _clock(call: Callable[[], object], cuda: bool) -> float:
    """Seconds of one call."""
    if not cuda:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
