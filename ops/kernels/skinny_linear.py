"""The kernel behind ``ops/skinny_linear.py``.

A program holds BLOCK_N rows of the weight against all tokens and streams through K: nothing is shared between programs and
nothing summed behind them. The weight is the left operand, so that a few tokens fill the narrow side of a tensor core product.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from spec_compile.ops.skinny_tiles import MAX_TOKENS


@triton.jit(do_not_specialize=["num_tokens"])
def _skinny_linear_kernel(
    x_ptr, weight_ptr, out_ptr, num_tokens, N, x_stride, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    token = tl.arange(0, BLOCK_M)
    valid = (token < num_tokens)[None, :]
    dim = tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        weight = tl.load(weight_ptr + row[:, None] * K + (start + dim)[None, :], eviction_policy="evict_first")
        x = tl.load(x_ptr + token[None, :] * x_stride + (start + dim)[:, None], mask=valid, other=0.0)
        acc = tl.dot(weight, x, acc)
    tl.store(out_ptr + token[None, :] * N + row[:, None], acc.to(out_ptr.dtype.element_ty), mask=valid)


def skinny_linear(x: Tensor, weight: Tensor, block_n: int, block_k: int, num_stages: int, num_warps: int) -> Tensor:
    n, k = weight.shape
    tokens = x.reshape(-1, x.shape[-1])
    if tokens.shape[0] > MAX_TOKENS or tokens.shape[1] != k or n % block_n or k % block_k or not weight.is_contiguous():
        raise ValueError(
            f"skinny_linear takes x of at most {MAX_TOKENS} tokens and a contiguous weight whose rows and columns are "
            f"multiples of {block_n} and {block_k}, not x {tuple(x.shape)} and weight {tuple(weight.shape)}."
        )
    if x.dtype != weight.dtype:
        raise ValueError(f"skinny_linear takes x and weight of one dtype, not {x.dtype} and {weight.dtype}.")
    tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
    out = x.new_empty((*x.shape[:-1], n))
    with torch.cuda.device_of(x):
        _skinny_linear_kernel[(n // block_n,)](
            tokens, weight, out, tokens.shape[0], n, tokens.stride(0), k, MAX_TOKENS, block_n, block_k, num_stages,
            num_warps=num_warps,
        )  # fmt: skip
    return out
