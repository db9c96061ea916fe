"""What a model's caches hold of a row, beside what one plain transformers forward over its text makes."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from spec_compile.ops.page_table import ring_page_table
from spec_compile.runtime.programs import Programs


def stored(programs: Programs, layer: int, table: Tensor, length: int) -> tuple[int, Tensor]:
    """Everything one layer keeps of a row's first ``length`` entries, read slot by slot: the first of them that a later token
    can see, and [length - first, …]."""
    window, pages = programs.layouts[layer].window, programs.pool.pages[layer]
    first = max(0, length - window + 1) if window else 0
    table = ring_page_table(table[None], pages)[0] if pages < len(table) else table
    parts = []
    for part in ("k", "v", "kv"):
        cache = programs.pool.caches.get((layer, part))
        if cache is not None:
            size = cache.shape[1]
            parts.append(torch.stack([cache[table[s // size], s % size].flatten() for s in range(first, length)]))
    return first, torch.cat(parts, 1)


def layers_of(cache: DynamicCache) -> list[Tensor]:
    """The same of a cache that transformers filled with one row: [length, …] by layer."""
    pairs = [(layer.keys, layer.values) for layer in cache.layers]
    return [torch.cat([x[0].transpose(0, 1).flatten(1) for x in pair], 1) for pair in pairs]


def check_stored(programs: Programs, table: Tensor, cache: DynamicCache, length: int, tolerance: float) -> None:
    """The caches of one row hold what ``cache`` does."""
    for layer, expected in enumerate(layers_of(cache)):
        first, got = stored(programs, layer, table, length)
        torch.testing.assert_close(got, expected[first:], rtol=tolerance, atol=tolerance)
