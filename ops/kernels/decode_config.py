"""Block shapes and split counts of the decode kernel, from static data only: what is captured is what replays."""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton


@dataclass(frozen=True)
class DecodeConfig:
    """Block shapes of one launch; ``min_blocks``: key blocks a split gets before another split is used."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    min_blocks: int


def choose_config(
    rows: int, row_heads: int, dims: int, v_dim: int, itemsize: int, num_sms: int, shared_memory: int
) -> DecodeConfig:
    """Block shapes for ``row_heads`` (row, key/value head) pairs of ``rows`` packed queries of ``dims`` dims each.

    Depends on static data only, so every replay of a captured graph uses what was captured. ``num_sms`` and
    ``shared_memory`` are the device's. The numbers come from ``benchmarks/bench_attention_kernels.py`` on an H200.
    """
    block_d, block_dv = max(16, triton.next_power_of_2(dims)), max(16, triton.next_power_of_2(v_dim))
    block_m, largest = 16, min(max(16, triton.next_power_of_2(rows)), 64)
    if itemsize == 4:  # full-precision dots run on the plain arithmetic units: small blocks, little pipelining
        config = DecodeConfig(block_m, 32 if block_d <= 128 else 16, 4, 2, 2)
    elif block_dv > 256:
        config = DecodeConfig(largest, 16 if largest == 64 else 32, 8, 2, 2)
    else:
        # While multiprocessors are idle, small tiles win although they read keys again: merging is what takes long.
        while block_m < largest and row_heads * triton.cdiv(rows, block_m) > num_sms // 2:
            block_m *= 2
        min_blocks = 1 if rows <= 8 else 2
        if block_m == 64 and block_dv == 256:
            config = DecodeConfig(block_m, 32, 8, 3, min_blocks)
        else:
            config = DecodeConfig(block_m, 32 if block_d >= 256 else 64, 4, 3, min_blocks)
    while _stage_bytes(config, block_d, block_dv, itemsize) > shared_memory:
        if config.num_stages > 1:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_n > 16:
            config = replace(config, block_n=config.block_n // 2)
        else:
            break
    return config


def _stage_bytes(config: DecodeConfig, block_d: int, block_dv: int, itemsize: int) -> int:
    """Upper bound of the shared memory of the pipelined key/value blocks and the query tile."""
    stages = config.num_stages * config.block_n * (block_d + block_dv) * itemsize
    return stages + config.block_m * (block_d + block_dv) * itemsize


def choose_splits(tiles: int, capacity: int, config: DecodeConfig, num_sms: int) -> int:
    """Splits per tile: enough programs to fill the device, but none without keys even when the cache is full."""
    useful = triton.cdiv(triton.cdiv(capacity, config.block_n) + 1, config.min_blocks)
    return max(1, min(num_sms // tiles, useful, 32))  # a tile's merge walks its splits one by one
