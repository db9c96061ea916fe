"""Triton kernels of gated delta nets. Launchers take their op's arguments, documented in ``ops/linear_attention.py``.

A program holds a tile of one head's state, [BLOCK_V, D], and reads it once for a whole window, tree or chain: the window's
inner dependence is a unit lower triangular system of N × N, solved by substitution. A tile is narrow enough for one warp, which
then never waits for another. The commit replays the tokens that stand, one behind another, over such a tile.

Names in shape comments: N window tokens (padded to BLOCK_N), D key dim, V a tile of the value dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spec_compile.ops.kernels.tree_mask import visible_columns, visible_in_word

_EPSILON = tl.constexpr(1e-6)


@triton.jit
def _unit_length(x):
    """Rows of [N, D] scaled to length 1."""
    return x * tl.rsqrt(tl.sum(x * x, 1) + _EPSILON)[:, None]


@triton.jit
def gates(a, b, a_log, dt_bias):
    """Log-decay and strength, float32, as ``ops.linear_attention.gates``."""
    x = a.to(tl.float32) + dt_bias.to(tl.float32)
    e = tl.exp(tl.minimum(x, 20.0))
    small = e * (1.0 - e * (0.5 - e * (0.33333333 - e * 0.25)))  # log1p where 1 + e would round e away
    softplus = tl.where(x > 20.0, x, tl.where(e < 0.01, small, tl.log(1.0 + e)))
    return -tl.exp(a_log.to(tl.float32)) * softplus, tl.sigmoid(b.to(tl.float32))


# ----------------------------------------------------------------------------------------------------------------------
# Windows


@triton.jit
def _product(x, y, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """x [R, D] · y [J, D]ᵀ, float32. WIDE: converted before, for the interpreter, which knows no products of bfloat16."""
    if WIDE:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, tl.trans(y), input_precision=PRECISION)


@triton.jit
def _by_state(x, state, WIDE: tl.constexpr, PRECISION: tl.constexpr):
    """x [R, D] · state [V, D]ᵀ, float32. Two bfloat16 terms hold 16 bits of a state: 2⁻¹⁷ beside the inputs' own 2⁻⁹."""
    if x.dtype == tl.bfloat16:
        high = state.to(tl.bfloat16)
        low = (state - high.to(tl.float32)).to(tl.bfloat16)
        product = _product(x, low, WIDE, PRECISION) + _product(x, high, WIDE, PRECISION)
    else:
        product = _product(x.to(tl.float32), state, WIDE, PRECISION)
    return product


@triton.jit
def _verify_kernel(
    q_ptr, k_ptr, v_ptr, a_ptr, b_ptr, a_log_ptr, dt_bias_ptr, state_ptr, kv_window_ptr, gate_window_ptr, slot_ptr, mask_ptr,
    out_ptr, scale,
    q_sb, q_sn, q_sh, k_sb, k_sn, k_sh, v_sb, v_sn, v_sh, a_sb, a_sn, b_sb, b_sn, kv_ss, gate_ss,
    N, VALUE_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    WORDS: tl.constexpr, HAS_TREE: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Lines are the window's keys, BLOCK_N of them, and behind them its queries; columns are keys, BLOCK_J at a time. Keys'
    lines solve (I + A) u = β (v - decay · S k) by substitution, queries' lines gather their outputs on the way: both subtract
    a coefficient times u of every column, one column behind another."""
    tile, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    key_head = head // GROUP
    slot = tl.load(slot_ptr + row).to(tl.int64)
    line = tl.arange(0, 2 * BLOCK_N)
    token = line % BLOCK_N
    is_key, is_query = line < BLOCK_N, line >= BLOCK_N
    valid = token < N
    dim = tl.arange(0, BLOCK_D)
    value = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (dim < D)[None, :]
    values = (value < DV)[None, :]

    # Every load that waits for nothing, then the state, then what needs them.
    q_at = q_ptr + (row * q_sb + key_head * q_sh + token * q_sn)
    k_at = k_ptr + (row * k_sb + key_head * k_sh + token * k_sn)
    x = tl.load(tl.where(is_query, q_at, k_at)[:, None] + dim[None, :], mask=valid[:, None] & inside, other=0.0)  # [2N, D]
    v_at = v_ptr + (row * v_sb + head * v_sh + token * v_sn)
    kept = (valid & is_key)[:, None] & values
    v = tl.load(v_at[:, None] + value[None, :], mask=kept, other=0.0)  # [2N, V], zeros in queries' lines
    a_log, dt_bias = tl.load(a_log_ptr + head), tl.load(dt_bias_ptr + head)
    a = tl.load(a_ptr + row * a_sb + token * a_sn + head, mask=valid, other=0.0)
    b = tl.load(b_ptr + row * b_sb + token * b_sn + head, mask=valid, other=0.0)
    place = ((slot * VALUE_HEADS + head) * DV + value)[:, None] * D + dim[None, :]
    if DV % BLOCK_V == 0 and D == BLOCK_D:
        state = tl.load(state_ptr + place)  # [V, D]
    else:
        state = tl.load(state_ptr + place, mask=(value < DV)[:, None] & inside, other=0.0)

    g, beta = gates(a, b, a_log, dt_bias)
    total = tl.zeros((2 * BLOCK_N,), tl.float32)  # decay along a token's ancestors and its own
    for start in range(0, BLOCK_N, BLOCK_J):
        col = start + tl.arange(0, BLOCK_J)
        visible = visible_in_word(
            mask_ptr + row * N * WORDS, token, valid, start, col, (col < N) & (col < BLOCK_N), WORDS, HAS_TREE
        )
        a_col = tl.load(a_ptr + row * a_sb + col * a_sn + head, mask=col < N, other=0.0)
        g_col, _ = gates(a_col, a_col, a_log, dt_bias)
        total += tl.sum(tl.where(visible, g_col[None, :], 0.0), 1)

    # Products are of vectors as they come, exact in their own dtype; what makes them unit vectors is applied behind them.
    if BLOCK_J > BLOCK_N:  # one chunk, queries too: squares are on the diagonal of its products
        products = _product(x, x, WIDE, PRECISION)  # [2N, 2N]
        squares = tl.sum(tl.where(line[:, None] == line[None, :], products, 0.0), 1)
    else:
        squares = tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
    length = tl.rsqrt(squares + _EPSILON)  # its inverse
    side = tl.where(is_query, -1.0, beta)
    found = _by_state(x, state, WIDE, PRECISION) * (tl.exp(total) * length)[:, None]
    acc = (v.to(tl.float32) - found) * side[:, None]  # [2N, V]
    for start in range(0, BLOCK_N, BLOCK_J):
        col = start + tl.arange(0, BLOCK_J)
        if BLOCK_J <= BLOCK_N:
            k_col = k_ptr + row * k_sb + key_head * k_sh + col * k_sn
            k = tl.load(k_col[:, None] + dim[None, :], mask=(col < N)[:, None] & inside, other=0.0)  # [J, D]
            products = _product(x, k, WIDE, PRECISION)  # [2N, J]
        visible = visible_in_word(
            mask_ptr + row * N * WORDS, token, valid, start, col, (col < N) & (col < BLOCK_N), WORDS, HAS_TREE
        )
        own = line[:, None] == col[None, :]  # a key is not behind itself, a query is behind its own key
        total_col = tl.sum(tl.where(own, total[:, None], 0.0), 0)
        length_col = tl.sum(tl.where(own, length[:, None], 0.0), 0)
        # Sums in float32: a window whose decays come to 1e4 and more would lose weak ones behind them (prompts do not).
        between = tl.exp(total[:, None] - total_col[None, :])
        coefficients = products * (side * length)[:, None] * length_col[None, :] * between
        coefficients = tl.where(visible & ~own, coefficients, 0.0)
        for here in range(start, tl.minimum(start + BLOCK_J, N)):
            u = tl.sum(tl.where(line[:, None] == here, acc, 0.0), 0)  # [V]
            coefficient = tl.sum(tl.where(col[None, :] == here, coefficients, 0.0), 1)  # [2N]
            # Where it is 0, ``here`` is not seen: it must not be felt either, and may hold NaN.
            acc -= tl.where((coefficient != 0.0)[:, None], coefficient[:, None] * u[None, :], 0.0)
    at = ((row * N + token) * VALUE_HEADS + head) * DV
    written = (valid & is_query)[:, None] & values
    tl.store(out_ptr + at[:, None] + value[None, :], (acc * scale).to(out_ptr.dtype.element_ty), mask=written)

    # What the commit will replay. A key head is shared by GROUP value heads: its first one writes it.
    width: tl.constexpr = VALUE_HEADS // GROUP * D + VALUE_HEADS * DV
    entry = kv_window_ptr + slot * kv_ss + token * width
    tl.store((entry + (VALUE_HEADS // GROUP * D + head * DV))[:, None] + value[None, :], v, mask=kept)
    if tile == 0:
        gate = gate_window_ptr + slot * gate_ss + token * (2 * VALUE_HEADS) + head
        tl.store(gate, g, mask=valid & is_key)
        tl.store(gate + VALUE_HEADS, beta, mask=valid & is_key)
        if head % GROUP == 0:
            keys = (valid & is_key)[:, None] & inside
            k = tl.load(k_at[:, None] + dim[None, :], mask=keys)  # again: kept from above, they would fill the registers
            tl.store((entry + key_head * D)[:, None] + dim[None, :], k, mask=keys)


def gdn_verify(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    kv_window: Tensor,
    gate_window: Tensor,
    state_slot: Tensor,
    tree_mask: Tensor | None,
    scale: float,
    *,
    block_v: int | None = None,
    num_warps: int | None = None,
    max_registers: int | None = None,
) -> Tensor:
    """``block_v``: value dims of a program, a power of two. It, ``num_warps`` and ``max_registers`` of a thread (for NVIDIA's
    compiler alone) are chosen here unless given."""
    batch, num_tokens, key_heads, key_dim = q.shape
    value_heads, value_dim = v.shape[2:]
    check_fits(num_tokens, kv_window, gate_window)
    q, k, v, a, b = (_dense_last(x) for x in (q, k, v, a, b))
    out = q.new_empty(v.shape)
    block_n = max(8, triton.next_power_of_2(num_tokens))
    if block_v is None:
        block_v = _value_tile(batch * value_heads, value_dim, num_tokens)
    limit = {} if max_registers is None else {"maxnreg": max_registers}  # an option of NVIDIA's compiler alone
    with torch.cuda.device_of(q):
        _verify_kernel[(triton.cdiv(value_dim, block_v), value_heads, batch)](
            q, k, v, a, b, A_log, dt_bias, state, kv_window, gate_window, state_slot, _or_any(tree_mask, state_slot),
            out, scale,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *a.stride()[:2], *b.stride()[:2],
            kv_window.stride(0), gate_window.stride(0),
            num_tokens, value_heads, value_heads // key_heads, key_dim, value_dim,
            block_n, 2 * block_n if block_n <= 16 else 16, max(16, triton.next_power_of_2(key_dim)), block_v,
            (num_tokens + 31) // 32, tree_mask is not None, not q.is_cuda, _precision(q),
            num_warps=_verify_warps(block_n, key_dim, q.dtype) if num_warps is None else num_warps, **limit,
        )  # fmt: skip
    return out


def check_fits(num_tokens: int, *windows: Tensor) -> None:
    """Kernels write a window's tokens into ``windows`` [S, W, …] without looking where its slot ends."""
    if any(num_tokens > window.shape[1] for window in windows):
        raise ValueError(f"a window of {num_tokens} tokens, but window buffers for {[w.shape[1] for w in windows]}.")


def _verify_warps(block_n: int, key_dim: int, dtype: torch.dtype) -> int:
    """One where a window's products fit a warp. Four make Hopper's wgmma of larger ones, which Triton 3.6 has compiled wrong
    (gdn_prefill.py says where): only for what every model so far has and tests on an H200 cover."""
    if block_n <= 16:
        return 1
    return 4 if key_dim == 128 and dtype in (torch.bfloat16, torch.float32) else 2


def _value_tile(tiles: int, value_dim: int, num_tokens: int) -> int:
    """Value dims of a program: narrow while that fills the device, wide when heads and rows do it alone, wider where a long
    window's products are what takes time (measured on an H200: 111 µs against 173 for trees of 60, batch 8)."""
    widest = max(16, triton.next_power_of_2(value_dim))
    return min(widest, 16 if tiles < 128 else 32 if num_tokens <= 32 else 64)


def _precision(x: Tensor) -> str:
    """How products of float32 are computed: exactly, or as three of tf32, which is as good, where tensor cores have it."""
    return "tf32x3" if x.device.type == "cuda" and torch.version.hip is None else "ieee"


def _or_any(x: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that kernels may do sums with, never loads."""
    return other if x is None else x


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def _conv_verify_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, window_ptr, slot_ptr, mask_ptr, out_ptr,
    x_sb, x_sn, x_sc, state_ss, window_ss, N, C,
    TAPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    WORDS: tl.constexpr, HAS_TREE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    row = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    token = tl.arange(0, BLOCK_N)
    valid, inside = token < N, channel < C
    visible = visible_columns(mask_ptr + row * N * WORDS, token, valid, token, valid, WORDS, 1, WORDS, HAS_TREE)
    depth = tl.sum(visible.to(tl.int32), 1)  # ancestors and self
    nearest = token  # the ancestor that the tap reads, -1 before the window
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for back in tl.static_range(TAPS):
        if back > 0:
            earlier = visible & (token[None, :] < nearest[:, None])
            nearest = tl.max(tl.where(earlier, token[None, :], -1), 1)
        here = (valid & (nearest >= 0))[:, None] & inside[None, :]
        x = tl.load(x_ptr + row * x_sb + nearest[:, None] * x_sn + channel[None, :] * x_sc, mask=here, other=0.0)
        if back == 0:
            tl.store(window_ptr + slot * window_ss + token[:, None] * C + channel[None, :], x, mask=here)
        stored = TAPS - 2 - (back - depth)  # of TAPS - 1 inputs, the newest last
        before = (valid & (nearest < 0))[:, None] & inside[None, :]
        old = tl.load(state_ptr + slot * state_ss + stored[:, None] * C + channel[None, :], mask=before, other=0.0)
        tap = tl.load(weight_ptr + channel * TAPS + (TAPS - 1 - back), mask=inside, other=0.0).to(tl.float32)
        total += tl.where(here, x.to(tl.float32), old.to(tl.float32)) * tap[None, :]
    if HAS_BIAS:
        total += tl.load(bias_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
    total = total * tl.sigmoid(total)
    at = (row * N + token)[:, None] * C + channel[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=valid[:, None] & inside[None, :])


def conv_verify(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    conv_window: Tensor,
    state_slot: Tensor,
    tree_mask: Tensor | None,
) -> Tensor:
    batch, num_tokens, channels = x.shape
    check_fits(num_tokens, conv_window)
    out = x.new_empty(x.shape)
    block_n = max(2, triton.next_power_of_2(num_tokens))
    block_c = 64 if block_n <= 16 else 32
    with torch.cuda.device_of(x):
        _conv_verify_kernel[(triton.cdiv(channels, block_c), batch)](
            x, weight.contiguous(), bias, conv_state, conv_window, state_slot, _or_any(tree_mask, state_slot), out,
            *x.stride(), conv_state.stride(0), conv_window.stride(0), num_tokens, channels,
            weight.shape[1], block_n, block_c, (num_tokens + 31) // 32, tree_mask is not None, bias is not None,
        )  # fmt: skip
    return out


@triton.jit
def _node(path_ptr, path, step, HAS_PATH: tl.constexpr):
    """Window index of a token that stands."""
    node = step
    if HAS_PATH:
        node = tl.load(path_ptr + path + step)
    return node


@triton.jit
def _token(keys, values, gate, node, dim, value, width, VALUE_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr):
    """Key [C, W], value [V], log-decay and strength of a window's token, as the window kept them."""
    k = tl.load(keys + node * width + dim, mask=dim < D, other=0.0)
    v = tl.load(values + node * width + value, mask=value < DV, other=0.0)
    at = gate + node * (2 * VALUE_HEADS)
    return k, v, tl.load(at), tl.load(at + VALUE_HEADS)


@triton.jit
def _commit_kernel(
    state_ptr, conv_ptr, kv_window_ptr, gate_window_ptr, conv_window_ptr, slot_ptr, path_ptr, count_ptr,
    state_sl, conv_sl, kv_sl, gate_sl, conv_window_sl, kv_ss, gate_ss, conv_window_ss, conv_ss,
    C, PATH_LENGTH, VALUE_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, STORED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, HAS_PATH: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    layer, head = (tl.program_id(1) // VALUE_HEADS).to(tl.int64), tl.program_id(1) % VALUE_HEADS
    count = tl.load(count_ptr + row)
    if count == 0:
        return
    slot = tl.load(slot_ptr + row).to(tl.int64)
    # Key dims as [C, W]: 8 lanes hold the W dims of a line and one thread all C of a value dim, so that what is summed over
    # key dims goes through 3 shuffles. Lines are loaded as a matrix, whose layout is the same in every release of Triton.
    WIDTH: tl.constexpr = BLOCK_D if BLOCK_D < 32 else 32
    CHUNKS: tl.constexpr = BLOCK_D // WIDTH
    dim = tl.arange(0, CHUNKS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    value = tile * BLOCK_V + tl.arange(0, BLOCK_V)
    line = tl.arange(0, CHUNKS * BLOCK_V)
    line_value = tile * BLOCK_V + line % BLOCK_V
    line_dim = (line // BLOCK_V * WIDTH)[:, None] + tl.arange(0, WIDTH)[None, :]
    inside = (line_value < DV)[:, None] & (line_dim < D)
    place = (layer * state_sl + ((slot * VALUE_HEADS + head) * DV + line_value) * D)[:, None] + line_dim
    state = tl.load(state_ptr + place, mask=inside, other=0.0).reshape(CHUNKS, BLOCK_V, WIDTH)
    width: tl.constexpr = VALUE_HEADS // GROUP * D + VALUE_HEADS * DV
    keys = kv_window_ptr + layer * kv_sl + slot * kv_ss + (head // GROUP) * D
    values = kv_window_ptr + layer * kv_sl + slot * kv_ss + VALUE_HEADS // GROUP * D + head * DV
    gate = gate_window_ptr + layer * gate_sl + slot * gate_ss + head
    path, last = row * PATH_LENGTH, count - 1
    k, v, g, beta = _token(keys, values, gate, _node(path_ptr, path, 0, HAS_PATH), dim, value, width, VALUE_HEADS, D, DV)
    following = _node(path_ptr, path, tl.minimum(1, last), HAS_PATH)
    for step in range(count):
        # The next token while this one is worked on: the last asks for itself again.
        k_next, v_next, g_next, beta_next = _token(keys, values, gate, following, dim, value, width, VALUE_HEADS, D, DV)
        following = _node(path_ptr, path, tl.minimum(step + 2, last), HAS_PATH)
        wide = k.to(tl.float32)
        squares = wide[:, None, :] * wide[:, None, :] + tl.zeros_like(state)  # once a value dim: no warp waits for another
        length = tl.rsqrt(tl.sum(tl.sum(squares, 0), 1) + _EPSILON)  # its inverse, [V]
        decay = tl.exp(g)
        found = tl.sum(tl.sum(state * wide[:, None, :], 0), 1) * length * decay  # [V]
        u = beta * (v.to(tl.float32) - found) * length
        state = state * decay + u[None, :, None] * wide[:, None, :]
        k, v, g, beta = k_next, v_next, g_next, beta_next
    tl.store(state_ptr + place, state.reshape(CHUNKS * BLOCK_V, WIDTH), mask=inside)

    if tile == 0:  # each head's first program also moves its share of the convolution's inputs
        channel = head * tl.cdiv(C, VALUE_HEADS) + tl.arange(0, BLOCK_C)
        mine = (tl.arange(0, BLOCK_C) < tl.cdiv(C, VALUE_HEADS)) & (channel < C)
        kept = tl.arange(0, BLOCK_K)
        source = kept + count  # among the stored inputs and, behind them, those that stand
        old = (source < STORED)[:, None] & (kept < STORED)[:, None] & mine[None, :]
        new = (source >= STORED)[:, None] & (kept < STORED)[:, None] & mine[None, :]
        standing = source - STORED
        if HAS_PATH:
            place_in_path = path_ptr + row * PATH_LENGTH + standing
            standing = tl.load(place_in_path, mask=(standing >= 0) & (kept < STORED), other=0)
        states = conv_ptr + layer * conv_sl + slot * conv_ss
        moved = tl.load(states + source[:, None] * C + channel[None, :], mask=old, other=0.0)
        fresh = conv_window_ptr + layer * conv_window_sl + slot * conv_window_ss
        taken = tl.load(fresh + standing[:, None] * C + channel[None, :], mask=new, other=0.0)
        tl.debug_barrier()  # all have read what others now overwrite
        result = tl.where(old, moved, taken.to(moved.dtype))
        tl.store(states + kept[:, None] * C + channel[None, :], result, mask=old | new)


def gdn_commit(
    state: Tensor,
    conv_state: Tensor,
    kv_window: Tensor,
    gate_window: Tensor,
    conv_window: Tensor,
    state_slot: Tensor,
    path: Tensor | None,
    count: Tensor,
    *,
    block_v: int = 32,
    num_warps: int = 2,
) -> None:
    """``block_v``: value dims of a program at most, a power of two."""
    layers, _, value_heads, value_dim, key_dim = state.shape
    key_heads = (kv_window.shape[-1] - value_heads * value_dim) // key_dim
    channels, stored = conv_state.shape[-1], conv_state.shape[2]
    block_v = min(block_v, triton.next_power_of_2(value_dim))
    with torch.cuda.device_of(state):
        _commit_kernel[(triton.cdiv(value_dim, block_v), layers * value_heads, count.shape[0])](
            state, conv_state, kv_window, gate_window, conv_window, state_slot, path, count,
            *(x.stride(0) for x in (state, conv_state, kv_window, gate_window, conv_window)),
            *(x.stride(1) for x in (kv_window, gate_window, conv_window, conv_state)),
            channels, 0 if path is None else path.shape[1], value_heads, value_heads // key_heads, key_dim, value_dim, stored,
            max(16, triton.next_power_of_2(key_dim)), block_v, triton.next_power_of_2(stored),
            triton.next_power_of_2(triton.cdiv(channels, value_heads)), path is not None, num_warps=num_warps,
        )  # fmt: skip
