"""Triton kernels of cascade attention: folding page tables, and everything of a window op but the bulk of its prefix.

See ``ops/cascade.py`` for what they compute. ``cascade_merge`` is one launch: a program has a few window tokens of one
key/value head and some of its value dims. It attends to the window, which the first programs of a row and head append to the
cache, and to the edge, with online softmax, and then takes in the folds' partial results, which are online-softmax states
too: peak = log-sum-exp, total = 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spec_compile.ops.folds import folded_columns
from spec_compile.ops.kernels.online_softmax import LOG2_E, any_broken, logits, normalize, online_softmax_step
from spec_compile.ops.kernels.tree_mask import token_depth, visible_columns

# Partial results that one program of ``cascade_merge`` takes in. On an H200 one row of 8 tokens and 32 heads of 128 dims takes
# 3.3 us with 16 folds of 16 dims a program, 4.3 with 32 dims, 10.3 with 64; 3.1 us with two folds of 128 dims.
TILE_ELEMENTS = 4096


@triton.jit
def _bulk_start(prefix, num_tokens, page_size, window, HAS_WINDOW: tl.constexpr):
    """First slot of ``ops.folds.bulk_range`` in one row; the end is ``prefix``."""
    first = 0
    if HAS_WINDOW:
        first = tl.maximum(prefix + num_tokens - window, 0)
        first = tl.minimum((first + page_size - 1) // page_size * page_size, prefix)
    return first


@triton.jit(do_not_specialize=["window", "table_columns", "columns", "folds"])
def _fold_prefix_kernel(
    page_table_ptr,  # int32 [B, M]
    cache_len_ptr,  # int32 [B]
    table_ptr,  # int32 [B * folds, columns]
    length_ptr,  # int32 [B * folds]
    folds,
    columns,
    table_columns,
    window,
    stride_tb,
    N: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (pseudo row)."""
    pseudo = tl.program_id(0)
    batch, fold = pseudo // folds, pseudo % folds
    end = tl.load(cache_len_ptr + batch)
    first = _bulk_start(end, N, PAGE_SIZE, window, HAS_WINDOW)
    pages = (end - first + PAGE_SIZE - 1) // PAGE_SIZE
    held = (pages - fold + folds - 1) // folds  # 0 from fold == pages on
    short = pages * PAGE_SIZE - (end - first)  # slots that the run's last page lacks
    has_last = (held > 0) & ((pages - 1) % folds == fold)
    tl.store(length_ptr + pseudo, held * PAGE_SIZE - tl.where(has_last, short, 0))
    source = page_table_ptr + batch.to(tl.int64) * stride_tb
    target = table_ptr + pseudo.to(tl.int64) * columns
    for start in range(0, columns, BLOCK):
        turn = start + tl.arange(0, BLOCK)
        column = first // PAGE_SIZE + turn * folds + fold
        page = tl.load(source + column, mask=(turn < held) & (column < table_columns), other=0)
        tl.store(target + turn, page, mask=turn < columns)


def fold_prefix(
    page_table: Tensor, cache_len: Tensor, folds: int, num_tokens: int, page_size: int, window: int
) -> tuple[Tensor, Tensor]:
    """``ops.cascade.fold_prefix``; same arguments and result."""
    rows = page_table.shape[0] * folds
    columns = folded_columns(page_table.shape[1], folds, page_size, window)
    table = torch.empty(rows, columns, dtype=torch.int32, device=page_table.device)
    length = torch.empty(rows, dtype=torch.int32, device=page_table.device)
    _fold_prefix_kernel[(rows,)](
        page_table, cache_len, table, length, folds, columns, page_table.shape[1], window, page_table.stride(0),
        N=num_tokens, PAGE_SIZE=page_size, HAS_WINDOW=window > 0,
        BLOCK=min(1024, triton.next_power_of_2(columns)), num_warps=1,
    )  # fmt: skip
    return table, length


@triton.jit
def _load_folds(
    lse_ptr, partial_ptr, batch, token, q_head, row_ok, dv,
    N: tl.constexpr, H: tl.constexpr, DV: tl.constexpr, FOLDS: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps [BLOCK_F, rows] and results [BLOCK_F, rows, dims] of all folds; neither load waits for the other."""
    fold = tl.arange(0, BLOCK_F)
    ok = (fold < FOLDS)[:, None] & row_ok[None, :]
    pseudo = (batch * FOLDS + fold)[:, None]
    lse = tl.load(lse_ptr + pseudo * (H * N) + (q_head * N + token)[None, :], mask=ok, other=float("-inf"))
    rows = partial_ptr + pseudo * (N * H * DV) + ((token * H + q_head) * DV)[None, :]
    parts = tl.load(rows[:, :, None] + dv[None, None, :], mask=ok[:, :, None] & (dv < DV)[None, None, :], other=0.0)
    return lse, parts


@triton.jit(do_not_specialize=["window", "table_columns"])
def _cascade_merge_kernel(
    q_ptr,  # [B, N, HKV * G, D]
    k_ptr,  # [B, N, HKV, D]
    v_ptr,  # [B, N, HKV, DV]
    k_cache_ptr,  # [P, PAGE_SIZE, HKV, D]
    v_cache_ptr,  # [P, PAGE_SIZE, HKV, DV]
    page_table_ptr,  # int32 [B, M]
    cache_len_ptr,  # int32 [B]
    mask_ptr,  # int32 [B, N, WORDS]
    sinks_ptr,  # [HKV * G]
    partial_ptr,  # [B * FOLDS, N, HKV * G, DV], contiguous
    lse_ptr,  # float32 [B * FOLDS, HKV * G, N], contiguous
    out_ptr,  # [B, N, HKV * G, DV], contiguous
    scale,  # includes log2(e) unless HAS_SOFTCAP
    softcap,
    window,
    table_columns,
    stride_qb,
    stride_qn,
    stride_qh,
    stride_kb,
    stride_kn,
    stride_kh,
    stride_vb,
    stride_vn,
    stride_vh,
    stride_kcp,
    stride_kcs,
    stride_kch,
    stride_vcp,
    stride_vcs,
    stride_vch,
    stride_tb,
    stride_mb,
    stride_mn,
    stride_mw,
    N: tl.constexpr,
    G: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    FOLDS: tl.constexpr,
    BLOCK_F: tl.constexpr,  # next_power_of_2(FOLDS)
    TOKENS: tl.constexpr,  # window tokens of a program
    BLOCK_R: tl.constexpr,  # at least TOKENS * G
    BLOCK_C: tl.constexpr,  # value dims of a program
    BLOCK_W: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WORDS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HAS_TREE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    CHUNKS: tl.constexpr = (DV + BLOCK_C - 1) // BLOCK_C
    part, chunk = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BLOCK_R)
    token = part * TOKENS + row // G
    row_ok = (row < TOKENS * G) & (token < N)
    q_head = head * G + row % G
    d = tl.arange(0, BLOCK_D)
    dv = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    prefix = tl.load(cache_len_ptr + batch)
    q_rows = q_ptr + batch * stride_qb + token * stride_qn + q_head * stride_qh
    q = tl.load(q_rows[:, None] + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
    mask_ptr += batch * stride_mb
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    k_cache_ptr += head * stride_kch
    v_cache_ptr += head * stride_vch
    table = page_table_ptr + batch * stride_tb
    depth = token
    if HAS_WINDOW and HAS_TREE:
        depth = token_depth(mask_ptr, token, row_ok, stride_mn, stride_mw, WORDS)

    # On their way while the window is attended to.
    lse, parts = _load_folds(lse_ptr, partial_ptr, batch, token, q_head, row_ok, dv, N, HKV * G, DV, FOLDS, BLOCK_F)

    peak = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)

    # The window, appended by the first program of its row and head.
    for w0 in tl.static_range(0, N, BLOCK_W):
        col = w0 + tl.arange(0, BLOCK_W)
        col_ok = col < N
        k_ok = col_ok[:, None] & (d < D)[None, :]
        v_ok = col_ok[:, None] & (dv < DV)[None, :]
        k = tl.load((k_ptr + col * stride_kn)[:, None] + d[None, :], mask=k_ok, other=0.0)
        v = tl.load((v_ptr + col * stride_vn)[:, None] + dv[None, :], mask=v_ok, other=0.0)
        broken = any_broken(v)  # among this program's dims
        if part == 0:
            slot = prefix + col
            column = slot // PAGE_SIZE
            page = tl.load(table + column, mask=col_ok & (column < table_columns), other=0).to(tl.int64)
            slot = slot % PAGE_SIZE
            new_k_rows = k_cache_ptr + page * stride_kcp + slot * stride_kcs
            if chunk == 0:
                tl.store(new_k_rows[:, None] + d[None, :], k, mask=k_ok)
            tl.store((v_cache_ptr + page * stride_vcp + slot * stride_vcs)[:, None] + dv[None, :], v, mask=v_ok)
        seen = visible_columns(mask_ptr, token, row_ok, col, col_ok, stride_mn, stride_mw, WORDS, HAS_TREE)
        if HAS_WINDOW:
            col_depth = col
            if HAS_TREE:
                col_depth = token_depth(mask_ptr, col, col_ok, stride_mn, stride_mw, WORDS)
            seen = seen & (depth[:, None] - col_depth[None, :] < window)
        k, v = tl.where(broken, float("nan"), k), tl.where(broken, 0.0, v)  # ``ops.attention.hide_broken``
        scores = tl.where(seen, logits(q, q, k, k, scale, softcap, False, HAS_SOFTCAP), float("-inf"))
        peak, total, acc = online_softmax_step(scores, v, peak, total, acc)

    # The edge: slots of the sliding window before the bulk. Nothing below ``low``, which nobody sees, is read.
    if HAS_WINDOW:
        low = tl.maximum(prefix - window + 1, 0)
        first = _bulk_start(prefix, N, PAGE_SIZE, window, HAS_WINDOW)
        for start in range(low, first, BLOCK_E):
            edge_slot = start + tl.arange(0, BLOCK_E)
            edge_slot_ok = edge_slot < first
            edge_page = tl.load(table + edge_slot // PAGE_SIZE, mask=edge_slot_ok, other=0).to(tl.int64)
            edge_k_rows = k_cache_ptr + edge_page * stride_kcp + edge_slot % PAGE_SIZE * stride_kcs
            edge_v_rows = v_cache_ptr + edge_page * stride_vcp + edge_slot % PAGE_SIZE * stride_vcs
            edge_k = tl.load(edge_k_rows[:, None] + d[None, :], mask=edge_slot_ok[:, None] & (d < D)[None, :], other=0.0)
            edge_v = tl.load(edge_v_rows[:, None] + dv[None, :], mask=edge_slot_ok[:, None] & (dv < DV)[None, :], other=0.0)
            edge_seen = edge_slot_ok[None, :] & ((prefix + depth)[:, None] - edge_slot[None, :] < window)
            edge_scores = tl.where(edge_seen, logits(q, q, edge_k, edge_k, scale, softcap, False, HAS_SOFTCAP), float("-inf"))
            peak, total, acc = online_softmax_step(edge_scores, edge_v, peak, total, acc)

    fold_peak = lse * 1.4426950408889634
    largest = tl.maximum(peak, tl.max(fold_peak, 0))
    shift = tl.where(largest == float("-inf"), 0.0, largest)
    weight = tl.exp2(fold_peak - shift[None, :])
    parts = tl.where((weight > 0.0)[:, :, None], parts.to(tl.float32), 0.0)  # an empty fold may hold NaN
    alpha = tl.exp2(peak - shift)
    total = total * alpha + tl.sum(weight, 0)
    acc = acc * alpha[:, None] + tl.sum(parts * weight[:, :, None], 0)

    sink = tl.full([BLOCK_R], float("-inf"), tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + q_head, mask=row_ok, other=0.0).to(tl.float32) * 1.4426950408889634
    o_rows = out_ptr + ((batch * N + token) * HKV * G + q_head) * DV
    o = normalize(largest, total, acc, sink)
    tl.store(o_rows[:, None] + dv[None, :], o, mask=row_ok[:, None] & (dv < DV)[None, :])


def cascade_merge(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cache_len: Tensor,
    tree_mask: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    partial: Tensor,
    partial_lse: Tensor,
    *,
    block_c: int | None = None,
    num_warps: int = 4,
) -> Tensor:
    """``ops.cascade.cascade_merge``; same arguments and result.

    Args:
        block_c, num_warps: override the choice of value dims and warps of a program, for tests and tuning.
    """
    batch, num_tokens, num_heads, dims = q.shape
    num_kv_heads, page_size, v_dim = k.shape[2], k_cache.shape[1], v.shape[3]
    group = num_heads // num_kv_heads
    folds = partial.shape[0] // batch
    tokens = min(max(1, 16 // group), num_tokens)  # 16 rows are the least a matrix product has
    block_r, block_f = max(16, triton.next_power_of_2(tokens * group)), triton.next_power_of_2(folds)
    block_dv = max(16, triton.next_power_of_2(v_dim))
    block_c = block_c or min(block_dv, max(16, TILE_ELEMENTS // (block_r * block_f)))
    out = torch.empty(batch, num_tokens, num_heads, v_dim, dtype=q.dtype, device=q.device)
    mask_strides = tree_mask.stride() if tree_mask is not None else (0, 0, 0)
    programs = triton.cdiv(num_tokens, tokens) * triton.cdiv(v_dim, block_c)
    _cascade_merge_kernel[(programs, num_kv_heads, batch)](
        q, k, v, k_cache, v_cache, page_table, cache_len,
        tree_mask if tree_mask is not None else cache_len, sinks if sinks is not None else q,
        partial, partial_lse, out,
        scale if softcap > 0 else scale * LOG2_E, float(softcap), window, page_table.shape[1],
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3],
        page_table.stride(0), *mask_strides,
        N=num_tokens, G=group, HKV=num_kv_heads, D=dims, DV=v_dim, FOLDS=folds, BLOCK_F=block_f,
        TOKENS=tokens, BLOCK_R=block_r, BLOCK_C=block_c,
        BLOCK_W=min(max(16, triton.next_power_of_2(num_tokens)), 64), BLOCK_E=min(max(16, page_size), 64),
        BLOCK_D=max(16, triton.next_power_of_2(dims)),
        WORDS=tree_mask.shape[2] if tree_mask is not None else 0, PAGE_SIZE=page_size,
        HAS_TREE=tree_mask is not None,
        HAS_WINDOW=window > 0, HAS_SOFTCAP=softcap > 0, HAS_SINKS=sinks is not None,
        num_warps=num_warps,
    )  # fmt: skip
    return out
