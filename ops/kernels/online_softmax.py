"""Device functions that the attention kernels share: logits, one step of online softmax, the final division.

Method: online softmax (FlashAttention, Dao et al. 2022). Logits are base 2: ``exp2`` is one instruction.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634


@triton.jit
def soft_cap(scores, softcap):
    """``softcap * tanh(scores / softcap)``, through exp2 of a negative number so that it cannot overflow."""
    x = scores / softcap
    e = tl.exp2(tl.abs(x) * -2.8853900817779268)  # exp(-2|x|)
    t = (1.0 - e) / (1.0 + e)
    return softcap * tl.where(x < 0, -t, t)


@triton.jit
def online_softmax_step(scores, v, peak, total, acc):
    """One block of online softmax. ``scores`` are base-2 logits with -inf where invisible; a hidden row stays 0."""
    new_peak = tl.maximum(peak, tl.max(scores, 1))
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # -inf - -inf is NaN
    p = tl.exp2(scores - shift[:, None])
    alpha = tl.exp2(peak - shift)
    total = total * alpha + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return new_peak, total, acc


@triton.jit
def normalize(peak, total, acc, sink):
    """Final division; ``sink`` is the base-2 sink logit of each row, -inf where there is none."""
    new_peak = tl.maximum(peak, sink)
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    alpha = tl.exp2(peak - shift)
    total = total * alpha + tl.exp2(sink - shift)
    return acc * (alpha / tl.where(total == 0.0, 1.0, total))[:, None]


@triton.jit
def is_finite(x):
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def any_broken(v):
    """Which rows of ``v`` [BLOCK, dims] are not finite: bool [BLOCK, 1]; for ``ops.attention.hide_broken``."""
    return tl.max(tl.where(is_finite(v), 0, 1), 1)[:, None] > 0


@triton.jit
def logits(q, qr, k, kr, scale, softcap, HAS_ROPE: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """Base-2 logits [BLOCK_M, BLOCK_N] of q against k [BLOCK_N, BLOCK_D] and, in MLA, their rotary parts."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if HAS_ROPE:
        scores = tl.dot(qr, tl.trans(kr), scores, input_precision="ieee")
    scores = scores * scale
    if HAS_SOFTCAP:
        scores = soft_cap(scores, softcap) * 1.4426950408889634
    return scores
