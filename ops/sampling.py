"""Randomness without state, sampling, and the logits warpers of ``generate()``.

Every random number is a hash of (the row's seed, the token's position, a stream, for noise the vocabulary id). Nothing
is advanced: a row's sample does not depend on its batch, on the bucket it was padded to, or on which replay of a CUDA
graph drew it, and CPU and CUDA draw the same numbers.

Shapes: B rows, V vocabulary, R rows of logits (often B * N), N window tokens, E end-of-sequence ids.

Why position may key the noise although rounds overlap: which tokens a row has emitted up to position i is a function of
noise at positions <= i only, since everything drafted behind the first rejection is thrown away. So the next round may
draw at the same later positions again.

Source of the hashes: splitmix64 (Steele et al., 2014) for keys, triple32 (C. Wellons, hash-prospector) for vocabulary
ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Streams: what a number is used for. Draft proposals, acceptance tests and resampling must be independent.
DRAFT_STREAM = 0
ACCEPT_STREAM = 1
TARGET_STREAM = 2

# Hash constants. Python integers of torch ops are signed, hence the wrap-around.
GOLDEN_64 = 0x9E3779B97F4A7C15 - (1 << 64)
MIX_64_A = 0xBF58476D1CE4E5B9 - (1 << 64)
MIX_64_B = 0x94D049BB133111EB - (1 << 64)
GOLDEN_32 = 0x9E3779B1 - (1 << 32)
MIX_32_A = 0xED5AD4BB - (1 << 32)
MIX_32_B = 0xAC4C1B51 - (1 << 32)
MIX_32_C = 0x31848BAB

# The largest float32 below 1: a uniform of exactly 1 would make an exponential infinite.
ALMOST_ONE = 1.0 - 2.0**-24


def _shift_right_64(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix_64(x: Tensor) -> Tensor:
    x = (x ^ _shift_right_64(x, 30)) * MIX_64_A
    x = (x ^ _shift_right_64(x, 27)) * MIX_64_B
    return x ^ _shift_right_64(x, 31)


def noise_key(seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """The 64-bit hash of (seed, position, stream): int64, the broadcast shape of ``seed`` and ``position``."""
    # (stream + 1) * golden, wrapped into int64 here so that torch never sees a wider Python integer.
    salt = ((stream + 1) * GOLDEN_64 + (1 << 63)) % (1 << 64) - (1 << 63)
    return _mix_64(_mix_64(seed.long() + salt) + position.long() * GOLDEN_64)


def _unit_interval(bits: Tensor) -> Tensor:
    """31 random bits to float32 in (0, 1). Small values keep their relative precision, which 24 bits would lose."""
    return ((bits.float() + 0.5) * 2.0**-31).clamp(max=ALMOST_ONE)


def uniform(seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """One uniform number per (row, position), bit-identical on every device.

    Args:
        seed: int64 [B] (or anything that broadcasts with ``position``).
        position: int32 or int64 [B], or [B, J] with ``seed`` [B, 1].
        stream: one of the streams above.

    Returns:
        float32 in (0, 1), the broadcast shape.
    """
    return _unit_interval(_shift_right_64(noise_key(seed, position, stream), 33))


def exponential(seed: Tensor, position: Tensor, stream: int, vocab_size: int) -> Tensor:
    """One exponential number per (row, position, vocabulary id); always positive and finite.

    Args:
        seed: int64 [B].
        position: int32 or int64 [B].

    Returns:
        float32 [B, vocab_size].
    """
    key = noise_key(seed, position, stream)[:, None]  # [B, 1]
    low, high = key.to(torch.int32), (key >> 32).to(torch.int32)  # to() keeps the low 32 bits
    x = torch.arange(vocab_size, dtype=torch.int32, device=key.device) * GOLDEN_32 + low  # [B, V], wraps
    # In place from here on: on a CPU the noise is most of a sample's time. `& mask` makes the shifts logical.
    x ^= (x >> 17).bitwise_and_(0x7FFF)
    x.mul_(MIX_32_A).add_(high)
    x ^= (x >> 11).bitwise_and_(0x1FFFFF)
    x.mul_(MIX_32_B)
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x.mul_(MIX_32_C)
    x ^= (x >> 14).bitwise_and_(0x3FFFF)
    bits = (x >> 1).bitwise_and_(0x7FFFFFFF)
    # -log(1 - u) and not -log(u): the race is won by small numbers, so those must be the fine-grained ones.
    return _unit_interval(bits).neg_().log1p_().neg_()


def race(weights: Tensor, seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """Sample from unnormalised ``weights`` [B, V] by an exponential race: argmax(weight / E). int64 [B].

    Weight 0 never wins while any weight is positive: E is positive, so 0 / E is 0. NaN wins over everything, so that the token
    drawn from weights that are not finite tells of it.
    """
    return (weights.float() / exponential(seed, position, stream, weights.shape[-1])).argmax(-1)


@torch.library.custom_op("spec_compile::sample_token", mutates_args=())
def sample_token(probs: Tensor, seed: Tensor, position: Tensor, stream: int) -> Tensor:
    """Sample one token per row; the same (seed, position, stream) and probabilities give the same token anywhere.

    Args:
        probs: float32 [B, V], need not be normalised. A row of zeros (padding) gives an arbitrary valid token, a row with a
            NaN one whose weight is NaN.
        seed: int64 [B].
        position: int32 [B], where in the row's text the token will stand.
        stream: DRAFT_STREAM for a draft's proposals, TARGET_STREAM for the target's own tokens.

    Returns:
        int64 [B].
    """
    return race(probs, seed, position, stream)


@sample_token.register_fake
def sample_token_fake(probs, seed, position, stream) -> Tensor:
    return probs.new_empty(probs.shape[0], dtype=torch.int64)


@sample_token.register_kernel("cuda")
def sample_token_cuda(probs, seed, position, stream) -> Tensor:
    from spec_compile.ops.kernels import round_ops  # here, so that machines without Triton can import this module

    return round_ops.sample_token(probs, seed, position, stream)


# ----------------------------------------------------------------------------------------------------------------------
# Logits processors of generate(), per row and without a host read. Plain functions: Inductor compiles them.


def warp_logits(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    *,
    max_top_k: int,
    use_top_p: bool,
    use_min_p: bool,
    every_row_top_k: bool = False,
) -> Tensor:
    """The distribution ``generate(do_sample=True)`` samples from: temperature, top-k, top-p, min-p, in that order.

    The same arithmetic as transformers' warpers (``generation/logits_process.py``, min_tokens_to_keep 1) with one
    parameter per row. The keywords are static: they decide what is computed at all.

    Args:
        logits: [R, V], any float dtype; computed in float32 as generate() does.
        temperature: float32 [R], positive.
        top_k: int32 or int64 [R]; 0 or less switches a row's top-k off. Ties with the k-th value are kept.
        top_p: float32 or float64 [R]; 1 or more switches a row's top-p off. In float64 the threshold is 1 - top_p as
            Python computes it, and so transformers' to the last bit.
        min_p: float32 [R]; 0 switches a row's min-p off.
        max_top_k: at least every row's min(top_k, V), or 0 when no row uses top-k.
        use_top_p, use_min_p: whether any row uses them.
        every_row_top_k: promises that every row uses top-k (one that does not, a padding row, gets ``max_top_k``). Then
            top-p needs no sort of the vocabulary. Sums are rounded in another order than transformers', which can move
            a boundary that 1 - top_p hits to 1e-7.

    Returns:
        float32 [R, V] probabilities, exactly 0 outside the support. Where logits are NaN or infinite, or the temperature makes
        them so, all of a row is NaN, as in transformers.
    """
    scores = logits.float() / temperature[:, None]
    if max_top_k > 0 and use_top_p and every_row_top_k:
        scores = scores.masked_fill(_top_k_top_p(scores, top_k, top_p, max_top_k), float("-inf"))
    elif max_top_k > 0:
        width = min(max_top_k, scores.shape[-1])
        best = scores.topk(width, dim=-1).values  # [R, width], descending
        kth = best.gather(1, (top_k.long()[:, None] - 1).clamp(0, width - 1))
        scores = scores.masked_fill((scores < kth) & (top_k[:, None] > 0), float("-inf"))
    if use_top_p and not (max_top_k > 0 and every_row_top_k):
        ascending, order = scores.sort(dim=-1)
        # transformers decides on the cumulated probability of a token and all less likely ones, and so do we: summing
        # from the other end would round differently and move the boundary.
        removed = ascending.softmax(-1).cumsum(-1) <= (1.0 - top_p[:, None]).float()
        removed[:, -1] = False
        removed = removed & (top_p[:, None] < 1.0)
        scores = scores.masked_fill(removed.scatter(1, order, removed), float("-inf"))
    probs = scores.softmax(-1)
    if use_min_p:
        # The most likely token never falls below min_p of itself, so nothing else has to keep one token alive.
        scores = scores.masked_fill(probs < min_p[:, None] * probs.amax(-1, keepdim=True), float("-inf"))
        probs = scores.softmax(-1)
    return probs


def _top_k_top_p(scores: Tensor, top_k: Tensor, top_p: Tensor, max_top_k: int) -> Tensor:
    """Which tokens top-k and then top-p remove, bool [R, V], from a list of the ``max_top_k`` best instead of a sort.

    Low-precision logits tie often, so ties are counted: top-k keeps all ties of the k-th value, listed or not, and of a
    group that top-p splits as many go as with a sort, lower ids first. (Which of them a sort removes is its own affair.)
    NaN goes nowhere, as in transformers' warpers: probabilities that are not finite must stay so.
    """
    width = min(max_top_k, scores.shape[-1])
    best = scores.topk(width, dim=-1).values  # [R, W], descending
    k = torch.where(top_k > 0, top_k, width).long().clamp(max=width)[:, None]  # [R, 1]
    listed = torch.arange(width, device=scores.device) < k  # [R, W]
    kth, first = best.gather(1, k - 1), best[:, :1]
    unlisted = (scores == kth).sum(1, keepdim=True) - ((best == kth) & listed).sum(1, keepdim=True)  # ties left out
    weight = (best - first).exp().masked_fill(~listed, 0.0)
    tie_weight = (kth - first).exp()
    tail = unlisted * tie_weight
    budget = (1.0 - top_p[:, None]).float().clamp(min=0.0) * (weight.sum(1, keepdim=True) + tail)
    # A token goes when it and all less likely ones together stay within the budget; the unlisted ties go first.
    removed = listed & (weight.flip(1).cumsum(1).flip(1) + tail <= budget) & (top_p[:, None] < 1.0)
    removed[:, 0] = False
    boundary = best.gather(1, k - 1 - removed.sum(1, keepdim=True))  # the least value of which some token stays
    ties_removed = torch.where(tie_weight > 0, budget / tie_weight, 0.0).clamp(max=unlisted.float()).long()
    split = (removed & (best == boundary)).sum(1, keepdim=True) + torch.where(boundary == kth, ties_removed, 0)
    at_boundary = scores == boundary
    return (scores < boundary) | (at_boundary & (at_boundary.cumsum(1) <= split))


def remove_invalid_values(logits: Tensor) -> Tensor:
    """NaN becomes 0, infinities the largest finite numbers, as transformers' InfNanRemoveLogitsProcessor does in float32.

    Args:
        logits: any shape and float dtype.

    Returns:
        float32 of the same shape, all finite.
    """
    return torch.nan_to_num(logits.float(), nan=0.0)


def suppress_tokens(logits: Tensor, eos_ids: Tensor, cache_len: Tensor, min_len: Tensor, depth: Tensor | None = None) -> Tensor:
    """Forbid the end of the text before ``min_len`` tokens, as transformers' MinNewTokensLengthLogitsProcessor does.

    Slot j of a row predicts the token at position ``cache_len + 1 + j``, so as many tokens stand before it; while those
    are fewer than ``min_len`` (prompt length + min_new_tokens), end-of-sequence ids get -inf.

    Args:
        logits: [B, N, V].
        eos_ids: int64 [E]; -1 matches nothing.
        cache_len, min_len: int32 [B].
        depth: int32 [B, N] of a tree's slots, which stand for j; None for a chain.

    Returns:
        [B, N, V], ``logits`` with -inf where an end is not allowed yet.
    """
    vocab_size = logits.shape[-1]
    inside = (eos_ids >= 0) & (eos_ids < vocab_size)
    is_eos = torch.zeros(vocab_size + 1, dtype=torch.bool, device=logits.device)  # the last place is no token's
    is_eos = is_eos.scatter(0, torch.where(inside, eos_ids, vocab_size), True)[:-1]  # [V]
    slot = torch.arange(logits.shape[1], device=logits.device) if depth is None else depth
    length = cache_len[:, None] + 1 + slot  # [B, N]
    early = length < min_len[:, None]
    return logits.masked_fill(early[:, :, None] & is_eos, float("-inf"))
