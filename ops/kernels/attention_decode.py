"""Append-and-attend for a window of tokens over a paged cache, in one launch: split-KV whose last split merges.

Method: online softmax (FlashAttention, Dao et al. 2022), keys split over programs as in FlashDecoding (Dao et al.
2023), query heads of one key/value head packed into the rows of a tile (as multi-query kernels do). The merge runs in
whichever program of a tile arrives last, counted with one atomic, so that the op costs a single launch.

Shapes: B rows of the batch, N window tokens, G query heads per key/value head, S splits, M page-table columns.
A tile is (row, key/value head, slice of the G * N packed queries); packed query r is token r // G, head r % G.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spec_compile.ops.kernels.cache_dtype import to_cache
from spec_compile.ops.kernels.decode_config import DecodeConfig, choose_config, choose_splits
from spec_compile.ops.kernels.online_softmax import LOG2_E, any_broken, logits, normalize, online_softmax_step
from spec_compile.ops.kernels.split_kv import COUNTERS, merge_splits
from spec_compile.ops.kernels.tree_mask import token_depth, visible_columns


@triton.jit
def _page_ids(table, start, offset, end, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Pages of positions ``start + offset`` (a scalar where they share one), 0 from ``end`` on."""
    if BLOCK_N <= PAGE_SIZE:
        page = tl.load(table + start // PAGE_SIZE, mask=start < end, other=0)
    else:
        page = tl.load(table + (start + offset) // PAGE_SIZE, mask=start + offset < end, other=0)
    return page


@triton.jit
def _attend_window(
    q, qr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, table, mask_ptr, token, row_ok, depth,
    prefix, m_tile, scale, softcap, window, table_columns, peak, total, acc,
    stride_kn, stride_vn, stride_kcp, stride_kcs, stride_vcp, stride_vcs, stride_mn, stride_mw,
    N: tl.constexpr, D: tl.constexpr, R: tl.constexpr, DV: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_RD: tl.constexpr, BLOCK_DV: tl.constexpr, WORDS: tl.constexpr,
    PAGE_SIZE: tl.constexpr, HAS_TREE: tl.constexpr, HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, SHARED_KV: tl.constexpr,
):  # fmt: skip
    """Append the window to the cache and attend to it, straight from the inputs."""
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    rd = D + tl.arange(0, BLOCK_RD)
    for w0 in range(0, N, BLOCK_W):
        col = w0 + tl.arange(0, BLOCK_W)
        col_ok = col < N
        k_rows = k_ptr + col * stride_kn
        new_k = tl.load(k_rows[:, None] + d[None, :], mask=col_ok[:, None] & (d < D)[None, :], other=0.0)
        new_kr = new_k
        new_v = new_k
        if R > 0:
            new_kr = tl.load(k_rows[:, None] + rd[None, :], mask=col_ok[:, None] & (rd < D + R)[None, :], other=0.0)
        if not SHARED_KV:
            v_rows = v_ptr + col * stride_vn
            new_v = tl.load(v_rows[:, None] + dv[None, :], mask=col_ok[:, None] & (dv < DV)[None, :], other=0.0)
        # The window is attended to as the cache holds it, in every tile alike. ``hide_broken``: what is masked is not felt.
        broken = any_broken(to_cache(new_v, v_cache_ptr.dtype.element_ty))
        if SHARED_KV:
            new_kr = tl.where(broken, float("nan"), new_kr)
            new_k = tl.where(broken, 0.0, new_k)
        else:
            new_k = tl.where(broken, float("nan"), new_k)
        new_v = tl.where(broken, 0.0, new_v)
        new_k = to_cache(new_k, k_cache_ptr.dtype.element_ty)
        new_kr = to_cache(new_kr, k_cache_ptr.dtype.element_ty)
        new_v = to_cache(new_v, v_cache_ptr.dtype.element_ty)
        if m_tile == 0:
            slot = prefix + col
            column = slot // PAGE_SIZE  # what a row cannot hold goes to the null page
            new_page = tl.load(table + column, mask=col_ok & (column < table_columns), other=0).to(tl.int64)
            slot = slot % PAGE_SIZE
            new_k_ptr = k_cache_ptr + new_page * stride_kcp + slot * stride_kcs
            tl.store(new_k_ptr[:, None] + d[None, :], new_k, mask=col_ok[:, None] & (d < D)[None, :])
            if R > 0:
                tl.store(new_k_ptr[:, None] + rd[None, :], new_kr, mask=col_ok[:, None] & (rd < D + R)[None, :])
            if not SHARED_KV:
                new_v_ptr = v_cache_ptr + new_page * stride_vcp + slot * stride_vcs
                tl.store(new_v_ptr[:, None] + dv[None, :], new_v, mask=col_ok[:, None] & (dv < DV)[None, :])
        new_k, new_kr, new_v = new_k.to(q.dtype), new_kr.to(q.dtype), new_v.to(q.dtype)
        seen = visible_columns(mask_ptr, token, row_ok, col, col_ok, stride_mn, stride_mw, WORDS, HAS_TREE)
        if HAS_WINDOW:
            col_depth = col
            if HAS_TREE:
                col_depth = token_depth(mask_ptr, col, col_ok, stride_mn, stride_mw, WORDS)
            seen = seen & (depth[:, None] - col_depth[None, :] < window)
        new_scores = logits(q, qr, new_k, new_kr, scale, softcap, R > 0, HAS_SOFTCAP)
        new_scores = tl.where(seen, new_scores, float("-inf"))
        peak, total, acc = online_softmax_step(new_scores, new_v, peak, total, acc)
    return peak, total, acc


@triton.jit(do_not_specialize=["window", "table_columns", "min_blocks"])
def _decode_kernel(
    q_ptr,  # [B, N, HKV * G, D + R]
    k_ptr,  # [B, N, HKV, D + R]
    v_ptr,  # [B, N, HKV, DV]
    k_cache_ptr,  # [P, PAGE_SIZE, HKV, D + R]
    v_cache_ptr,  # [P, PAGE_SIZE, HKV, DV]
    page_table_ptr,  # int32 [B, M]
    cache_len_ptr,  # int32 [B]
    mask_ptr,  # int32 [B, N, WORDS]
    sinks_ptr,  # [HKV * G]
    out_ptr,  # [B, N, HKV * G, DV], contiguous
    part_acc_ptr,  # float32 [tiles, S, BLOCK_R, DV], contiguous
    part_stat_ptr,  # float32 [tiles, S, 2, BLOCK_R]: base-2 peaks, then totals
    counter_ptr,  # int32 [tiles], zero between launches
    scale,  # includes log2(e) unless HAS_SOFTCAP
    softcap,
    window,
    table_columns,
    min_blocks,  # key blocks a split should have before another split is used
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
    R: tl.constexpr,  # rotary dims behind the first D; > 0 only in MLA
    DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,  # rows of a tile that partial results keep: min(BLOCK_M, next_power_of_2(G * N))
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_RD: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    SPLIT: tl.constexpr,  # S > 1
    MERGE_STAGES: tl.constexpr,
    M_TILES: tl.constexpr,
    WORDS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
    HAS_TREE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SHARED_KV: tl.constexpr,  # MLA: values are the keys' first DV == D dims
):
    tile = tl.program_id(0)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    m_tile = tile % M_TILES
    head = (tile // M_TILES) % HKV
    batch = (tile // (M_TILES * HKV)).to(tl.int64)
    HAS_ROPE: tl.constexpr = R > 0

    prefix = tl.load(cache_len_ptr + batch)
    row = m_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = row < G * N
    token = row // G
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    rd = D + tl.arange(0, BLOCK_RD)
    q_rows = q_ptr + batch * stride_qb + token * stride_qn + (head * G + row % G) * stride_qh
    q = tl.load(q_rows[:, None] + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
    qr = q
    if HAS_ROPE:
        qr = tl.load(q_rows[:, None] + rd[None, :], mask=row_ok[:, None] & (rd < D + R)[None, :], other=0.0)
    mask_ptr += batch * stride_mb

    # The keys this tile can see: [first, prefix) in the cache, then the window. Where a sliding window hides the start
    # of the prefix from every row of the tile, it is not even read (its slots may be recycled and hold anything).
    depth = token
    first = 0
    if HAS_WINDOW:
        if HAS_TREE:
            depth = token_depth(mask_ptr, token, row_ok, stride_mn, stride_mw, WORDS)
        nearest = tl.min(tl.where(row_ok, depth, N), 0)
        first = tl.maximum(prefix + nearest - window + 1, 0)
    block_base = first // BLOCK_N
    prefix_blocks = tl.maximum(tl.cdiv(prefix, BLOCK_N) - block_base, 0)

    # Splits take blocks in turns, so that a split's first page id needs no length and is on its way together with it.
    capacity = table_columns * PAGE_SIZE
    table = page_table_ptr + batch * stride_tb
    offset = tl.arange(0, BLOCK_N)
    page = _page_ids(table, (block_base + split) * BLOCK_N, offset, capacity, BLOCK_N, PAGE_SIZE)

    # Work is cut for the live length: the window counts as one block behind the prefix; short rows use fewer splits.
    live = tl.minimum(num_splits, tl.cdiv(prefix_blocks + 1, min_blocks))
    if split >= live:
        return

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)

    owner = split == prefix_blocks % live  # one split appends the window and attends to it
    k_ptr += batch * stride_kb + head * stride_kh
    v_ptr += batch * stride_vb + head * stride_vh
    k_cache_ptr += head * stride_kch
    v_cache_ptr += head * stride_vch
    if owner:
        peak, total, acc = _attend_window(
            q, qr, k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, table, mask_ptr, token, row_ok,
            depth, prefix, m_tile, scale, softcap, window, table_columns, peak, total, acc,
            stride_kn, stride_vn, stride_kcp, stride_kcs, stride_vcp, stride_vcs, stride_mn, stride_mw,
            N, D, R, DV, BLOCK_W, BLOCK_D, BLOCK_RD, BLOCK_DV, WORDS, PAGE_SIZE, HAS_TREE, HAS_WINDOW,
            HAS_SOFTCAP, SHARED_KV,
        )  # fmt: skip

    # Page ids are read one block ahead and carried, so that the pipeline sees key loads that wait for no other load.
    for turn in tl.range(0, tl.cdiv(tl.maximum(prefix_blocks - split, 0), live), num_stages=STAGES):
        start = (block_base + split + turn * live) * BLOCK_N
        position = start + offset
        next_page = _page_ids(table, start + live * BLOCK_N, offset, capacity, BLOCK_N, PAGE_SIZE)
        if BLOCK_N <= PAGE_SIZE:  # the block lies in one page
            cache_slot = start % PAGE_SIZE + offset
        else:
            cache_slot = position % PAGE_SIZE
        k_rows = k_cache_ptr + page.to(tl.int64) * stride_kcp + cache_slot * stride_kcs
        v_rows = v_cache_ptr + page.to(tl.int64) * stride_vcp + cache_slot * stride_vcs
        page = next_page
        live_slot = position < prefix
        if HAS_WINDOW:
            live_slot = live_slot & (position >= first)
        # Slots that nobody sees may hold NaN, and 0 * NaN is NaN: they are never loaded.
        k = tl.load(k_rows[:, None] + d[None, :], mask=live_slot[:, None] & (d < D)[None, :], other=0.0)
        kr = k
        v = k
        if HAS_ROPE:
            kr = tl.load(k_rows[:, None] + rd[None, :], mask=live_slot[:, None] & (rd < D + R)[None, :], other=0.0)
        if not SHARED_KV:
            v = tl.load(v_rows[:, None] + dv[None, :], mask=live_slot[:, None] & (dv < DV)[None, :], other=0.0)
        k, kr, v = k.to(q.dtype), kr.to(q.dtype), v.to(q.dtype)
        scores = logits(q, qr, k, kr, scale, softcap, HAS_ROPE, HAS_SOFTCAP)
        visible = live_slot[None, :]
        if HAS_WINDOW:
            visible = visible & ((prefix + depth)[:, None] - position[None, :] < window)
        scores = tl.where(visible, scores, float("-inf"))
        peak, total, acc = online_softmax_step(scores, v, peak, total, acc)

    out_ptr += batch * N * HKV * G * DV
    if live == 1:
        sink = tl.full([BLOCK_M], float("-inf"), tl.float32)
        if HAS_SINKS:
            sink = tl.load(sinks_ptr + head * G + row % G, mask=row_ok, other=0.0).to(tl.float32) * 1.4426950408889634
        o_rows = out_ptr + (token * HKV * G + head * G + row % G) * DV
        o = normalize(peak, total, acc, sink)
        tl.store(o_rows[:, None] + dv[None, :], o, mask=row_ok[:, None] & (dv < DV)[None, :])
    elif SPLIT:
        local = tl.arange(0, BLOCK_M)
        part_acc_ptr += tile.to(tl.int64) * num_splits * BLOCK_R * DV
        part_stat_ptr += tile * num_splits * 2 * BLOCK_R
        a_rows = part_acc_ptr + split * BLOCK_R * DV + local * DV
        tl.store(a_rows[:, None] + dv[None, :], acc, mask=row_ok[:, None] & (dv < DV)[None, :])
        stat = part_stat_ptr + split * 2 * BLOCK_R + local
        tl.store(stat, peak, mask=row_ok)
        tl.store(stat + BLOCK_R, total, mask=row_ok)
        # All threads' stores come before the one thread's release; whoever sees the last count has acquired them all.
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == live - 1:
            tl.store(counter_ptr + tile, 0)  # ready for the next launch
            merge_splits(
                part_acc_ptr, part_stat_ptr, sinks_ptr, out_ptr, live, head, m_tile,
                N, G, HKV, DV, BLOCK_M, BLOCK_R, BLOCK_DV, MERGE_STAGES, HAS_SINKS,
            )  # fmt: skip


def attention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    page_table: Tensor,
    cache_len: Tensor,
    tree_mask: Tensor | None,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    *,
    num_sms: int,
    shared_memory: int = 224 * 1024,
    v_dim: int | None = None,
    config: DecodeConfig | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """``spec_compile::attention`` on Triton; with ``v`` None it is ``spec_compile::mla_attention``.

    Args:
        q: [B, N, Hq, D]; k: [B, N, Hkv, D]; v: [B, N, Hkv, Dv], or None: values are the first ``v_dim`` dims of k.
        k_cache: [P, page_size, Hkv, D]; v_cache: [P, page_size, Hkv, Dv], or None like ``v``; of any float type. Written.
        page_table, cache_len, tree_mask, scale, window, softcap, sinks: as in the generic op.
        num_sms, shared_memory: the device's multiprocessors and the shared memory of one program, in bytes.
        config, num_splits: override the choice, for tests and tuning.

    Returns:
        [B, N, Hq, Dv], contiguous, in q's dtype.
    """
    batch, num_tokens, num_heads, dims = q.shape
    num_kv_heads, page_size = k.shape[2], k_cache.shape[1]
    group = num_heads // num_kv_heads
    v_dim = v.shape[3] if v is not None else v_dim
    rotary = 0 if v is not None else dims - v_dim
    rows = group * num_tokens
    config = config or choose_config(rows, batch * num_kv_heads, dims - rotary, v_dim, q.element_size(), num_sms, shared_memory)
    m_tiles = triton.cdiv(rows, config.block_m)
    tiles = batch * num_kv_heads * m_tiles
    capacity = page_table.shape[1] * page_size
    reach = min(capacity, window + num_tokens + config.block_n) if window > 0 else capacity
    splits = num_splits or choose_splits(tiles, reach, config, num_sms)

    out = torch.empty(batch, num_tokens, num_heads, v_dim, dtype=q.dtype, device=q.device)
    block_r = min(config.block_m, triton.next_power_of_2(rows))
    block_dv = max(16, triton.next_power_of_2(v_dim))
    part_acc = part_stat = counters = out  # never touched with one split
    if splits > 1:
        part_acc = torch.empty(tiles, splits, block_r, v_dim, dtype=torch.float32, device=q.device)
        part_stat = torch.empty(tiles, splits, 2, block_r, dtype=torch.float32, device=q.device)
        counters = COUNTERS.take(q.device, tiles)
    merge_stages = max(1, min(8, 64 * 1024 // (block_r * block_dv * 4)))  # reads in flight, within shared memory
    mask_strides = tree_mask.stride() if tree_mask is not None else (0, 0, 0)
    value, value_cache = (v, v_cache) if v is not None else (k, k_cache)
    _decode_kernel[(tiles, splits)](
        q, k, value, k_cache, value_cache, page_table, cache_len,
        tree_mask if tree_mask is not None else cache_len, sinks if sinks is not None else q,
        out, part_acc, part_stat, counters,
        scale if softcap > 0 else scale * LOG2_E, float(softcap), window, page_table.shape[1], config.min_blocks,
        *q.stride()[:3], *k.stride()[:3], *value.stride()[:3], *k_cache.stride()[:3], *value_cache.stride()[:3],
        page_table.stride(0), *mask_strides,
        N=num_tokens, G=group, HKV=num_kv_heads, D=dims - rotary, R=rotary, DV=v_dim,
        BLOCK_M=config.block_m, BLOCK_R=block_r, BLOCK_N=config.block_n,
        BLOCK_W=min(max(16, triton.next_power_of_2(num_tokens)), 64),
        BLOCK_D=max(16, triton.next_power_of_2(dims - rotary)),
        BLOCK_RD=max(16, triton.next_power_of_2(max(rotary, 1))), BLOCK_DV=block_dv,
        SPLIT=splits > 1, MERGE_STAGES=merge_stages,
        M_TILES=m_tiles, WORDS=tree_mask.shape[2] if tree_mask is not None else 0, PAGE_SIZE=page_size,
        STAGES=config.num_stages, HAS_TREE=tree_mask is not None, HAS_WINDOW=window > 0,
        HAS_SOFTCAP=softcap > 0, HAS_SINKS=sinks is not None, SHARED_KV=v is None,
        num_warps=config.num_warps,
    )  # fmt: skip
    return out
