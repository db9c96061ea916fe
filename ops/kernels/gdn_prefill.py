"""Triton kernels of gated delta nets over packed prompts. Launchers take their op's arguments, documented in
``ops/linear_attention.py``; names in shape comments are those of ``gdn.py``.

Method: the chunked form of Yang et al., "Gated Delta Networks" (arXiv 2412.06464, section 3.3). With S [D, V] the state before
a chunk of N tokens, Γ the decays since then, A the strictly lower triangular β Γ k kᵀ and T = (I + A)⁻¹:

    w = T (β Γ k),  u = T (β v),  v' = u − w S,  o = Γ q S + P v',  S ← Γ_N S + (Γ_N / Γ k)ᵀ v'

where P holds the causal, decayed q kᵀ. What does not depend on S is computed for all chunks at once: w, u, and by putting v'
into o also q' = Γ q − P w and o' = P u, so that o = o' + q' S. Only two products a chunk are left one behind the other.

Chunks of a packed batch lie in tiles: prompt b starts at tile ``cu_seqlens[b] // N + b``, which leaves room for every prompt's
last partial chunk, so that T // N + B tiles always suffice and lengths stay on the device.

Products take raw keys and queries, exact in their type, and scale to unit length afterwards. For bfloat16 the other factors
(T, P, S, v') are rounded to bfloat16 as well, as flash-linear-attention does (fla/ops/common/chunk_delta_h.py); the state is
summed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spec_compile.ops.kernels.gdn import _EPSILON, _dense_last, _precision, gates

_BLOCK = tl.constexpr(16)  # tokens whose system is solved row by row: a warp's rows of a product's result

# Products of 64 rows over four warps become Hopper's wgmma, and of those Triton 3.6 compiled some for these kernels that read
# outside shared memory (compute-sanitizer on an H200: 16 key dims, and 128 without pipelining) and gave wrong results. Chunks
# of 32 tokens, and two warps where a product has as many rows as a key has dims, keep to mma.
_MAX_CHUNK = 32


@triton.jit
def _inverse(system, BLOCK_N: tl.constexpr, LEVELS: tl.constexpr, JOINED: tl.constexpr, PRECISION: tl.constexpr):
    """(I + system)⁻¹ of a strictly lower triangular [N, N]: blocks of 16 on the diagonal by elimination, all at once, then
    joined two by two, ``LEVELS`` = log2(N / 16) times, in products of type ``JOINED``. No entry is larger than 1."""
    BLOCKS: tl.constexpr = BLOCK_N // _BLOCK
    which = tl.arange(0, BLOCKS)
    on_diagonal = (which[:, None] == which[None, :])[:, None, :, None]
    parts = tl.reshape(system, (BLOCKS, _BLOCK, BLOCKS, _BLOCK))
    diagonal = tl.sum(tl.where(on_diagonal, parts, 0.0), 2)  # [N / 16, 16, 16]
    index = tl.arange(0, _BLOCK)
    row, col = index[None, :, None], index[None, None, :]
    solved = tl.where(row == col, 1.0, 0.0) + tl.zeros_like(diagonal)
    for token in tl.static_range(_BLOCK - 1):  # whose row is done: take it off those below
        factor = tl.sum(tl.where(col == token, diagonal, 0.0), 2)
        done = tl.sum(tl.where(row == token, solved, 0.0), 1)
        solved -= factor[:, :, None] * done[:, None, :]
    inverse = tl.reshape(tl.where(on_diagonal, solved[:, :, None, :], 0.0), (BLOCK_N, BLOCK_N))

    row = tl.arange(0, BLOCK_N)[:, None]
    col = tl.arange(0, BLOCK_N)[None, :]
    for level in tl.static_range(LEVELS):
        below = ((row >> (level + 4)) ^ (col >> (level + 4))) == 1  # neighbours of one pair; above them the system is 0
        blocks = inverse.to(JOINED)
        right = tl.dot(tl.where(below, system, 0.0).to(JOINED), blocks, input_precision=PRECISION)
        inverse -= tl.dot(blocks, right.to(JOINED), input_precision=PRECISION)
    return inverse


@triton.jit(do_not_specialize=["num_rows"])
def _chunk_kernel(
    q_ptr, k_ptr, v_ptr, a_ptr, b_ptr, a_log_ptr, dt_bias_ptr, cu_seqlens_ptr,
    w_ptr,  # [TILES, Hv, N, BLOCK_D]
    query_ptr,  # q', like w
    u_ptr,  # [TILES, Hv, N, BLOCK_DV]
    decay_ptr,  # float32 [TILES, Hv, N]: from each token to its chunk's end, divided by its key's length
    whole_ptr,  # float32 [TILES, Hv]: of the whole chunk
    out_ptr,  # [T, Hv, Dv]: o'
    num_rows, scale,
    q_st, q_sh, k_st, k_sh, v_st, v_sh, a_st, b_st,
    VALUE_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_B: tl.constexpr,  # next_power_of_2(B)
    BLOCK_N: tl.constexpr, LEVELS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_V: tl.constexpr,
    JOINED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one value head: all that does not depend on the state."""
    tile = tl.program_id(0)  # the axis without a limit of 65535
    head = tl.program_id(1)
    rows = tl.arange(0, BLOCK_B)
    starts = tl.load(cu_seqlens_ptr + rows, mask=rows < num_rows, other=0)
    first_tiles = tl.where(rows < num_rows, starts // BLOCK_N + rows, 2147483647)
    row = tl.sum((first_tiles <= tile).to(tl.int32), 0) - 1
    begin = tl.load(cu_seqlens_ptr + row)
    first = begin + (tile - (begin // BLOCK_N + row)) * BLOCK_N
    count = tl.load(cu_seqlens_ptr + row + 1) - first
    if count <= 0:
        return
    operand: tl.constexpr = w_ptr.dtype.element_ty
    first = first.to(tl.int64)
    place = tile.to(tl.int64) * VALUE_HEADS + head  # of the tile's scratch
    # Each tensor's chunk; offsets inside one fit into 32 bits.
    q_ptr += first * q_st + (head // GROUP) * q_sh
    k_ptr += first * k_st + (head // GROUP) * k_sh
    v_ptr += first * v_st + head * v_sh
    out_ptr += (first * VALUE_HEADS + head) * DV
    w_ptr += place * (BLOCK_N * BLOCK_D)
    query_ptr += place * (BLOCK_N * BLOCK_D)
    u_ptr += place * (BLOCK_N * BLOCK_DV)
    index = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    valid = index < count
    keys = valid[:, None] & (dim < D)[None, :]
    across = index[:, None] * BLOCK_D + dim[None, :]

    a = tl.load(a_ptr + first * a_st + index * a_st + head, mask=valid, other=0.0)
    b = tl.load(b_ptr + first * b_st + index * b_st + head, mask=valid, other=0.0)
    g, beta = gates(a, b, tl.load(a_log_ptr + head), tl.load(dt_bias_ptr + head))
    g, beta = tl.where(valid, g, 0.0), tl.where(valid, beta, 0.0)  # tokens behind the prompt change nothing
    # Summed in whole numbers and small rests: float32 alone would lose weak decays behind strong ones.
    large = tl.floor(g + 0.5)
    small = g - large
    larges, smalls = tl.cumsum(large, 0), tl.cumsum(small, 0)  # [N]
    rest = (tl.sum(large, 0) - larges) + (tl.sum(small, 0) - smalls)
    since = tl.exp(larges + smalls)  # the chunk's begin
    tl.store(whole_ptr + place, tl.exp(tl.sum(g, 0)))

    k = tl.load(k_ptr + index[:, None] * k_st + dim[None, :], mask=keys, other=0.0).to(operand)
    at_q = q_ptr + index[:, None] * q_st + dim[None, :]
    q = tl.load(at_q, mask=keys, other=0.0).to(operand)
    products = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    weights = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    squares = tl.sum(tl.where(index[:, None] == index[None, :], products, 0.0), 1) + _EPSILON  # of keys' lengths
    unit = tl.rsqrt(squares)
    tl.store(decay_ptr + place * BLOCK_N + index, tl.exp(tl.minimum(rest, 0.0)) * unit)
    between = (larges[:, None] - larges[None, :]) + (smalls[:, None] - smalls[None, :])
    between = tl.where(index[None, :] <= index[:, None], tl.exp(tl.minimum(between, 0.0)), 0.0) * unit[None, :]
    weights = (between * weights).to(operand)  # P, but for the queries' lengths
    system = tl.where(index[None, :] < index[:, None], between * products, 0.0) * (beta * unit)[:, None]
    inverse = _inverse(system, BLOCK_N, LEVELS, JOINED, PRECISION)

    inverse *= (beta * unit)[None, :]
    left = (inverse * since[None, :]).to(operand)
    # β alone: as a row it would be computed anew, out of registers kept for it from the beginning.
    inverse = (inverse * tl.sqrt(squares)[None, :]).to(operand)
    w = tl.dot(left, k, input_precision=PRECISION).to(operand)
    tl.store(w_ptr + across, w)
    q = tl.load(at_q, mask=keys, other=0.0).to(tl.float32)  # again: registers are scarce
    length = scale * tl.rsqrt(tl.sum(q * q, 1) + _EPSILON)  # by which a query of unit length is multiplied
    query = length[:, None] * (since[:, None] * q - tl.dot(weights, w, input_precision=PRECISION))
    tl.store(query_ptr + across, query.to(operand))

    for start in range(0, BLOCK_DV, BLOCK_V):
        value = start + tl.arange(0, BLOCK_V)
        values = valid[:, None] & (value < DV)[None, :]
        v = tl.load(v_ptr + index[:, None] * v_st + value[None, :], mask=values, other=0.0).to(operand)
        u = tl.dot(inverse, v, input_precision=PRECISION).to(operand)
        tl.store(u_ptr + index[:, None] * BLOCK_DV + value[None, :], u)
        out = length[:, None] * tl.dot(weights, u, input_precision=PRECISION)
        at = index[:, None] * (VALUE_HEADS * DV) + value[None, :]
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=values)


@triton.jit
def _state_kernel(
    k_ptr, w_ptr, query_ptr, u_ptr, decay_ptr, whole_ptr, state_ptr, slot_ptr, cu_seqlens_ptr, out_ptr,
    k_st, k_sh,
    VALUE_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_V: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One prompt's chunks one behind another, for a tile of one head's values. Scratch as ``_chunk_kernel`` left it."""
    part, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_seqlens_ptr + row)
    end = tl.load(cu_seqlens_ptr + row + 1)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    operand: tl.constexpr = w_ptr.dtype.element_ty
    index = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    value = part * BLOCK_V + tl.arange(0, BLOCK_V)
    first_place = (begin // BLOCK_N + row).to(tl.int64) * VALUE_HEADS + head
    first_key = k_ptr + begin.to(tl.int64) * k_st + (head // GROUP) * k_sh
    first_out = out_ptr + (begin.to(tl.int64) * VALUE_HEADS + head) * DV
    state = tl.zeros((BLOCK_D, BLOCK_V), tl.float32)
    for chunk in tl.range(0, tl.cdiv(end - begin, BLOCK_N), num_stages=STAGES):
        place = first_place + chunk * VALUE_HEADS
        across = place * (BLOCK_N * BLOCK_D) + index[:, None] * BLOCK_D + dim[None, :]
        w = tl.load(w_ptr + across)
        u = tl.load(u_ptr + (place * BLOCK_N + index)[:, None] * BLOCK_DV + value[None, :])
        query = tl.load(query_ptr + across)
        token = chunk * BLOCK_N + index
        keys = (token < end - begin)[:, None] & (dim < D)[None, :]
        k = tl.load(first_key + token.to(tl.int64)[:, None] * k_st + dim[None, :], mask=keys, other=0.0).to(operand)
        decay = tl.load(decay_ptr + place * BLOCK_N + index)
        before = state.to(operand)
        fresh = u.to(tl.float32) - tl.dot(w, before, input_precision=PRECISION)  # v' [N, V]
        at = first_out + token.to(tl.int64)[:, None] * (VALUE_HEADS * DV) + value[None, :]
        values = (token < end - begin)[:, None] & (value < DV)[None, :]
        out = tl.load(at, mask=values, other=0.0).to(tl.float32) + tl.dot(query, before, input_precision=PRECISION)
        tl.store(at, out.to(out_ptr.dtype.element_ty), mask=values)
        fresh = (decay[:, None] * fresh).to(operand)
        state = tl.load(whole_ptr + place) * state + tl.dot(tl.trans(k), fresh, input_precision=PRECISION)
    at = state_ptr + ((slot * VALUE_HEADS + head) * DV + value)[None, :] * D + dim[:, None]
    tl.store(at, state, mask=(value < DV)[None, :] & (dim < D)[:, None])


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
    block_v: int = 16,
    chunk_block_v: int = 64,
    chunk_warps: int = 4,
    chunk_registers: int | None = None,
    state_warps: int = 2,
    stages: int | None = None,
) -> Tensor:
    """As ``spec_compile::gdn_prefill``, in two launches: all chunks at once, then each prompt's chunks one behind another.

    Scratch of (T // chunk + B) * chunk * Hv * (2 * D + Dv) elements is taken from the allocator for the call, D and Dv rounded
    up to powers of 2: 24 KiB a token for 32 heads of 128 dims. It is bfloat16 for bfloat16 inputs, otherwise float32.

    Args:
        chunk: the most prompt tokens of a chunk, a power of two of at least 16.
        block_v, state_warps, stages: value dims of a program, warps and pipeline stages of the second launch.
        chunk_block_v, chunk_warps, chunk_registers: value dims taken at once, warps, and the most registers of a thread (None:
            the compiler's choice; NVIDIA only) of the first.
    """
    key_heads, key_dim = q.shape[1:]
    num_tokens, value_heads, value_dim = v.shape
    rows = cu_seqlens.shape[0] - 1
    q, k, v, a, b = (_dense_last(x) for x in (q, k, v, a, b))
    out = q.new_empty(v.shape)
    block_d = max(16, triton.next_power_of_2(key_dim))
    block_dv = max(16, triton.next_power_of_2(value_dim))
    operand, precision = _operands(q)
    chunk = min(chunk, _MAX_CHUNK)
    tiles = num_tokens // chunk + rows
    w, query = (q.new_empty(tiles, value_heads, chunk, block_d, dtype=operand) for _ in range(2))
    u = q.new_empty(tiles, value_heads, chunk, block_dv, dtype=operand)
    decay = q.new_empty(tiles, value_heads, chunk, dtype=torch.float32)
    whole = q.new_empty(tiles, value_heads, dtype=torch.float32)
    group, block_v = value_heads // key_heads, min(block_v, block_dv)
    if stages is None:
        stages = 2 if operand == torch.bfloat16 else 1  # what fits into shared memory
    with torch.cuda.device_of(q):
        _chunk_kernel[(tiles, value_heads)](
            q, k, v, a, b, A_log, dt_bias, cu_seqlens, w, query, u, decay, whole, out, rows, scale,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], a.stride(0), b.stride(0),
            value_heads, group, key_dim, value_dim, triton.next_power_of_2(rows),
            chunk, (chunk // 16).bit_length() - 1, block_d, block_dv, min(chunk_block_v, block_dv),
            tl.float32 if q.dtype == torch.float32 else tl.float16, precision,
            num_warps=chunk_warps, **({} if chunk_registers is None else {"maxnreg": chunk_registers}),
        )  # fmt: skip
        _state_kernel[(triton.cdiv(value_dim, block_v), value_heads, rows)](
            k, w, query, u, decay, whole, state, state_slot, cu_seqlens, out, *k.stride()[:2],
            value_heads, group, key_dim, value_dim, chunk, block_d, block_dv, block_v, stages, precision,
            num_warps=state_warps,
        )  # fmt: skip
    return out


def _operands(x: Tensor) -> tuple[torch.dtype, str]:
    """The type that products are computed from, and how those of float32 are.

    tf32 is as precise as float16, whose own range is too small for values divided by a short key's length.
    """
    exact = _precision(x)
    if x.dtype == torch.float32:
        return x.dtype, exact
    return torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32, "tf32" if exact == "tf32x3" else exact


# ----------------------------------------------------------------------------------------------------------------------
# The causal convolution


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
