"""Triton kernel of ``ring_page_table``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["columns", "ring"])
def _ring_page_table_kernel(table_ptr, out_ptr, stride_b, columns, ring, BLOCK: tl.constexpr):
    """Program (row, block of columns)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(table_ptr + row * stride_b)
    page = tl.maximum(first - 1, 0) // columns * ring + 1 + column % ring
    tl.store(out_ptr + row * columns + column, tl.where(first == 0, 0, page), mask=column < columns)


def ring_page_table(page_table: Tensor, ring: int) -> Tensor:
    """``spec_compile::ring_page_table``; same arguments and result. One launch, no host sync."""
    rows, columns = page_table.shape
    out = torch.empty(rows, columns, dtype=torch.int32, device=page_table.device)
    block = min(triton.next_power_of_2(columns), 1024)
    with torch.cuda.device_of(page_table):
        _ring_page_table_kernel[(rows, triton.cdiv(columns, block))](
            page_table, out, page_table.stride(0), columns, ring, BLOCK=block, num_warps=4
        )
    return out
