"""The paged key/value pool of one model: a cache per layer and a page table. Page 0 is the null page.

Behind a sliding window a row has only as many pages as the window and a round need, and goes round them
(``ops.page_table``). On a CPU a row is one page, which the reference reads as a view, so there every layer holds whole texts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from spec_compile.ops.page_table import ring_pages
from spec_compile.ops.providers import AttentionNode
from spec_compile.passes.select_backend import Choice
from spec_compile.runtime.program import Caches

_KV_CACHE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "fp8_e4m3": torch.float8_e4m3fn}


def kv_dtype(name: str) -> torch.dtype | None:
    """The type that ``SpecConfig.kv_cache_dtype`` names; None for ``"auto"``, the model's own."""
    return None if name == "auto" else _KV_CACHE_DTYPES[name]


@dataclass(frozen=True)
class LayerLayout:
    """Shape of one layer's cache entry per slot, and its sliding window in tokens, which says how many pages a row needs."""

    layer: int
    shapes: tuple[tuple[str, tuple[int, ...]], ...]  # (("k", (Hkv, D)), ("v", (Hkv, Dv))) or (("kv", (C + R,)),)
    dtype: torch.dtype
    window: int = 0


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
        out += [LayerLayout(layer, shapes, node.kv_dtype, node.window) for layer in choice.layers]
    return sorted(out, key=lambda layout: layout.layer)


@dataclass
class KVPool:
    """Pages for ``rows`` rows of ``capacity`` slots each.

    Attributes:
        caches: (layer, part) -> [P, page_size, …].
        page_table: int32 [rows, M]; row r owns pages 1 + r * M … (r + 1) * M.
        pages: layer -> pages that a row has there; M, or fewer behind a sliding window: then row r owns pages
            1 + r * pages … (r + 1) * pages of that layer, and ``ops.page_table.ring_page_table`` is its page table.
    """

    caches: Caches
    page_table: Tensor
    rows: int
    capacity: int
    page_size: int
    pages: dict[int, int]

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches.values())

    def by_table(self, page_table: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        """Every cache, beside the page table that it is read by.

        Args:
            page_table: int32 [B, M] of some rows, for layers that hold whole texts.
        """
        groups: dict[int, list[Tensor]] = {}
        for (layer, _), cache in self.caches.items():
            groups.setdefault(self.pages[layer], []).append(cache)
        whole, ring_table = self.page_table.shape[1], torch.ops.spec_compile.ring_page_table
        return [(page_table if n == whole else ring_table(page_table, n), caches) for n, caches in groups.items()]


def allocate(layers: list[LayerLayout], rows: int, capacity: int, page_size: int, device: torch.device) -> KVPool:
    """A zeroed pool (kernels may multiply a masked slot by 0, which only finite memory survives).

    Args:
        capacity: slots a row, a multiple of ``page_size``.

    Raises:
        torch.OutOfMemoryError: the device has no room for it.
    """
    pages_per_row = capacity // page_size
    pages = {layout.layer: ring_pages(layout.window, page_size, pages_per_row) for layout in layers}
    wanted = page_size * sum(
        (rows * pages[layout.layer] + 1) * math.prod(shape) * layout.dtype.itemsize
        for layout in layers
        for _, shape in layout.shapes
    )
    check_room(wanted, "keys and values", device)
    caches = {
        (layout.layer, part): torch.zeros(rows * pages[layout.layer] + 1, page_size, *shape, dtype=layout.dtype, device=device)
        for layout in layers
        for part, shape in layout.shapes
    }
    page_table = torch.arange(1, rows * pages_per_row + 1, dtype=torch.int32, device=device).view(rows, pages_per_row)
    return KVPool(caches, page_table, rows, capacity, page_size, pages)


def check_room(wanted: int, what: str, device: torch.device) -> None:
    """Look for room where asking for too much is not an error but the end of the process: on a CPU.

    Raises:
        torch.OutOfMemoryError: ``wanted`` bytes are not to be had.
    """
    available = _available_memory() if device.type == "cpu" else None
    if available is not None and wanted > 0.9 * available:
        raise torch.OutOfMemoryError(f"{wanted / 2**30:.1f} GiB of {what}, {available / 2**30:.1f} GiB available")


def _available_memory() -> int | None:
    """Bytes of main memory that could be had without swapping; None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
