"""Packed prompts as delta rule kernels by others take them: dense, with queries and keys of unit length, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spec_compile.ops.kernels.gdn import _unit_length


@triton.jit
def _unit_kernel(
    q_ptr, k_ptr, v_ptr, q_out_ptr, k_out_ptr, v_out_ptr, q_st, q_sh, k_st, k_sh, v_st, v_sh, T,
    KEY_HEADS: tl.constexpr, VALUE_HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    token = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    value = tl.arange(0, BLOCK_V)
    dim = tl.arange(0, BLOCK_D)
    values = (token < T)[:, None] & (value < DV)[None, :]
    v = tl.load(v_ptr + token[:, None] * v_st + head * v_sh + value[None, :], mask=values, other=0.0)
    tl.store(v_out_ptr + (token * VALUE_HEADS + head)[:, None] * DV + value[None, :], v, mask=values)
    if head < KEY_HEADS:
        keys = (token < T)[:, None] & (dim < D)[None, :]
        at = (token * KEY_HEADS + head)[:, None] * D + dim[None, :]
        q = tl.load(q_ptr + token[:, None] * q_st + head * q_sh + dim[None, :], mask=keys, other=0.0).to(tl.float32)
        k = tl.load(k_ptr + token[:, None] * k_st + head * k_sh + dim[None, :], mask=keys, other=0.0).to(tl.float32)
        tl.store(q_out_ptr + at, _unit_length(q).to(q_out_ptr.dtype.element_ty), mask=keys)
        tl.store(k_out_ptr + at, _unit_length(k).to(k_out_ptr.dtype.element_ty), mask=keys)


def unit_prompts(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys scaled to length 1 and rounded to their type, values as they are; all contiguous.

    Args:
        q, k: [T, Hk, D]; v: [T, Hv, Dv], at least as many heads. Any strides with a contiguous last dim.
    """
    (tokens, key_heads, key_dim), (value_heads, value_dim) = q.shape, v.shape[1:]
    dense = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    block_t = 16
    with torch.cuda.device_of(q):
        _unit_kernel[(triton.cdiv(tokens, block_t), value_heads)](
            q, k, v, *dense, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], tokens,
            key_heads, value_heads, key_dim, value_dim,
            block_t, triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim), num_warps=4,
        )  # fmt: skip
    return dense[0], dense[1], dense[2]
