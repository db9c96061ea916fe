"""Paged key/value caches: writing a window behind a row or whole prompts, and keeping only the accepted path of a token tree.

Shapes: B rows, N window tokens, T packed prompt tokens, Hkv key/value heads, D head dim, P pages of ``page_size`` slots,
M pages a row can hold. A row's slot ``s`` lives in page ``page_table[row, s // page_size]`` at offset ``s % page_size``;
page 0 is the null page. Slots a row cannot hold (a finished row's window hanging over its last page) are written to page 0
too, never to a live one. A cache of a narrower type takes what ``ops.attention.to_cache`` makes of the values.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spec_compile.ops.attention import append_window, hide_broken, window_places, write_packed


@torch.library.custom_op("spec_compile::kv_write", mutates_args=("k_cache", "v_cache"))
def kv_write(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, page_table: Tensor, cache_len: Tensor) -> None:
    """Write a window's keys and values behind each row's committed slots, as ``ops.attention.hide_broken`` makes them: kernels
    that read the window from there apply its mask to scores.

    Args:
        k: [B, N, Hkv, D]; v: [B, N, Hkv, Dv]. Any strides with a contiguous last dim.
        k_cache: [P, page_size, Hkv, D], written; v_cache: [P, page_size, Hkv, Dv], written. Contiguous.
        page_table: int32 [B, M].
        cache_len: int32 [B]; not advanced.
    """
    k, v = hide_broken(k, v, v_cache.dtype)
    append_window(k, k_cache, page_table, cache_len)
    append_window(v, v_cache, page_table, cache_len)


@kv_write.register_fake
def kv_write_fake(k, v, k_cache, v_cache, page_table, cache_len) -> None:
    return None


@kv_write.register_kernel("cuda")
def kv_write_cuda(k, v, k_cache, v_cache, page_table, cache_len) -> None:
    from spec_compile.ops.kernels import round_ops  # here, so that machines without Triton can import this module

    round_ops.kv_write(k, v, k_cache, v_cache, page_table, cache_len)


@torch.library.custom_op("spec_compile::kv_write_packed", mutates_args=("k_cache", "v_cache"))
def kv_write_packed(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    window: int = 0,
) -> None:
    """Write packed prompts' keys and values, each prompt from its row's slot 0.

    Args:
        k: [T, Hkv, D]; v: [T, Hkv, Dv]. Any strides with a contiguous last dim.
        k_cache: [P, page_size, Hkv, D], written; v_cache: [P, page_size, Hkv, Dv], written. Contiguous.
        page_table: int32 [B, M].
        cu_seqlens: int32 [B + 1], prompt boundaries; tokens past the last prompt belong to it.
        window: of a layer with a sliding window: only each prompt's last ``window`` tokens are written; 0 for all.
    """
    write_packed(k, k_cache, page_table, cu_seqlens, window)
    write_packed(v, v_cache, page_table, cu_seqlens, window)


@kv_write_packed.register_fake
def kv_write_packed_fake(k, v, k_cache, v_cache, page_table, cu_seqlens, window=0) -> None:
    return None


@kv_write_packed.register_kernel("cuda")
def kv_write_packed_cuda(k, v, k_cache, v_cache, page_table, cu_seqlens, window=0) -> None:
    from spec_compile.ops.kernels import kv_write_packed as kernel

    kernel.kv_write_packed(k, v, k_cache, v_cache, page_table, cu_seqlens, window)


@torch.library.custom_op("spec_compile::kv_commit", mutates_args=("caches",))
def kv_commit(caches: Sequence[Tensor], page_table: Tensor, cache_len: Tensor, path: Tensor) -> None:
    """Move the accepted path of a token tree to the front of the window, in every cache.

    Slot ``cache_len + j`` gets what slot ``cache_len + path[b, j]`` held before the call. One op takes all layers, and
    takes each cache once: passing a cache beside its own clone reads what it writes under Inductor (pytorch#198260).

    Args:
        caches: tensors [P, page_size, ...], contiguous, of any dtypes and row sizes; written. All share ``page_size``.
        page_table: int32 [B, M].
        cache_len: int32 [B], the committed slots before this window; not advanced.
        path: int32 [B, N]; the window index of the j-th accepted token. ``path[b, j] >= j`` (a node stands behind its
            ancestors); ``path[b, j] == j`` stays, and so does a slot marked -1.
    """
    stay = torch.arange(path.shape[1], device=path.device)[None]  # [1, N]
    source = torch.where(path < 0, stay, path.long())
    if path.device.type == "cpu" and bool((source == stay).all()):  # a host read is free there
        return
    page_size = caches[0].shape[1]
    from_page, from_offset = window_places(page_table, cache_len, source, page_size)
    to_page, to_offset = window_places(page_table, cache_len, stay, page_size)
    for cache in caches:
        cache[to_page, to_offset] = cache[from_page, from_offset]  # the right side is a copy: read before written


@kv_commit.register_fake
def kv_commit_fake(caches, page_table, cache_len, path) -> None:
    return None


@kv_commit.register_kernel("cuda")
def kv_commit_cuda(caches, page_table, cache_len, path) -> None:
    from spec_compile.ops.kernels import round_ops

    round_ops.kv_commit(caches, page_table, cache_len, path)
