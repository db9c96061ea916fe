"""What a window leaves for ``gdn_commit``, as a kernel of its own: for providers whose delta rule kernel does not keep it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spec_compile.ops.kernels.gdn import check_fits, gates


@triton.jit
def _save_window_kernel(
    k_ptr, v_ptr, a_ptr, b_ptr, a_log_ptr, dt_bias_ptr, kv_window_ptr, gate_window_ptr, slot_ptr, weights_ptr,
    k_sb, k_sn, k_sh, v_sb, v_sn, v_sh, a_sb, a_sn, b_sb, b_sn, kv_ss, gate_ss,
    N, VALUE_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key_head = head // GROUP
    slot = tl.load(slot_ptr + row).to(tl.int64)
    token = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, BLOCK_D)
    value = tl.arange(0, BLOCK_V)
    valid = token < N
    a_log, dt_bias = tl.load(a_log_ptr + head), tl.load(dt_bias_ptr + head)
    a = tl.load(a_ptr + row * a_sb + token * a_sn + head, mask=valid, other=0.0)
    b = tl.load(b_ptr + row * b_sb + token * b_sn + head, mask=valid, other=0.0)
    g, beta = gates(a, b, a_log, dt_bias)
    gate = gate_window_ptr + slot * gate_ss + token * (2 * VALUE_HEADS) + head
    tl.store(gate, g, mask=valid)
    tl.store(gate + VALUE_HEADS, beta, mask=valid)

    width: tl.constexpr = VALUE_HEADS // GROUP * D + VALUE_HEADS * DV
    entry = kv_window_ptr + slot * kv_ss + token[:, None] * width
    values = valid[:, None] & (value < DV)[None, :]
    v = tl.load(v_ptr + row * v_sb + token[:, None] * v_sn + head * v_sh + value[None, :], mask=values, other=0.0)
    tl.store(entry + (VALUE_HEADS // GROUP * D + head * DV) + value[None, :], v, mask=values)
    if head % GROUP == 0:  # a key head is shared by GROUP value heads: its first one writes it
        keys = valid[:, None] & (dim < D)[None, :]
        k = tl.load(k_ptr + row * k_sb + token[:, None] * k_sn + key_head * k_sh + dim[None, :], mask=keys, other=0.0)
        tl.store(entry + key_head * D + dim[None, :], k, mask=keys)
    if row == 0:
        tl.store(weights_ptr + head, a_log.to(tl.float32))
        tl.store(weights_ptr + VALUE_HEADS + head, dt_bias.to(tl.float32))


def save_window(
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    kv_window: Tensor,
    gate_window: Tensor,
    state_slot: Tensor,
) -> Tensor:
    """Keep keys, values and gates of a window, in one launch; arguments as ``ops.linear_attention.gdn_verify``, a dense last
    dim in all of them.

    Returns:
        float32 [2, Hv]: ``A_log`` and ``dt_bias`` widened, for kernels that take nothing else.
    """
    batch, num_tokens, key_heads, key_dim = k.shape
    value_heads, value_dim = v.shape[2:]
    check_fits(num_tokens, kv_window, gate_window)
    weights = torch.empty(2, value_heads, dtype=torch.float32, device=k.device)
    with torch.cuda.device_of(k):
        _save_window_kernel[(value_heads, batch)](
            k, v, a, b, A_log, dt_bias, kv_window, gate_window, state_slot, weights,
            *k.stride()[:3], *v.stride()[:3], *a.stride()[:2], *b.stride()[:2], kv_window.stride(0), gate_window.stride(0),
            num_tokens, value_heads, value_heads // key_heads, key_dim, value_dim,
            max(2, triton.next_power_of_2(num_tokens)), triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim),
            num_warps=4,
        )  # fmt: skip
    return weights
