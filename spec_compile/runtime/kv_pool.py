"""The paged key/value pool of one model: a cache per layer and a page table. Page 0 is nobody's page."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spec_compile.ops.providers import AttentionNode
from spec_compile.passes.select_backend import Choice
from spec_compile.runtime.program import Caches

_KV_CACHE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "fp8_e4m3": torch.float8_e4m3fn}


def kv_dtype(name: str) -> torch.dtype | None:
    """The type that ``SpecConfig.kv_cache_dtype`` names; None for ``"auto"``, the model's own."""
    return None if name == "auto" else _KV_CACHE_DTYPES[name]


@dataclass(frozen=True)
class LayerLayout:
    """Shape of one layer's cache entry per slot."""

    layer: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # (("k", (Hkv, D)), ("v", (Hkv, Dv))) or (("kv", (C + R,)),)
    dtype: torch.dtype


def layouts(choices: list[Choice]) -> list[LayerLayout]:
    """The layout of every layer with attention, read from the attention nodes of any stage."""
    out = []
    for choice in choices:
        node = choice.node
        if not isinstance(node, AttentionNode):
            continue
        if node.op.startswith("mla"):
            shapes: tuple = (("kv", (node.head_dim,)),)
        else:
            shapes = (("k", (node.num_kv_heads, node.head_dim)), ("v", (node.num_kv_heads, node.v_head_dim)))
        out += [LayerLayout(layer, shapes, node.kv_dtype) for layer in choice.layers]
    return sorted(out, key=lambda layout: layout.layer)


@dataclass
class KVPool:
    """Pages for ``rows`` rows of ``capacity`` slots each.

    Attributes:
        caches: (layer, part) -> [P, page_size, …].
        page_table: int32 [rows, M]; row r owns pages 1 + r * M … (r + 1) * M.
    """

    caches: Caches
    page_table: Tensor
    rows: int
    capacity: int
    page_size: int

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches.values())


def allocate(layers: list[LayerLayout], rows: int, capacity: int, page_size: int, device: torch.device) -> KVPool:
    """A zeroed pool (kernels may multiply a masked slot by 0, which only finite memory survives).

    Args:
        capacity: slots a row, a multiple of ``page_size``.

    Raises:
        torch.OutOfMemoryError: the device has no room for it.
    """
    pages_per_row = capacity // page_size
    if device.type == "cpu":  # where asking for too much is not an error but the end of the process
        slots = rows * capacity + page_size
        wanted = slots * sum(math.prod(shape) * layout.dtype.itemsize for layout in layers for _, shape in layout.shapes)
        available = _available_memory()
        if available is not None and wanted > 0.9 * available:
            raise torch.OutOfMemoryError(f"{wanted / 2**30:.1f} GiB of keys and values, {available / 2**30:.1f} GiB available")
    num_pages = rows * pages_per_row + 1
    caches = {
        (layout.layer, part): torch.zeros(num_pages, page_size, *shape, dtype=layout.dtype, device=device)
        for layout in layers
        for part, shape in layout.shapes
    }
    page_table = torch.arange(1, num_pages, dtype=torch.int32, device=device).view(rows, pages_per_row)
    return KVPool(caches, page_table, rows, capacity, page_size)


def _available_memory() -> int | None:
    """Bytes of main memory that could be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
