"""Triton kernel of ``kv_write_packed``: prompts' keys and values into their pages, for prefill kernels that write no cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spec_compile.ops.kernels.cache_dtype import to_cache
from spec_compile.ops.kernels.round_ops import _place, _rows


@triton.jit(do_not_specialize=["num_rows", "table_columns", "window"])
def _kv_write_packed_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, table_ptr, cu_ptr, num_rows, table_columns, page_size, window,
    k_stride_t, k_stride_h, v_stride_t, v_stride_h, K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (packed token): its keys and values of all heads. Its prompt is found by counting the ends before it."""
    token = tl.program_id(0)
    b = tl.arange(0, BLOCK_B)
    ends = tl.load(cu_ptr + 1 + b, mask=b < num_rows, other=2147483647)
    row = tl.minimum(tl.sum((ends <= token).to(tl.int32), 0), num_rows - 1)
    begin = tl.load(cu_ptr + row)
    position = token - begin
    if (window > 0) & (position < tl.load(cu_ptr + row + 1) - begin - window):
        return
    place = _place(table_ptr + row.to(tl.int64) * table_columns, position, page_size, table_columns)
    i = tl.arange(0, BLOCK)
    token = token.to(tl.int64)
    k = tl.load(k_ptr + token * k_stride_t + (i // D) * k_stride_h + i % D, mask=i < K_WIDTH)
    v = tl.load(v_ptr + token * v_stride_t + (i // DV) * v_stride_h + i % DV, mask=i < V_WIDTH)
    tl.store(k_cache_ptr + place * K_WIDTH + i, to_cache(k, k_cache_ptr.dtype.element_ty), mask=i < K_WIDTH)
    tl.store(v_cache_ptr + place * V_WIDTH + i, to_cache(v, v_cache_ptr.dtype.element_ty), mask=i < V_WIDTH)


def kv_write_packed(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    window: int = 0,
) -> None:
    """``spec_compile::kv_write_packed``; same arguments. One launch, no host sync."""
    num_tokens, heads, dim = k.shape
    num_rows = cu_seqlens.shape[0] - 1
    if num_tokens == 0:
        return
    k, v, page_table = _rows(k), _rows(v), page_table.contiguous()
    widths = heads * dim, heads * v.shape[2]
    with torch.cuda.device_of(k):
        _kv_write_packed_kernel[(num_tokens,)](
            k, v, k_cache, v_cache, page_table, cu_seqlens.contiguous(), num_rows, page_table.shape[1],
            k_cache.shape[1], window, *k.stride()[:2], *v.stride()[:2], K_WIDTH=widths[0], V_WIDTH=widths[1], D=dim,
            DV=v.shape[2], BLOCK_B=triton.next_power_of_2(num_rows), BLOCK=triton.next_power_of_2(max(widths)),
            num_warps=4,
        )  # fmt: skip
