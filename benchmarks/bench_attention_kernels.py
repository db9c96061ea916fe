"""Times the Triton attention kernels inside CUDA graphs: ``python benchmarks/bench_attention_kernels.py [--tune]``.

Each graph calls the op once per layer over separate caches, as a decode step does, so that a layer's keys are not in L2
because the call before put them there. Times are medians over replays, divided by the number of layers.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
from collections.abc import Callable

import torch

from spec_compile.ops.kernels.attention_decode import attention_decode
from spec_compile.ops.kernels.attention_prefill import PrefillConfig, attention_prefill
from spec_compile.ops.kernels.decode_config import DecodeConfig, choose_config

LAYERS, REPLAYS = 24, 15
HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 64


def graph_time(calls: list[Callable[[], object]]) -> float:
    """Median microseconds of one of ``calls``, all captured in one graph."""
    calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


class DecodeProblem:
    """Caches of ``LAYERS`` layers for ``batch`` rows that could hold ``capacity`` tokens and hold ``context``."""

    def __init__(self, batch: int, context: int, tokens: int, capacity: int) -> None:
        pages = batch * capacity // PAGE
        self.qkv = randn(batch, tokens, (HEADS + 2 * KV_HEADS), DIM)
        self.table = (torch.randperm(pages, device="cuda") + 1).view(batch, -1).to(torch.int32)
        self.lengths = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        self.caches = [[randn(pages + 1, PAGE, KV_HEADS, DIM) for _ in range(2)] for _ in range(LAYERS)]
        self.num_sms = torch.cuda.get_device_properties(0).multi_processor_count
        self.kv_bytes = batch * context * KV_HEADS * DIM * 4

    def time(self, config: DecodeConfig | None = None, num_splits: int | None = None) -> float:
        q, k, v = self.qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=2)
        calls = [
            functools.partial(
                attention_decode, q, k, v, *cache, self.table, self.lengths, None, DIM**-0.5,
                num_sms=self.num_sms, config=config, num_splits=num_splits,
            )
            for cache in self.caches
        ]  # fmt: skip
        return graph_time(calls)


DECODE = [(1, 512, 1), (1, 512, 8), (1, 2048, 1), (1, 2048, 8), (4, 1024, 8), (32, 512, 1), (32, 512, 8), (32, 2048, 1)]


def decode_table(tune: bool, chosen: int | None) -> None:
    """Microseconds per call; ``floor`` is the key/value bytes at 4.3 TB/s."""
    for batch, context, tokens in DECODE if chosen is None else [DECODE[chosen]]:
        problem = DecodeProblem(batch, context, tokens, 4096 if batch == 1 else 2048 if batch == 4 else context + 512)
        floor = problem.kv_bytes / 4.3e6
        print(f"decode B={batch} ctx={context} N={tokens}: {problem.time():.2f} us (floor {floor:.2f})", flush=True)
        if not tune:
            continue
        rows = HEADS // KV_HEADS * tokens
        base = choose_config(rows, batch * KV_HEADS, DIM, DIM, 2, problem.num_sms, 224 * 1024)
        print(f"    chosen: {base}")
        shapes = [(64, 4, 3), (64, 8, 3), (128, 8, 2), (32, 4, 3)]
        splits = {1: (8, 16), 4: (2, 4)}.get(batch, (1,))
        results = []
        for (block_n, warps, stages), count, block_m in itertools.product(shapes, splits, {16, base.block_m}):
            config = DecodeConfig(block_m, block_n, warps, stages, base.min_blocks)
            results.append((problem.time(config, count), config, count))
        for micros, config, count in sorted(results, key=lambda result: result[0])[:6]:
            print(f"    {micros:6.2f} us  splits {count}  {config}")


def prefill_table(tune: bool) -> None:
    """Milliseconds and causal TFLOP/s (4 * D flops per visible pair and query head)."""
    for batch, length in [(32, 512), (8, 2048), (2, 8192), (1, 300)]:
        total = batch * length
        q, k, v = randn(total, HEADS + 2 * KV_HEADS, DIM).split([HEADS, KV_HEADS, KV_HEADS], dim=1)
        columns = -(-length // PAGE)
        table = (torch.arange(batch * columns, device="cuda", dtype=torch.int32) + 1).view(batch, columns)
        caches = [randn(batch * columns + 1, PAGE, KV_HEADS, DIM) for _ in range(2)]
        cu = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * length
        flops = 4 * DIM * HEADS * batch * length * (length + 1) / 2
        shapes = [(128, 128, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3, True), (64, 32, 4, 4, True), (64, 64, 4, 2, True)]
        for config in [None, *[PrefillConfig(*shape) for shape in shapes]] if tune else [None]:
            call = functools.partial(attention_prefill, q, k, v, *caches, table, cu, DIM**-0.5, config=config)
            micros = graph_time([call] * 4)
            print(f"prefill {batch}x{length} {config or 'chosen'}: {micros:.1f} us {flops / micros * 1e-6:.0f} TFLOP/s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tune", action="store_true", help="also time other block shapes and split counts")
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--case", type=int, help="one decode problem, by its place in DECODE")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.only != "decode":
        prefill_table(arguments.tune)
    if arguments.only != "prefill":
        decode_table(arguments.tune, arguments.case)
