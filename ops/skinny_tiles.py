"""Tiles of the kernel behind ``ops/skinny_linear.py``: which are worth trying for a weight. Needs no Triton."""

from __future__ import annotations

MAX_TOKENS = 16

# (block_n, block_k, num_stages, num_warps). On an H200, 8 tokens, bfloat16, µs of cuBLAS and of the best of these: 4096 to 4096
# 12.6 and 11.1, 4096 to 6144 16.2 and 14.9, 4096 to 128256 249 and 241; 4096 to 28672 57.7 and 58.5, where cuBLAS stays.
TILES = ((64, 128, 6, 4), (64, 256, 4, 4), (128, 128, 4, 8))


def fitting_tiles(n: int, k: int, itemsize: int, shared: int) -> list[tuple[int, int, int, int]]:
    """The ``TILES`` that divide a weight [n, k] and whose reads in flight fit into ``shared`` bytes."""
    return [
        (block_n, block_k, stages, warps)
        for block_n, block_k, stages, warps in TILES
        if n % block_n == 0 and k % block_k == 0 and stages * (block_n + MAX_TOKENS) * block_k * itemsize <= shared
    ]
