"""Kernels of gated delta nets: verify by provider, the commit of all layers, prompts; against the bytes of the states.

    bench_gdn.py --json gdn.json --plot gdn.png     # Qwen3-Next's and Qwen3.5's heads; a second run measures what is missing
    bench_gdn.py --quick                            # a dozen cells
    bench_gdn.py --shapes tiny --device cpu --providers torch

One CUDA graph calls a provider's op once a layer, every layer over states of its own, three times the L2 cache together. A
window must read every row's states once; its commit must read and write them once in every layer. What a design that keeps a
state a token (SGLang's: a window of N tokens leaves N states) would have to write on top stands beside each window. Errors are
against float64 over the same inputs, relative, of one row.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import floors
import gdn_report
import shapes
import torch
from attention_measure import L2_MULTIPLE, random_trees, time_calls
from report import describe, environment, read, save, settings
from torch import Tensor

from spec_compile.hardware import detect_hardware
from spec_compile.ops import linear_attention as ops
from spec_compile.ops import providers
from spec_compile.ops.providers import DeltaNode
from spec_compile.ops.providers.delta_examples import STATE_PLACES, example_arguments
from spec_compile.passes import select_backend
from spec_compile.runtime.state_pool import StateLayout, StatePool, allocate

TAPS = 4
KINDS = ("verify", "commit", "prefill")
MEMORY_SHARE = 0.4  # of the free memory, for the layers of a cell
COMMITTED = (3, 1, 8)  # tokens that stand
PROMPT_LAYERS = 8  # that share what a provider plans for a prefill


@dataclass(frozen=True)
class Shape:
    """The delta rule of a model's layers, from its published config.json (a table of them: tile-ai/TileOPs, issue 1581)."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    layers: int  # recurrent ones
    models: str

    @property
    def state_bytes(self) -> int:
        """Of one row in one layer."""
        return 4 * self.value_heads * self.value_dim * self.key_dim

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


SHAPES = {
    "qwen3-next": Shape(16, 32, 128, 128, 36, "Qwen3-Next-80B-A3B; the same heads in Qwen3.5-4B (24 layers)"),
    "qwen3.5-27b": Shape(16, 48, 128, 128, 48, "Qwen3.5-27B"),
    "tiny": Shape(1, 2, 16, 16, 2, "none: a way through on a CPU"),
}


@dataclass(frozen=True)
class Cell:
    """One figure. ``tokens`` of a window, of a prompt, or that stand; ``batch`` is 1 for a prompt."""

    kind: str  # of KINDS
    shape: str
    batch: int
    tokens: int
    tree: bool
    provider: str

    @property
    def node(self) -> DeltaNode:
        """What the selection pass would see."""
        shape, window = SHAPES[self.shape], self.kind == "verify"
        return DeltaNode(
            "gdn_verify" if window else "gdn_prefill", self.kind, self.batch if window else None,
            self.tokens if window else None, shape.key_heads, shape.value_heads, shape.key_dim, shape.value_dim, self.tree,
            torch.bfloat16,
        )  # fmt: skip

    def __str__(self) -> str:
        what = "prompt" if self.kind == "prefill" else f"B{self.batch}{' tree' if self.tree else ''}"
        return f"{self.shape} {self.kind} {what} N{self.tokens} {self.provider}"


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """Those of the kinds asked for, in order of importance: a run that is cut off should have measured the first ones."""
    return (cell for cell in _all_cells(args) if cell.kind in args.kinds)


def _all_cells(args: argparse.Namespace) -> Iterator[Cell]:
    for shape in args.shapes:
        for batch, tokens in itertools.product(args.batches, args.tokens):
            for name in args.providers:
                yield Cell("verify", shape, batch, tokens, False, name)
            for name in args.providers:
                yield Cell("verify", shape, batch, tokens, True, name)
        for batch, tokens in itertools.product(args.batches, args.committed):
            yield Cell("commit", shape, batch, tokens, False, "library")
        for tokens, name in itertools.product(args.prompts, args.providers):
            yield Cell("prefill", shape, 1, tokens, False, name)


# ----------------------------------------------------------------------------------------------------------------------
# One cell


class Bench:
    """Measures cells on one device."""

    def __init__(self, device: str) -> None:
        self.device, self.cuda = torch.device(device), device.startswith("cuda")
        self.hardware = detect_hardware(device)
        self.l2 = torch.cuda.get_device_properties(device).L2_cache_size if self.cuda else 1
        self.bandwidth = floors.read_bandwidth(device)

    def run(self, cell: Cell) -> dict[str, Any]:
        """The cell's row: figures, or why there are none."""
        row: dict[str, Any] = asdict(cell)
        try:
            refused = self.refusal(cell)
            if refused is not None:
                return {**row, "status": "refused", "reason": refused}
            measure = {"verify": self.verify, "commit": self.commit, "prefill": self.prefill}[cell.kind]
            return {**row, "status": "ok", **measure(cell)}
        except Exception as error:  # a row like any other; the next cell goes on
            shapes.sync(str(self.device))  # raises where the CUDA context is broken
            return {**row, "status": "error", "reason": describe(error)}

    def refusal(self, cell: Cell) -> str | None:
        if cell.kind == "commit":
            return None
        return select_backend.refusal(cell.provider, cell.node, self.hardware)

    def layers(self, layer_bytes: int, least: int = 4) -> int:
        """Layers whose states are together past the L2 cache, as far as the memory goes."""
        if not self.cuda:
            return 2
        room = int(torch.cuda.mem_get_info()[0] * MEMORY_SHARE) // layer_bytes
        return max(1, min(max(least, math.ceil(L2_MULTIPLE * self.l2 / layer_bytes)), room))

    def verify(self, cell: Cell) -> dict[str, Any]:
        provider, shape = providers.load_for(cell.node, cell.provider), SHAPES[cell.shape]
        provider.warm_up(cell.node, self.device)
        op = provider.lower(cell.node)
        first = list(example_arguments(cell.node, self.device, live=True))
        if cell.tree:
            first[11] = random_trees(cell.batch, cell.tokens, str(self.device))
        own = STATE_PLACES["gdn_verify"]
        layers = [first]
        for _ in range(self.layers(cell.batch * shape.state_bytes) - 1):
            layers.append([x.clone() if place in own else x for place, x in enumerate(first)])
        error = self.error(op(*layers[-1])[:1], expected_window(layers[-1]))
        us, spread = time_calls([functools.partial(op, *args) for args in layers], self.cuda)
        per_token = cell.batch * cell.tokens * shape.state_bytes
        return {
            **self.figures(us, spread, cell.batch * shape.state_bytes),
            "error": error,
            "layers": len(layers),
            "auto": select_backend.choose(cell.node, (0,), self.hardware).provider,
            "state_per_token_bytes": per_token,
            "state_per_token_us": round(per_token / self.bandwidth["bytes_per_second"] * 1e6, 3),
        }

    def commit(self, cell: Cell) -> dict[str, Any]:
        shape = SHAPES[cell.shape]
        size = cell.batch * shape.layers * shape.state_bytes
        pools = [self.pool(shape, cell) for _ in range(self.layers(size, least=1))]
        slots = torch.arange(1, cell.batch + 1, dtype=torch.int32, device=self.device)
        count = torch.full((cell.batch,), cell.tokens, dtype=torch.int32, device=self.device)
        expected = expected_commit(pools[-1], cell.tokens)
        pools[-1].commit(slots, None, count)
        error = self.error(pools[-1].state[0, 1], expected)
        us, spread = time_calls([functools.partial(pool.commit, slots, None, count) for pool in pools], self.cuda)
        return {**self.figures(us, spread, 2 * size), "error": error, "layers": shape.layers}

    def pool(self, shape: Shape, cell: Cell) -> StatePool:
        layout = StateLayout(
            tuple(range(shape.layers)), shape.key_heads, shape.value_heads, shape.key_dim, shape.value_dim, shape.channels,
            TAPS - 1, torch.bfloat16,
        )  # fmt: skip
        pool = allocate(layout, cell.batch, cell.tokens, self.device)
        for tensor in (pool.state, pool.conv, pool.kv_window, pool.conv_window):
            tensor.normal_()
        decay, strength = pool.gate_window.chunk(2, -1)
        decay.uniform_(-1, 0), strength.uniform_(0, 1)
        return pool

    def prefill(self, cell: Cell) -> dict[str, Any]:
        provider = providers.load_for(cell.node, cell.provider)
        provider.warm_up(cell.node, self.device)
        args = example_arguments(cell.node, self.device, num_tokens=cell.tokens, live=True)
        own = STATE_PLACES["gdn_prefill"]
        layers = [tuple(x.clone() if place in own else x for place, x in enumerate(args)) for _ in range(PROMPT_LAYERS)]
        lowered = providers.as_lowered(provider.lower(cell.node))
        error = self.error(lowered(*args), expected_prompt(args))
        call = functools.partial(lowered.over_layers, layers)
        ms = shapes.median_ms(call, str(self.device), 20 if self.cuda else 3) / PROMPT_LAYERS
        return {
            "us": round(ms * 1e3, 1),
            "tokens_per_second": round(cell.tokens / ms * 1e3),
            "error": error,
            "layers": PROMPT_LAYERS,
            "auto": select_backend.choose(cell.node, (0,), self.hardware).provider,
        }

    def figures(self, us: float, spread: float, size: int) -> dict[str, Any]:
        floor = size / self.bandwidth["bytes_per_second"] * 1e6
        return {
            "us": round(us, 3),
            "spread": round(spread, 3),
            "state_bytes": size,
            "floor_us": round(floor, 3),
            "bandwidth_percent": round(100 * floor / us, 2),
        }

    def error(self, found: Tensor, expected: Tensor) -> float:
        found = found.narrow(found.dim() - 2, 0, expected.shape[-2])  # of a prompt, the heads that were computed
        value = ((found.double() - expected).norm() / expected.norm()).item()
        return float(f"{value:.3g}") if math.isfinite(value) else 1e9  # JSON has no NaN


# ----------------------------------------------------------------------------------------------------------------------
# What is right, in float64


def expected_window(args: list) -> Tensor:
    """Outputs of the first row: [1, N, Hv, Dv]."""
    q, k, v, a, b, A_log, dt_bias, state, kv, gate, slots, mask, scale = args
    qkv, windows = (x[:1].double() for x in (q, k, v)), (kv.double(), gate.clone())
    mask = None if mask is None else mask[:1]
    return ops.verify_reference(*qkv, a[:1], b[:1], A_log, dt_bias, state.double(), *windows, slots[:1], mask, scale)


def expected_commit(pool: StatePool, tokens: int) -> Tensor:
    """The first layer's states of the first row behind ``tokens``: [Hv, Dv, D]."""
    parts = (pool.state, pool.conv, pool.kv_window, pool.gate_window, pool.conv_window)
    state, conv, *windows = (x[:1, 1:2].cpu().double() for x in parts)
    one = torch.zeros(1, dtype=torch.int32)
    ops.gdn_commit(state, conv, *windows, one, None, one + tokens)
    return state[0, 0].to(pool.state.device)


def expected_prompt(args: tuple) -> Tensor:
    """Outputs of the first key head's value heads: [T, G, Dv]."""
    q, k, v, a, b, A_log, dt_bias, state, slots, cu_seqlens, scale = args
    group = v.shape[1] // k.shape[1]
    heads = [q[:, :1], k[:, :1], *(x[:, :group] for x in (v, a, b))]
    states = torch.zeros_like(state[:, :group], dtype=torch.float64)
    weights = (A_log[:group], dt_bias[:group])
    return ops.prefill_reference(*(x.double() for x in heads), *weights, states, slots, cu_seqlens, scale)


# ----------------------------------------------------------------------------------------------------------------------
# The run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["qwen3-next", "qwen3.5-27b"])
    parser.add_argument(
        "--providers", nargs="+", choices=providers.REGISTRY[DeltaNode.FAMILY], default=["triton", "flashinfer", "fla"]
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what is timed")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--tokens", nargs="+", type=int, default=[4, 8, 2, 16], help="of a window")
    parser.add_argument("--committed", nargs="+", type=int, default=list(COMMITTED), help="tokens that stand")
    parser.add_argument("--prompts", nargs="+", type=int, default=[2048, 512, 8192])
    parser.add_argument("--quick", action="store_true", help="one shape, two batches, windows of 4, one prompt")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no cell after so many")
    parser.add_argument("--json", metavar="FILE", help="kept up to date after every cell; cells in it are not repeated")
    parser.add_argument("--plot", metavar="PNG")
    args = parser.parse_args(arguments)
    if args.quick:
        args.shapes, args.batches, args.tokens = args.shapes[:1], [1, 32], [4]
        args.committed, args.prompts = args.committed[:1], args.prompts[:1]
    return args


def earlier_rows(args: argparse.Namespace, meta: dict[str, Any]) -> list[dict[str, Any]]:
    """Figures of a file written on the same device by the same commit; what has none is tried again."""
    if args.json is None or not Path(args.json).exists():
        return []
    before = read(args.json)
    if any(before["meta"].get(name) != meta[name] for name in ("device", "commit", "torch")):
        raise SystemExit(f"{args.json} was measured on another device, commit or torch: name another file.")
    return [row for row in before["rows"] if row["status"] == "ok"]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    args, begin = parse(arguments), time.perf_counter()
    torch.manual_seed(0)
    meta = environment(args.device)
    rows = earlier_rows(args, meta)
    bench = Bench(args.device)
    measured_shapes = {name: {**asdict(SHAPES[name]), "state_bytes": SHAPES[name].state_bytes} for name in SHAPES}
    result = {"meta": meta, "args": settings(args), "bandwidth": bench.bandwidth, "shapes": measured_shapes, "rows": rows}
    done = {tuple(row[name] for name in Cell.__dataclass_fields__) for row in rows}
    for cell in cells(args):
        if tuple(asdict(cell).values()) in done:
            continue
        if time.perf_counter() - begin > args.seconds:
            print(f"time is over before {cell}")
            break
        row = bench.run(cell)
        rows.append(row)
        print(f"{cell}: {row['us']:.1f} us" if row["status"] == "ok" else f"{cell}: {row['status']}: {row['reason']}")
        save(result, args.json)
    print(gdn_report.markdown(result))
    if args.plot:
        gdn_report.plot(result, args.plot)
    return result


if __name__ == "__main__":
    main()
