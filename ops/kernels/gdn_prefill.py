"""Triton kernels of gated delta nets over packed prompts. Launchers take their op's arguments, documented in
``ops/linear_attention.py``; names in shape comments are those of ``gdn.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spec_compile.ops.kernels.gdn import _dense_last, _precision, _window, gates


@triton.jit
def _prefill_kernel(
    q_ptr, k_ptr, v_ptr, a_ptr, b_ptr, a_log_ptr, dt_bias_ptr, state_ptr, slot_ptr, cu_seqlens_ptr, out_ptr, scale,
    q_st, q_sh, k_st, k_sh, v_st, v_sh, a_st, b_st,
    VALUE_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, LEVELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key_head = head // GROUP
    first = tl.load(cu_seqlens_ptr + row).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + row + 1).to(tl.int64)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    index = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    value = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    a_log, dt_bias = tl.load(a_log_ptr + head), tl.load(dt_bias_ptr + head)
    causal = index[None, :] <= index[:, None]
    state = tl.zeros((BLOCK_V, BLOCK_D), tl.float32)
    for start in range(first, end, BLOCK_N):
        token = start + index
        valid = token < end
        keys = valid[:, None] & (dim < D)[None, :]
        values = valid[:, None] & (value < DV)[None, :]
        q = tl.load(q_ptr + token[:, None] * q_st + key_head * q_sh + dim[None, :], mask=keys, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + token[:, None] * k_st + key_head * k_sh + dim[None, :], mask=keys, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + token[:, None] * v_st + head * v_sh + value[None, :], mask=values, other=0.0).to(tl.float32)
        a = tl.load(a_ptr + token * a_st + head, mask=valid, other=0.0)
        b = tl.load(b_ptr + token * b_st + head, mask=valid, other=0.0)
        g, beta = gates(a, b, a_log, dt_bias)
        g, beta = tl.where(valid, g, 0.0), tl.where(valid, beta, 0.0)  # tokens behind the prompt change nothing
        out, u, total, k = _window(q, k, v, g, beta, state, causal, BLOCK_N, LEVELS, PRECISION)
        at = (token[:, None] * VALUE_HEADS + head) * DV + value[None, :]
        tl.store(out_ptr + at, (out * scale).to(out_ptr.dtype.element_ty), mask=values)
        whole = tl.sum(g, 0)
        weighted = tl.exp(whole - total)[:, None] * u  # [N, V]
        state = tl.exp(whole) * state + tl.dot(tl.trans(weighted), k, input_precision=PRECISION)
    place = ((slot * VALUE_HEADS + head) * DV + value)[:, None] * D + dim[None, :]
    tl.store(state_ptr + place, state, mask=(value < DV)[:, None] & (dim < D)[None, :])


def gdn_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    state_slot: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    *,
    chunk: int,
) -> Tensor:
    """``chunk``: prompt tokens that a program takes at once, a power of two of at least 16."""
    key_heads, key_dim = q.shape[1:]
    value_heads, value_dim = v.shape[1:]
    rows = cu_seqlens.shape[0] - 1
    q, k, v, a, b = (_dense_last(x) for x in (q, k, v, a, b))
    out = q.new_empty(v.shape)
    block_v = min(max(16, triton.next_power_of_2(value_dim)), 32)
    with torch.cuda.device_of(q):
        _prefill_kernel[(triton.cdiv(value_dim, block_v), value_heads, rows)](
            q, k, v, a, b, A_log, dt_bias, state, state_slot, cu_seqlens, out, scale,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], a.stride(0), b.stride(0),
            value_heads, value_heads // key_heads, key_dim, value_dim,
            chunk, chunk.bit_length() - 1, max(16, triton.next_power_of_2(key_dim)), block_v, _precision(q),
            num_warps=8 if chunk > 32 else 4,
        )  # fmt: skip
    return out


@triton.jit
def _conv_prefill_kernel(
    x_ptr, weight_ptr, bias_ptr, cu_seqlens_ptr, out_ptr, x_st, x_sc, T, C, rows,
    TAPS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C
    first = tl.zeros((BLOCK_T,), tl.int64)  # of the token's prompt
    for row in range(rows):
        start = tl.load(cu_seqlens_ptr + row).to(tl.int64)
        first = tl.where(token >= start, start, first)
    total = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for back in tl.static_range(TAPS):
        here = ((token < T) & (token - back >= first))[:, None] & inside[None, :]
        x = tl.load(x_ptr + (token - back)[:, None] * x_st + channel[None, :] * x_sc, mask=here, other=0.0)
        tap = tl.load(weight_ptr + channel * TAPS + (TAPS - 1 - back), mask=inside, other=0.0).to(tl.float32)
        total += x.to(tl.float32) * tap[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = total * tl.sigmoid(total)
    keep = (token < T)[:, None] & inside[None, :]
    tl.store(out_ptr + token[:, None] * C + channel[None, :], total.to(out_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _conv_tail_kernel(
    x_ptr, state_ptr, slot_ptr, cu_seqlens_ptr, x_st, x_sc, state_ss, C,
    STORED: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(1)
    first = tl.load(cu_seqlens_ptr + row).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + row + 1).to(tl.int64)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    kept = tl.arange(0, BLOCK_K)
    token = end - STORED + kept
    mine = (kept < STORED)[:, None] & (channel < C)[None, :]
    x = tl.load(x_ptr + token[:, None] * x_st + channel[None, :] * x_sc, mask=mine & (token >= first)[:, None], other=0.0)
    place = state_ptr + slot * state_ss + kept[:, None] * C + channel[None, :]
    tl.store(place, x.to(state_ptr.dtype.element_ty), mask=mine)


def conv_prefill(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, state_slot: Tensor, cu_seqlens: Tensor
) -> Tensor:
    num_tokens, channels = x.shape
    rows, taps = cu_seqlens.shape[0] - 1, weight.shape[1]
    out = x.new_empty(x.shape)
    block_t, block_c = 32, 128
    with torch.cuda.device_of(x):
        _conv_prefill_kernel[(triton.cdiv(num_tokens, block_t), triton.cdiv(channels, block_c))](
            x, weight.contiguous(), bias, cu_seqlens, out, *x.stride(), num_tokens, channels, rows,
            taps, block_t, block_c, bias is not None,
        )  # fmt: skip
    with torch.cuda.device_of(x):
        _conv_tail_kernel[(triton.cdiv(channels, block_c), rows)](
            x, conv_state, state_slot, cu_seqlens, *x.stride(), conv_state.stride(0), channels,
            taps - 1, triton.next_power_of_2(taps - 1), block_c,
        )  # fmt: skip
    return out
