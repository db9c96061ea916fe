"""Block verification of a chain: one decision over all drafts, which never keeps fewer than one decision a draft.

Method: Sun et al., "Block Verification Accelerates Speculative Decoding" (2403.10444), algorithm 2. SGLang and vLLM offer it
too (``--speculative-use-block-verification``, ``rejection_sample_method="block"``).

Shapes: B rows, N window tokens (the root plus K = N - 1 drafts), V vocabulary.

What is kept up to a draft depends on the drafts and the chance behind it. Noise that is keyed by position alone would be drawn
again by the next round, which starts before it: conditioned on what this round made of it, it is no longer fair. So the
noise of this method belongs to the round: see ``round_seed``.

``reach_of_drafts`` and ``block_acceptance`` are the mathematics of the op without its randomness, for the enumeration in the
tests.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spec_compile.ops.accept import drawn_from_no_distribution
from spec_compile.ops.sampling import ACCEPT_STREAM, TARGET_STREAM, noise_key, race, uniform

ROUND_STREAM = 3  # beside the streams of ops.sampling


def round_seed(seed: Tensor, position: Tensor) -> Tensor:
    """The seeds of one round: int64 [B], to be given to ``accept_block`` and to the ``sample_token`` that drafts for it.

    Args:
        seed: int64 [B], the rows' own.
        position: int32 [B], where the round's root stands (``cache_len``); no two rounds of a row have it in common.
    """
    return noise_key(seed, position, ROUND_STREAM)


def reach_of_drafts(window_ids: Tensor, draft_probs: Tensor, target_probs: Tensor) -> Tensor:
    """[B, N]: 1 at the root, and behind draft j min(1, reach before it * p / q). A draft neither would draw, or whose
    q is not finite (``drawn_from_no_distribution``), gives 0."""
    drafted = window_ids[:, 1:, None]  # [B, K, 1]
    ratio = target_probs[:, :-1].gather(2, drafted)[..., 0] / draft_probs.gather(2, drafted)[..., 0]  # [B, K]
    no_distribution = drawn_from_no_distribution(window_ids, draft_probs)  # [B, K]
    reach = [torch.ones_like(target_probs[:, 0, 0])]
    for j in range(ratio.shape[1]):
        product = (reach[-1] * ratio[:, j]).clamp(max=1.0)
        reach.append(torch.where(no_distribution[:, j] | product.isnan(), 0.0, product))  # 0 / 0, 0 * inf
    return torch.stack(reach, 1)


def finite_distributions(window_ids: Tensor, draft_probs: Tensor) -> Tensor:
    """``draft_probs`` with 0 for every q that is not finite: where nothing could be drawn, nothing is taken from p."""
    return draft_probs.masked_fill(drawn_from_no_distribution(window_ids, draft_probs)[:, :, None], 0.0)


def block_acceptance(draft_probs: Tensor, target_probs: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    """With which probability a block is kept up to draft j when it is not kept any further, and what follows it then.

    Args:
        draft_probs: finite (``finite_distributions``).

    Returns:
        accept [B, K]: for the first 1..K drafts. NaN where nothing could follow: the block is always kept further there.
        weights [B, N, V], unnormalised: (reach * p - q)+ behind 0..K - 1 drafts, p behind all of them.
    """
    left = (reach[:, :-1, None] * target_probs[:, :-1] - draft_probs).clamp(min=0.0)  # [B, K, V]
    mass = left.sum(2)  # [B, K]
    mass = torch.where(mass.isnan(), reach[:, :-1], mass)  # p is not finite: the block ends here as behind its last draft
    accept = mass / (mass + (1.0 - reach[:, :-1]))
    return torch.cat([accept[:, 1:], reach[:, -1:]], 1), torch.cat([left, target_probs[:, -1:]], 1)


@torch.library.custom_op("spec_compile::accept_block", mutates_args=())
def accept_block(
    window_ids: Tensor, draft_probs: Tensor, target_probs: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Exact speculative sampling on a chain, judged as a block (Sun et al., 2403.10444).

    The emitted tokens follow the target's distribution exactly, provided that ``draft_probs`` is what the drafts were sampled
    from. On average at least as many are kept as by ``accept_sampled``: a draft that the target likes less can be made good by
    the next. A draft whose q is not finite ends the block before it, and p alone decides in its place.

    Args:
        window_ids: int64 [B, N], root and drafts; N at least 2.
        draft_probs: float32 [B, K, V].
        target_probs: float32 [B, N, V].
        seed: int64 [B], the round's (``round_seed``); the drafts must have been drawn with the same.
        position: int32 [B], the root's position (``cache_len``).

    Returns:
        emitted int64 [B, N], of which the first ``accept_length`` count; accept_length int32 [B], 1..N.
    """
    num_drafts = window_ids.shape[1] - 1
    row = torch.arange(window_ids.shape[0], device=window_ids.device)
    slot = torch.arange(num_drafts + 1, device=window_ids.device)  # [N]
    first = position.long() + 1
    reach = reach_of_drafts(window_ids, draft_probs, target_probs)
    accept, weights = block_acceptance(finite_distributions(window_ids, draft_probs), target_probs, reach)
    kept = uniform(seed[:, None], first[:, None] + slot[:-1], ACCEPT_STREAM) < accept  # [B, K]; NaN compares false
    accepted = torch.where(kept, slot[1:], 0).amax(1)  # the longest block that is kept
    weights = weights[row, accepted]
    # Rounding can end a block where nothing is left to follow it; p is as good as it gets.
    weights = torch.where(weights.amax(1, keepdim=True) > 0, weights, target_probs[row, accepted])
    last = race(weights, seed, first + accepted, TARGET_STREAM)[:, None]  # [B, 1]
    drafted = torch.cat([window_ids[:, 1:], last], 1)  # [B, N]
    return torch.where(slot < accepted[:, None], drafted, last), (accepted + 1).to(torch.int32)


@accept_block.register_fake
def accept_block_fake(window_ids, draft_probs, target_probs, seed, position) -> tuple[Tensor, Tensor]:
    return window_ids.new_empty(window_ids.shape), window_ids.new_empty(window_ids.shape[0], dtype=torch.int32)


@accept_block.register_kernel("cuda")
def accept_block_cuda(window_ids, draft_probs, target_probs, seed, position) -> tuple[Tensor, Tensor]:
    from spec_compile.ops.kernels import accept_block as kernels  # here, so that machines without Triton can import this module

    return kernels.accept_block(window_ids, draft_probs, target_probs, seed, position)
