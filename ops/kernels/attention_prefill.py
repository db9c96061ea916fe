"""Causal attention of prompts packed without padding, filling their pages on the way.

Method: FlashAttention-2 (Dao 2023): one program owns a tile of queries and walks the keys it sees with online softmax.
Prompt lengths stay on the device: prompt b starts at tile ``cu_seqlens[b] // BLOCK_M + b``, which leaves room for every
prompt's last partial tile, so that ceil(T / BLOCK_M) + B programs per head always suffice.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from spec_compile.ops.attention import as_cached
from spec_compile.ops.kernels.online_softmax import LOG2_E, any_broken, is_finite, logits, normalize, online_softmax_step


@triton.jit
def _attend_blocks(
    begin, end, q, qr, k_ptr, v_ptr, position, length, scale, softcap, window, stride_kt, stride_vt, peak, total, acc,
    D: tl.constexpr,
    R: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_RD: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SHARED_KV: tl.constexpr,
    STAGES: tl.constexpr,
    HIDE: tl.constexpr = False,
):  # fmt: skip
    """Walk keys [begin, end) of one prompt. Without MASKED every row of the tile must see all of them. HIDE: what is masked is
    not felt, though it be NaN (``ops.attention.hide_broken``)."""
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    rd = D + tl.arange(0, BLOCK_RD)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        key = start + tl.arange(0, BLOCK_N)
        k_rows = k_ptr + key.to(tl.int64) * stride_kt
        ok = (key < length) if MASKED else (key >= 0)
        if MASKED:
            k = tl.load(k_rows[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
        elif D < BLOCK_D:
            k = tl.load(k_rows[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)
        else:
            k = tl.load(k_rows[:, None] + d[None, :])
        kr = k
        if R > 0:
            kr = tl.load(k_rows[:, None] + rd[None, :], mask=ok[:, None] & (rd < D + R)[None, :], other=0.0)
        v = k
        if not SHARED_KV:
            v_rows = v_ptr + key.to(tl.int64) * stride_vt
            if MASKED:
                v = tl.load(v_rows[:, None] + dv[None, :], mask=ok[:, None] & (dv < DV)[None, :], other=0.0)
            elif DV < BLOCK_DV:
                v = tl.load(v_rows[:, None] + dv[None, :], mask=(dv < DV)[None, :], other=0.0)
            else:
                v = tl.load(v_rows[:, None] + dv[None, :])
        if HIDE:
            broken = any_broken(v)
            if SHARED_KV:
                kr = tl.where(broken, float("nan"), kr)
                k = tl.where(broken, 0.0, k)
            else:
                k = tl.where(broken, float("nan"), k)
            v = tl.where(broken, 0.0, v)
        scores = logits(q, qr, k, kr, scale, softcap, R > 0, HAS_SOFTCAP)
        if MASKED:
            visible = key[None, :] <= position[:, None]
            if HAS_WINDOW:
                visible = visible & (position[:, None] - key[None, :] < window)
            scores = tl.where(visible, scores, float("-inf"))
        peak, total, acc = online_softmax_step(scores, v, peak, total, acc)
    return peak, total, acc


@triton.jit(do_not_specialize=["num_rows", "window", "table_columns"])
def _prefill_kernel(
    q_ptr,  # [T, HKV * G, D + R]
    k_ptr,  # [T, HKV, D + R]
    v_ptr,  # [T, HKV, DV]
    k_cache_ptr,  # [P, PAGE_SIZE, HKV, D + R]
    v_cache_ptr,  # [P, PAGE_SIZE, HKV, DV]
    page_table_ptr,  # int32 [B, M]
    cu_ptr,  # int32 [B + 1]
    sinks_ptr,  # [HKV * G]
    out_ptr,  # [T, HKV * G, DV], contiguous
    num_rows,  # B
    scale,  # includes log2(e) unless HAS_SOFTCAP
    softcap,
    window,
    table_columns,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_kcp,
    stride_kcs,
    stride_kch,
    stride_vcp,
    stride_vcs,
    stride_vch,
    stride_tb,
    G: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,  # rotary dims behind the first D; > 0 only in MLA
    DV: tl.constexpr,
    BLOCK_B: tl.constexpr,  # next_power_of_2(B)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_RD: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    STAGES: tl.constexpr,
    ONE_LOOP: tl.constexpr,  # mask every block: cheaper than draining a pipeline between loops when prompts are short
    HAS_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    SHARED_KV: tl.constexpr,  # MLA: values are the keys' first DV == D dims
):
    head = tl.program_id(0)  # fastest, so that the heads of a group read the same keys at about the same time
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # a prompt's last tiles see most keys: start with them
    kv_head = head // G
    b = tl.arange(0, BLOCK_B)
    starts = tl.load(cu_ptr + b, mask=b < num_rows, other=0)
    first_tiles = tl.where(b < num_rows, starts // BLOCK_M + b, 2147483647)
    row = tl.sum((first_tiles <= tile).to(tl.int32), 0) - 1
    begin = tl.load(cu_ptr + row)
    length = tl.load(cu_ptr + row + 1) - begin
    m0 = (tile - (begin // BLOCK_M + row)) * BLOCK_M
    if m0 >= length:
        return
    begin = begin.to(tl.int64)
    k_ptr += begin * stride_kt + kv_head * stride_kh
    v_ptr += begin * stride_vt + kv_head * stride_vh

    position = m0 + tl.arange(0, BLOCK_M)
    row_ok = position < length
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    rd = D + tl.arange(0, BLOCK_RD)
    q_rows = q_ptr + (begin + position) * stride_qt + head * stride_qh
    q = tl.load(q_rows[:, None] + d[None, :], mask=row_ok[:, None] & (d < D)[None, :], other=0.0)
    qr = q
    if R > 0:
        qr = tl.load(q_rows[:, None] + rd[None, :], mask=row_ok[:, None] & (rd < D + R)[None, :], other=0.0)

    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # Keys [low, full_low) are cut by the sliding window, [full_low, full_high) seen by every row, [full_high, high) cut
    # by the causal mask. Bounds are multiples of BLOCK_N but for ``high``.
    low = 0
    full_low = 0
    full_high = m0 // BLOCK_N * BLOCK_N
    high = tl.minimum(m0 + BLOCK_M, length)
    if HAS_WINDOW:
        low = tl.maximum(m0 - window + 1, 0) // BLOCK_N * BLOCK_N
        full_low = tl.cdiv(tl.maximum(m0 + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N
        full_low = tl.minimum(tl.maximum(full_low, low), tl.maximum(full_high, low))
        full_high = tl.maximum(full_high, full_low)
    if ONE_LOOP:
        full_high = low
    else:
        if HAS_WINDOW:
            peak, total, acc = _attend_blocks(
                low, full_low, q, qr, k_ptr, v_ptr, position, length, scale, softcap, window, stride_kt, stride_vt, peak,
                total, acc, D, R, DV, BLOCK_N, BLOCK_D, BLOCK_RD, BLOCK_DV, True, True, HAS_SOFTCAP, SHARED_KV, STAGES,
            )  # fmt: skip
        peak, total, acc = _attend_blocks(
            full_low, full_high, q, qr, k_ptr, v_ptr, position, length, scale, softcap, window, stride_kt, stride_vt,
            peak, total, acc, D, R, DV, BLOCK_N, BLOCK_D, BLOCK_RD, BLOCK_DV, False, HAS_WINDOW, HAS_SOFTCAP, SHARED_KV,
            STAGES,
        )  # fmt: skip
    peak, total, acc = _attend_blocks(
        full_high, high, q, qr, k_ptr, v_ptr, position, length, scale, softcap, window, stride_kt, stride_vt, peak,
        total, acc, D, R, DV, BLOCK_N, BLOCK_D, BLOCK_RD, BLOCK_DV, True, HAS_WINDOW, HAS_SOFTCAP, SHARED_KV, STAGES,
    )  # fmt: skip
    if tl.max(tl.max(tl.where(is_finite(acc), 0, 1), 1), 0) > 0:  # a value is no number: again, felt by who sees it
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
        peak, total, acc = _attend_blocks(
            low, high, q, qr, k_ptr, v_ptr, position, length, scale, softcap, window, stride_kt, stride_vt, peak, total, acc,
            D, R, DV, BLOCK_N, BLOCK_D, BLOCK_RD, BLOCK_DV, True, HAS_WINDOW, HAS_SOFTCAP, SHARED_KV, 1, True,
        )  # fmt: skip

    sink = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if HAS_SINKS:
        sink = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
    o = normalize(peak, total, acc, sink)
    o_rows = out_ptr + ((begin + position) * HKV * G + head) * DV
    tl.store(o_rows[:, None] + dv[None, :], o, mask=row_ok[:, None] & (dv < DV)[None, :])

    if head % G == 0:  # the first head of a group fills the pages of its tile's tokens
        column = position // PAGE_SIZE
        if HAS_WINDOW:  # what no later token sees is not kept: ``ops.attention.kept_in_window``
            row_ok = row_ok & (position >= length - window)
        held = row_ok & (column < table_columns)  # what a row cannot hold goes to the null page
        page = tl.load(page_table_ptr + row.to(tl.int64) * stride_tb + column, mask=held, other=0).to(tl.int64)
        slot = position % PAGE_SIZE
        k_rows = k_ptr + position.to(tl.int64) * stride_kt
        c_rows = k_cache_ptr + page * stride_kcp + slot * stride_kcs + kv_head * stride_kch
        ok = row_ok[:, None] & (d < D)[None, :]
        tl.store(c_rows[:, None] + d[None, :], tl.load(k_rows[:, None] + d[None, :], mask=ok), mask=ok)
        if R > 0:
            ok = row_ok[:, None] & (rd < D + R)[None, :]
            tl.store(c_rows[:, None] + rd[None, :], tl.load(k_rows[:, None] + rd[None, :], mask=ok), mask=ok)
        if not SHARED_KV:
            v_rows = v_ptr + position.to(tl.int64) * stride_vt
            c_rows = v_cache_ptr + page * stride_vcp + slot * stride_vcs + kv_head * stride_vch
            ok = row_ok[:, None] & (dv < DV)[None, :]
            tl.store(c_rows[:, None] + dv[None, :], tl.load(v_rows[:, None] + dv[None, :], mask=ok), mask=ok)


@dataclass(frozen=True)
class PrefillConfig:
    """Block shapes of one launch."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    one_loop: bool = False
    max_registers: int | None = None


def choose_config(dims: int, v_dim: int, itemsize: int, shared_memory: int, mean_length: int = 0) -> PrefillConfig:
    """Block shapes for heads of ``dims`` key and ``v_dim`` value dims within ``shared_memory`` bytes per program.

    Short prompts (by their mean, all the host knows) get tiles of which two fit a multiprocessor, as the start and end
    of a program weigh most there; long ones get the largest tiles that registers hold.
    """
    block_d, block_dv = max(16, triton.next_power_of_2(dims)), max(16, triton.next_power_of_2(v_dim))
    if itemsize == 4:  # full-precision dots run on the plain arithmetic units
        config = PrefillConfig(16, 32 if block_d <= 128 else 16, 4, 1)
    elif block_dv > 256:
        config = PrefillConfig(64, 16, 8, 2)
    elif max(block_d, block_dv) > 128:
        config = PrefillConfig(128, 64, 8, 2)
    elif mean_length < 1024:
        config = PrefillConfig(64, 64, 4, 3, one_loop=True)
    else:
        config = PrefillConfig(128, 128, 8, 2)
    while (config.num_stages * config.block_n * (block_d + block_dv) + config.block_m * block_d) * itemsize > shared_memory:
        if config.num_stages > 1:
            config = replace(config, num_stages=config.num_stages - 1)
        elif config.block_n > 16:
            config = replace(config, block_n=config.block_n // 2)
        elif config.block_m > 16:
            config = replace(config, block_m=config.block_m // 2)
        else:
            break
    return config


def attention_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    page_table: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    *,
    shared_memory: int = 224 * 1024,
    v_dim: int | None = None,
    config: PrefillConfig | None = None,
) -> Tensor:
    """``spec_compile::prefill_attention`` on Triton; with ``v`` None it is ``spec_compile::mla_prefill_attention``.

    Args:
        q: [T, Hq, D]; k: [T, Hkv, D]; v: [T, Hkv, Dv], or None: values are the first ``v_dim`` dims of k.
        k_cache: [P, page_size, Hkv, D]; v_cache: [P, page_size, Hkv, Dv], or None like ``v``; of any float type. Written.
        page_table, cu_seqlens, scale, window, softcap, sinks: as in the generic op.
        shared_memory: what one program may use, in bytes.
        config: overrides the choice, for tests and tuning.

    Returns:
        [T, Hq, Dv], contiguous, in q's dtype.
    """
    num_tokens, num_heads, dims = q.shape
    num_kv_heads, num_rows = k.shape[1], cu_seqlens.shape[0] - 1
    v_dim = v.shape[2] if v is not None else v_dim
    rotary = 0 if v is not None else dims - v_dim
    config = config or choose_config(dims - rotary, v_dim, q.element_size(), shared_memory, num_tokens // max(num_rows, 1))
    out = torch.empty(num_tokens, num_heads, v_dim, dtype=q.dtype, device=q.device)
    k = as_cached(k, k_cache.dtype)  # prompts are attended to as the cache holds them; a pass over T, beside attention's T²
    v = None if v is None else as_cached(v, v_cache.dtype)
    value, value_cache = (v, v_cache) if v is not None else (k, k_cache)
    # A cap on registers is what lets two programs share a multiprocessor; it is an option of NVIDIA's compiler only.
    capped = config.max_registers is not None and torch.version.hip is None
    options = {"maxnreg": config.max_registers} if capped else {}
    _prefill_kernel[(num_heads, triton.cdiv(num_tokens, config.block_m) + num_rows)](
        q, k, value, k_cache, value_cache, page_table, cu_seqlens, sinks if sinks is not None else q, out,
        num_rows, scale if softcap > 0 else scale * LOG2_E, float(softcap), window, page_table.shape[1],
        *q.stride()[:2], *k.stride()[:2], *value.stride()[:2], *k_cache.stride()[:3], *value_cache.stride()[:3],
        page_table.stride(0),
        G=num_heads // num_kv_heads, HKV=num_kv_heads, D=dims - rotary, R=rotary, DV=v_dim,
        BLOCK_B=triton.next_power_of_2(num_rows), BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_D=max(16, triton.next_power_of_2(dims - rotary)),
        BLOCK_RD=max(16, triton.next_power_of_2(max(rotary, 1))),
        BLOCK_DV=max(16, triton.next_power_of_2(v_dim)), PAGE_SIZE=k_cache.shape[1],
        STAGES=config.num_stages, ONE_LOOP=config.one_loop, HAS_WINDOW=window > 0, HAS_SOFTCAP=softcap > 0,
        HAS_SINKS=sinks is not None, SHARED_KV=v is None, num_warps=config.num_warps, **options,
    )  # fmt: skip
    return out
