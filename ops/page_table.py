"""Page tables of sliding-window layers: a row's positions go round a small ring of pages.

A layer with a window of W tokens reads nothing further back than W, so its pool need not hold whole texts. Its page table has
as many columns as everyone's, but they repeat the row's few pages: position p lies in page ``ring[(p // page_size) % R]`` at
offset ``p % page_size``, which is slot p modulo R * page_size of the ring. Kernels need no change: what they read inside the
window is there, and what they read outside of it (masked, by the position that a column stands for) is some other finite slot.

Shapes: B rows, M pages a row can name, R pages of a row's ring.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Slots that one round may write behind a row's committed ones: a draft tree expands at most 128 nodes, a verified window holds
# at most 64, a head catches up with 32 tokens. A round writes them all before it is known how many count, so a ring has to hold
# them beside the whole window: nothing that is refused ever takes the slot of what can still be seen.
MOST_AHEAD = 128


def ring_pages(window: int, page_size: int, pages_per_row: int) -> int:
    """Pages that a row needs in a layer with a sliding window of ``window`` tokens; ``pages_per_row`` where a ring saves none.

    Args:
        window: 0 for a layer that sees everything.
    """
    if window == 0:
        return pages_per_row
    return min(pages_per_row, -(-(window + MOST_AHEAD) // page_size))


@torch.library.custom_op("spec_compile::ring_page_table", mutates_args=())
def ring_page_table(page_table: Tensor, ring: int) -> Tensor:
    """The page table of layers whose rows have ``ring`` pages, from that of layers whose rows have one for every column.

    Both pools give row r the pages behind the null page (page 0) and the earlier rows': 1 + r * M … and 1 + r * R ….

    Args:
        page_table: int32 [B, M]; of each row only the first page is read, 0 in padding rows.
        ring: R, 1 <= R <= M.

    Returns:
        int32 [B, M], contiguous: column c names the row's page c % R; 0 in padding rows.
    """
    columns = page_table.shape[1]
    first = page_table[:, :1]  # [B, 1]
    turn = torch.arange(columns, dtype=torch.int32, device=page_table.device) % ring
    return ((first - 1) // columns * ring + 1 + turn).masked_fill(first == 0, 0).to(torch.int32)


@ring_page_table.register_fake
def ring_page_table_fake(page_table, ring) -> Tensor:
    return page_table.new_empty(page_table.shape)


@ring_page_table.register_kernel("cuda")
def ring_page_table_cuda(page_table, ring) -> Tensor:
    from spec_compile.ops.kernels import page_table as kernels  # here, so that machines without Triton can import this module

    return kernels.ring_page_table(page_table, ring)
