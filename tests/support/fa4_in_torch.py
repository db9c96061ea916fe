"""FlashAttention-4's forward in PyTorch, with its argument checks, to test on a CPU what stands around it."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor

from spec_compile.ops import attention as generic
from spec_compile.ops.cascade import attend_with_lse


def flash_attn_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    page_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    learnable_sink: Tensor | None = None,
    tile_mn: tuple[int, int] | None = None,
    num_splits: int = 1,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    """The arguments and assertions of ``flash_attn.cute.interface._flash_attn_fwd`` (4.0.0b36) that the provider meets.

    Where FA4 leaves a value undefined, this one leaves NaN: the output of a row without keys.
    """
    assert q.dtype == k.dtype == v.dtype and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert num_splits == 1, "SplitKV not supported on SM 9.0"
    assert out is not None and out.is_contiguous() and out.dtype == q.dtype
    if page_table is None:
        _packed(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, softmax_scale, causal, softcap, window_size_left,
                window_size_right, learnable_sink, out)  # fmt: skip
        return
    batch, num_tokens, num_heads, _ = q.shape
    assert not causal and cu_seqlens_k is None and learnable_sink is None and window_size_left is None
    assert page_table.dtype == torch.int32 and page_table.shape[0] == batch and page_table.stride(-1) == 1
    assert seqused_k is not None and seqused_k.dtype == torch.int32 and seqused_k.shape == (batch,)
    assert lse is not None and lse.shape == (batch, num_heads, num_tokens) and lse.dtype == torch.float32
    slots = generic.cache_slots(page_table, k.shape[1])
    visible = (torch.arange(slots.shape[1]) < seqused_k[:, None])[:, None].expand(-1, num_tokens, -1)
    keys, values = k.flatten(0, 1)[slots], v.flatten(0, 1)[slots]
    result, result_lse = attend_with_lse(q, keys, values, visible, softmax_scale, softcap or 0.0)
    out.copy_(result.masked_fill((seqused_k == 0)[:, None, None, None], float("nan")))
    lse.copy_(result_lse.transpose(1, 2))


def _packed(q, k, v, cu_q, cu_k, max_seqlen, scale, causal, softcap, left, right, sinks, out) -> None:
    assert causal and right is None and cu_q is cu_k and cu_q.dtype == torch.int32 and max_seqlen >= cu_q.diff().max()
    visible = generic._packed_visibility(cu_q, q.shape[0], 0 if left is None else left + 1)
    result = generic.masked_softmax_attend(q[None], k[None], v[None], visible[None], scale, softcap or 0.0, sinks)
    out.copy_(result[0])


def interface() -> SimpleNamespace:
    """Stands for the module ``flash_attn.cute.interface``."""
    return SimpleNamespace(_flash_attn_fwd=flash_attn_fwd)
