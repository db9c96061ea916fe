"""Verification: how many drafted tokens stand, what is emitted behind them, and the token history they are written to.

Shapes: B rows, N window tokens (the root plus K = N - 1 drafts), V vocabulary, C token slots of a row, E
end-of-sequence ids. Slot j of the window predicts the token at position ``cache_len + 1 + j``; ``window[:, j + 1]`` is
what the draft put there.

``count_accepted``, ``residual_weights`` and (for one-hot drafts) ``accept_greedy`` are the mathematics of
``accept_sampled`` without its randomness: the op is made of them, and so is the enumeration in the tests which shows that
the emitted tokens follow the target's distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spec_compile.ops.sampling import ACCEPT_STREAM, TARGET_STREAM, race, uniform


def _leading(hits: Tensor) -> Tensor:
    """Number of leading True of bool [B, K]: int64 [B]."""
    return hits.cumprod(1).sum(1)


# ----------------------------------------------------------------------------------------------------------------------
# accept_greedy


@torch.library.custom_op("spec_compile::accept_greedy", mutates_args=())
def accept_greedy(window_ids: Tensor, target_ids: Tensor) -> Tensor:
    """Number of tokens a greedy round emits: the drafts the target would have chosen itself, and one more.

    Args:
        window_ids: int64 [B, N], root and drafts.
        target_ids: int64 [B, N], the target's choice at each slot; ``target_ids[:, :accept_length]`` are emitted.

    Returns:
        accept_length, int32 [B], 1..N.
    """
    return (_leading(window_ids[:, 1:] == target_ids[:, :-1]) + 1).to(torch.int32)


@accept_greedy.register_fake
def accept_greedy_fake(window_ids, target_ids) -> Tensor:
    return window_ids.new_empty(window_ids.shape[0], dtype=torch.int32)


@accept_greedy.register_kernel("cuda")
def accept_greedy_cuda(window_ids, target_ids) -> Tensor:
    from spec_compile.ops.kernels import round_ops  # here, so that machines without Triton can import this module

    return round_ops.accept_greedy(window_ids, target_ids)


# ----------------------------------------------------------------------------------------------------------------------
# accept_sampled


def drawn_from_no_distribution(window_ids: Tensor, draft_probs: Tensor) -> Tensor:
    """Which drafts have a q that is not finite: bool [B, K]. The rest of such a row says nothing either.

    A draft whose states overflow hands over rows like that. A draft drawn from one is refused and p alone decides in its
    place, as if q had put all its weight on a token that does not exist: exact, whatever token was put there.
    """
    return ~draft_probs.gather(2, window_ids[:, 1:, None])[..., 0].isfinite()


def acceptance_probability(target_prob: Tensor, draft_prob: Tensor) -> Tensor:
    """min(1, p / q) of drafted tokens. A token neither would draw (0 / 0) gives NaN, and so does a q that is NaN."""
    return (target_prob / draft_prob).clamp(max=1.0)


def count_accepted(window_ids: Tensor, draft_probs: Tensor, target_probs: Tensor, uniforms: Tensor) -> Tensor:
    """Number of drafts accepted before the first rejection: int64 [B], 0..K.

    Args:
        window_ids, draft_probs, target_probs: as in ``accept_sampled``.
        uniforms: [B, K], one acceptance test each.
    """
    drafted = window_ids[:, 1:, None]  # [B, K, 1]
    target_prob = target_probs[:, :-1].gather(2, drafted)[..., 0]  # [B, K]
    draft_prob = draft_probs.gather(2, drafted)[..., 0]
    return _leading(uniforms < acceptance_probability(target_prob, draft_prob))  # NaN compares false: rejected


def residual_weights(window_ids: Tensor, draft_probs: Tensor, target_probs: Tensor, accepted: Tensor) -> Tensor:
    """What the token behind the accepted drafts is drawn from: unnormalised [B, V].

    After a rejection (p - q)+; p when every draft was accepted, or when the rejected one has no q
    (``drawn_from_no_distribution``).
    """
    num_drafts = window_ids.shape[1] - 1
    row = torch.arange(window_ids.shape[0], device=window_ids.device)
    target = target_probs[row, accepted]  # [B, V]
    if num_drafts == 0:
        return target
    rejected = accepted.clamp(max=num_drafts - 1)  # [B]; meaningless when all were accepted
    no_distribution = drawn_from_no_distribution(window_ids, draft_probs)[row, rejected]
    weights = (target - draft_probs[row, rejected].masked_fill(no_distribution[:, None], 0.0)).clamp_(min=0.0)
    # Rounding can reject a token where p == q up to the last bit; nothing is left then, and p is as good as it gets.
    keep_target = (accepted[:, None] == num_drafts) | (weights.amax(1, keepdim=True) <= 0)
    return torch.where(keep_target, target, weights)


def sample_slots(target_probs: Tensor, seed: Tensor, position: Tensor) -> Tensor:
    """The target's own sample at every slot of a window, int64 [B, N]; arguments as in ``accept_sampled``."""
    num_tokens = target_probs.shape[1]
    at = (position[:, None] + 1 + torch.arange(num_tokens, dtype=torch.int32, device=position.device)).flatten()
    seeds = seed.repeat_interleave(num_tokens, output_size=at.shape[0])
    ids = torch.ops.spec_compile.sample_token(target_probs.flatten(0, 1), seeds, at, TARGET_STREAM)
    return ids.view(-1, num_tokens)


@torch.library.custom_op("spec_compile::accept_sampled", mutates_args=())
def accept_sampled(
    window_ids: Tensor, draft_probs: Tensor | None, target_probs: Tensor, seed: Tensor, position: Tensor
) -> tuple[Tensor, Tensor]:
    """Exact speculative sampling on a chain (Leviathan et al., 2211.17192; Chen et al., 2302.01318).

    Draft j is accepted with min(1, p / q). The first rejected one is replaced by a sample of norm((p - q)+); after K
    accepted drafts one more token is sampled from p. The emitted tokens follow the target's distribution exactly, *provided
    that* ``draft_probs`` is what the drafts were sampled from: a draft chosen by argmax, top-k or look-up is one-hot. One
    whose q is not finite is refused, and p alone decides in its place.

    A one-hot q needs no test of its own: the target samples every slot and a draft stands when it is that sample. That
    accepts it with probability p and, given a rejection, leaves p without the draft, which is the rule above. As the
    noise belongs to the position, the text then does not depend on what was drafted, or on whether anything was.

    Args:
        window_ids: int64 [B, N], root and drafts.
        draft_probs: float32 [B, K, V] the drafts were sampled from, or None when they were chosen without chance.
        target_probs: float32 [B, N, V].
        seed: int64 [B].
        position: int32 [B], the root's position (``cache_len``); slot j uses the noise of ``position + 1 + j``.

    Returns:
        emitted int64 [B, N], of which the first ``accept_length`` count; accept_length int32 [B], 1..N.
    """
    if draft_probs is None:
        ids = sample_slots(target_probs, seed, position)
        return ids, accept_greedy(window_ids, ids)
    num_drafts = window_ids.shape[1] - 1
    slot = torch.arange(num_drafts + 1, device=window_ids.device)  # [N]
    first = position.long() + 1  # [B]
    uniforms = uniform(seed[:, None], first[:, None] + slot[:-1], ACCEPT_STREAM)  # [B, K]
    accepted = count_accepted(window_ids, draft_probs, target_probs, uniforms)
    weights = residual_weights(window_ids, draft_probs, target_probs, accepted)
    last = race(weights, seed, first + accepted, TARGET_STREAM)[:, None]  # [B, 1]
    drafted = torch.cat([window_ids[:, 1:], last], 1)  # [B, N]
    return torch.where(slot < accepted[:, None], drafted, last), (accepted + 1).to(torch.int32)


@accept_sampled.register_fake
def accept_sampled_fake(window_ids, draft_probs, target_probs, seed, position) -> tuple[Tensor, Tensor]:
    return window_ids.new_empty(window_ids.shape), window_ids.new_empty(window_ids.shape[0], dtype=torch.int32)


@accept_sampled.register_kernel("cuda")
def accept_sampled_cuda(window_ids, draft_probs, target_probs, seed, position) -> tuple[Tensor, Tensor]:
    from spec_compile.ops.kernels import round_ops

    if draft_probs is None:
        ids = sample_slots(target_probs, seed, position)
        return ids, accept_greedy(window_ids, ids)
    return round_ops.accept_sampled(window_ids, draft_probs, target_probs, seed, position, ACCEPT_STREAM, TARGET_STREAM)


# ----------------------------------------------------------------------------------------------------------------------
# commit_tokens

# How a row leaves a round.
GOING_ON, FINISHED, NO_DISTRIBUTION = 0, 1, 2


@torch.library.custom_op("spec_compile::commit_tokens", mutates_args=("tokens", "cache_len", "finished"))
def commit_tokens(
    tokens: Tensor,
    cache_len: Tensor,
    finished: Tensor,
    emitted: Tensor,
    accept_length: Tensor,
    end_len: Tensor,
    eos_ids: Tensor,
    slot_probs: Tensor | None = None,
    path: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Append a round's tokens to the history and advance: cut behind the first end-of-sequence and at the length limit, and
    before a token whose probabilities are not finite.

    Before the call ``tokens[b, : cache_len[b] + 1]`` is known (the root included), after it again. A finished row does
    not move, so one round too many changes nothing.

    Args:
        tokens: int64 [B, C], written.
        cache_len: int32 [B], written: advanced by the result.
        finished: bool [B], written: set on an end-of-sequence token, when the row has ``end_len`` tokens, or stops for
            want of a distribution.
        emitted: int64 [B, N].
        accept_length: int32 [B], how many of ``emitted`` count.
        end_len: int32 [B], most tokens a row may have; C if that is less.
        eos_ids: int64 [E]; -1 matches nothing.
        slot_probs: float [B, M], any one of the probabilities that the target gave at each slot of the window (a view will
            do): where its logits are no numbers, or too large, all are NaN. None where tokens are not drawn.
        path: int32 [B, N], the window's slot behind which each token was drawn, -1 for nothing; None when they count up.

    Returns:
        int32 [B], the number of tokens appended: 0..N; int32 [B], GOING_ON, FINISHED, or NO_DISTRIBUTION in the round in which
        a row had nothing to draw its next token from. (Plain ``generate()`` raises then. A round cannot, and the host need not
        wait.)
    """
    capacity, num_tokens = tokens.shape[1], emitted.shape[1]
    slot = torch.arange(num_tokens, device=tokens.device)  # [N]
    length = cache_len.long() + 1  # [B]
    limit = end_len.long().clamp(max=capacity)
    count = torch.minimum(accept_length.long(), limit - length).clamp(0, num_tokens)
    is_eos = (emitted[:, :, None] == eos_ids).any(2) & (emitted >= 0)  # [B, N]
    past_eos = is_eos.cumsum(1) - is_eos.long() > 0
    count = torch.minimum(count, (~past_eos).sum(1)).masked_fill(finished, 0)
    cut = torch.zeros_like(finished)  # rows whose next token has no distribution to be drawn from
    if slot_probs is not None:
        drawn_from = slot_probs[:, :num_tokens] if path is None else slot_probs.gather(1, path.clamp(min=0).long())  # [B, N]
        drawable = _leading(drawn_from.isfinite())
        cut, count = drawable < count, torch.minimum(count, drawable)
    ended = (is_eos & (slot < count[:, None])).any(1) | (length + count >= limit)
    status = torch.where(cut, NO_DISTRIBUTION, torch.where(finished | ended, FINISHED, GOING_ON)).to(torch.int32)

    # Slots behind the count repeat the last write, and a row without any rewrites its root: no index is out of range
    # and no two writes to one place differ.
    source = torch.minimum(slot, count[:, None] - 1)  # [B, N]; -1 in rows that append nothing
    target = (length[:, None] + source).clamp(0, capacity - 1)
    value = torch.where(source >= 0, emitted.gather(1, source.clamp(min=0)), tokens.gather(1, target))
    tokens.scatter_(1, target, value)
    count = count.to(torch.int32)
    cache_len.add_(count)
    finished.logical_or_(status > GOING_ON)
    return count, status


@commit_tokens.register_fake
def commit_tokens_fake(
    tokens, cache_len, finished, emitted, accept_length, end_len, eos_ids, slot_probs=None, path=None
) -> tuple[Tensor, Tensor]:
    count = accept_length.new_empty(accept_length.shape, dtype=torch.int32)
    return count, torch.empty_like(count)


@commit_tokens.register_kernel("cuda")
def commit_tokens_cuda(
    tokens, cache_len, finished, emitted, accept_length, end_len, eos_ids, slot_probs=None, path=None
) -> tuple[Tensor, Tensor]:
    from spec_compile.ops.kernels import round_ops

    row_ends = end_len, eos_ids, slot_probs, path
    return round_ops.commit_tokens(tokens, cache_len, finished, emitted, accept_length, *row_ends, NO_DISTRIBUTION)
