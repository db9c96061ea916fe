"""A few tokens through a linear layer, which is one read of its weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("spec_compile::skinny_linear", mutates_args=(), device_types="cuda")
def skinny_linear(x: Tensor, weight: Tensor, block_n: int, block_k: int, num_stages: int, num_warps: int) -> Tensor:
    """``F.linear(x, weight)`` of at most 16 tokens by a Triton kernel, summed in float32.

    Args:
        x: [..., K], float16 or bfloat16; the leading dims hold at most 16 tokens (``skinny_tiles.MAX_TOKENS``).
        weight: [N, K], contiguous, of the same dtype.
        block_n: weight rows of a program; N is a multiple of it.
        block_k: of each of them, what is read at once; K is a multiple of it.
        num_stages: reads in flight.
        num_warps: of a program.

    Returns:
        [..., N], contiguous.

    Raises:
        ValueError: shapes or dtypes are others.
    """
    from spec_compile.ops.kernels import skinny_linear as kernel

    return kernel.skinny_linear(x, weight, block_n, block_k, num_stages, num_warps)


@skinny_linear.register_fake
def _(x: Tensor, weight: Tensor, block_n: int, block_k: int, num_stages: int, num_warps: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@skinny_linear.register_kernel("cpu")
def skinny_linear_reference(
    x: Tensor, weight: Tensor, block_n: int, block_k: int, num_stages: int, num_warps: int
) -> Tensor:  # fmt: skip
    """The same in torch."""
    del block_n, block_k, num_stages, num_warps
    return F.linear(x, weight)
