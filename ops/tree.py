"""Drafting a token tree: the best tokens of a draft step, the beam of the next one, and the window that is verified.

Method: EAGLE-2's dynamic tree (Li et al., 2406.16858) with SGLang's names (3/1/4 is steps/topk/num_draft_tokens). Every level
expands the K best nodes of the level before, by cumulative log-probability, each by its K best tokens; in the end the N - 1
best of all candidates become the window. All shapes are constant.

Shapes: B rows, K topk, T num_steps, N window tokens (the root included), V draft vocabulary, C = K + (T - 1) * K * K
candidates, P = (T - 1) * K nodes that the draft itself reads, W mask words.

Level 0 of the candidates is the K best tokens behind the root, at index 0..K - 1. Level l of them (1 <= l < T) starts at
K + (l - 1) * K * K; child j of beam node i stands at i * K + j behind it. So a parent always has a lower index than its
children, and as log-probabilities are never positive it never scores less: ties to the lower index keep parents in front.
"""

from __future__ import annotations

import torch
from torch import Tensor

# ----------------------------------------------------------------------------------------------------------------------
# draft_topk


def _check_topk(logits: Tensor, k: int) -> None:
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"draft_topk: k={k} of a vocabulary of {logits.shape[-1]} tokens; choose topk from 1 to that.")


@torch.library.custom_op("spec_compile::draft_topk", mutates_args=())
def draft_topk(logits: Tensor, k: int, draft_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row, in falling order, ties to the lower draft id.

    Args:
        logits: [R, V], any float dtype; compared and normalised in float32.
        k: 1..V.
        draft_ids: int64 [V], the target's id of each draft id; None when both have one vocabulary.

    Returns:
        ids int64 [R, k], in the target's vocabulary; logprobs float32 [R, k], natural logarithm, normalised over the V
        draft tokens, never positive. A row with a NaN gives k different valid tokens and -inf.

    Raises:
        ValueError: k is not in 1..V.
    """
    _check_topk(logits, k)
    scores = logits.float()
    vocab_size = scores.shape[1]
    kth = scores.topk(k, dim=1).values[:, -1:]
    # topk leaves open which of the k-th value's ties it takes, so the k are taken again: all above it, then ties, by id.
    order = torch.arange(vocab_size, 0, -1, device=logits.device)
    rank = (order + vocab_size).where(scores > kth, torch.where(scores < kth, 0, order))
    chosen = vocab_size - (rank.topk(k, dim=1).values - 1) % vocab_size - 1  # [R, k]
    best, by_score = scores.gather(1, chosen).sort(dim=1, descending=True, stable=True)
    peak = scores.amax(1, keepdim=True)
    logprobs = (best - peak) - (scores - peak).exp().sum(1, keepdim=True).log()
    ids = chosen.gather(1, by_score)
    logprobs = logprobs.masked_fill(logprobs.isnan(), float("-inf"))
    return ids if draft_ids is None else draft_ids[ids], logprobs


@draft_topk.register_fake
def draft_topk_fake(logits, k, draft_ids) -> tuple[Tensor, Tensor]:
    _check_topk(logits, k)
    rows = logits.shape[0]
    return logits.new_empty(rows, k, dtype=torch.int64), logits.new_empty(rows, k, dtype=torch.float32)


@draft_topk.register_kernel("cuda")
def draft_topk_cuda(logits, k, draft_ids) -> tuple[Tensor, Tensor]:
    from spec_compile.ops.kernels import tree_ops  # here, so that machines without Triton can import this module

    _check_topk(logits, k)
    return tree_ops.draft_topk(logits, k, draft_ids)


# ----------------------------------------------------------------------------------------------------------------------
# expand_beam


@torch.library.custom_op(
    "spec_compile::expand_beam",
    mutates_args=("candidate_tokens", "candidate_scores", "candidate_parents", "draft_mask"),
)
def expand_beam(
    ids: Tensor,
    logprobs: Tensor,
    beam: Tensor | None,
    candidate_tokens: Tensor,
    candidate_scores: Tensor,
    candidate_parents: Tensor,
    draft_mask: Tensor,
    level: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """One level of drafting: note its candidates, and choose the K of them that the draft reads next.

    The beam chosen at level l stands in the draft's window at slots l * K .. l * K + K - 1, best first, ties to the lower
    candidate. At the last level (T - 1) nothing is drafted any more: the candidates count, the beam does not.

    Args:
        ids, logprobs: int64 and float32 of ``draft_topk``: [B, K] at level 0, [B * K, K] after it (beam node by beam node).
        beam: int32 [B, K], the candidates that were read, as the level before returned them; None at level 0.
        candidate_tokens: int64 [B, C], written: this level's stretch.
        candidate_scores: float32 [B, C], written: cumulative log-probabilities. NaN counts as -inf, above 0 as 0.
        candidate_parents: int32 [B, C], written: the parent's candidate index, -1 for the root.
        draft_mask: int32 [B, P, W] with W = ceil(P / 32), the packed mask of the draft's window (see ``ops.attention``); the
            new beam's rows are written in full: the parent's row and the node itself.
        level: 0..T - 1.

    Returns:
        beam_tokens int64 [B, K]; beam int32 [B, K], candidate indices; beam_parent int64 [B, K], which node of the level that
        was read each one continues (0..K - 1, at level 0 always 0): ``hidden.gather(1, beam_parent)`` feeds the next step,
        and the parent's slot is (level - 1) * K + beam_parent.
    """
    batch, topk = candidate_tokens.shape[0], ids.shape[1]
    tokens = ids.view(batch, -1)
    steps = torch.where(logprobs < 0, logprobs, 0.0).masked_fill(logprobs.isnan(), float("-inf"))  # and no -0.0
    if beam is None:
        first = 0
        scores, parents = steps.view(batch, topk), candidate_parents.new_full((batch, topk), -1)
    else:
        first = topk + (level - 1) * topk * topk
        reached = candidate_scores.gather(1, beam.long())  # [B, K]
        scores = (reached[:, :, None] + steps.view(batch, topk, topk)).flatten(1)  # [B, K * K]
        parents = beam.repeat_interleave(topk, dim=1)
    stretch = slice(first, first + scores.shape[1])
    candidate_tokens[:, stretch] = tokens
    candidate_scores[:, stretch] = scores
    candidate_parents[:, stretch] = parents

    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :topk]  # [B, K], within the stretch
    beam_parent = best // topk if beam is not None else torch.zeros_like(best)
    slot = level * topk
    if slot < draft_mask.shape[1]:
        own = torch.arange(slot, slot + topk, device=best.device)
        word = torch.arange(draft_mask.shape[2], device=best.device)
        bit = torch.where(own[:, None] // 32 == word, 1 << (own[:, None] % 32), 0).to(torch.int32)  # [K, W]
        if beam is None:
            rows = bit.expand(batch, -1, -1)
        else:
            parent_slot = (slot - topk + beam_parent)[:, :, None].expand(-1, -1, draft_mask.shape[2])
            rows = draft_mask.gather(1, parent_slot) | bit
        draft_mask[:, slot : slot + topk] = rows
    return tokens.gather(1, best), (best + first).to(torch.int32), beam_parent


@expand_beam.register_fake
def expand_beam_fake(
    ids, logprobs, beam, candidate_tokens, candidate_scores, candidate_parents, draft_mask, level
) -> tuple[Tensor, Tensor, Tensor]:
    shape = candidate_tokens.shape[0], ids.shape[1]
    return ids.new_empty(shape), candidate_parents.new_empty(shape), ids.new_empty(shape)


@expand_beam.register_kernel("cuda")
def expand_beam_cuda(
    ids, logprobs, beam, candidate_tokens, candidate_scores, candidate_parents, draft_mask, level
) -> tuple[Tensor, Tensor, Tensor]:
    from spec_compile.ops.kernels import tree_ops

    return tree_ops.expand_beam(ids, logprobs, beam, candidate_tokens, candidate_scores, candidate_parents, draft_mask, level)


# ----------------------------------------------------------------------------------------------------------------------
# build_tree


def _check_window(candidate_tokens: Tensor, num_draft_tokens: int) -> None:
    if not 1 <= num_draft_tokens <= candidate_tokens.shape[1] + 1:
        raise ValueError(
            f"build_tree: a window of {num_draft_tokens} tokens from {candidate_tokens.shape[1]} candidates; "
            "lower num_draft_tokens, or raise topk or num_steps."
        )


@torch.library.custom_op("spec_compile::build_tree", mutates_args=())
def build_tree(
    candidate_tokens: Tensor, candidate_scores: Tensor, candidate_parents: Tensor, root: Tensor, num_draft_tokens: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The window that is verified: the root and the N - 1 best candidates, in candidate order.

    EAGLE-2's rerank: best by cumulative log-probability, ties to the lower index, so that a chosen node's ancestors are
    chosen too and stand before it.

    Args:
        candidate_tokens, candidate_scores, candidate_parents: int64, float32, int32 [B, C], as ``expand_beam`` wrote them.
        root: int64 [B], the known token.
        num_draft_tokens: N, 1..C + 1.

    Returns:
        window_ids int64 [B, N]; parents int32 [B, N], window indices, -1 for the root; depth int32 [B, N], 0 for the root;
        tree_mask int32 [B, N, ceil(N / 32)], the node and its ancestors (see ``ops.attention``).

    Raises:
        ValueError: there are fewer than N - 1 candidates.
    """
    _check_window(candidate_tokens, num_draft_tokens)
    batch, num_candidates = candidate_tokens.shape
    device, num_tokens = candidate_tokens.device, num_draft_tokens
    best = candidate_scores.sort(dim=1, descending=True, stable=True).indices[:, : num_tokens - 1]
    chosen = best.sort(dim=1).values  # [B, N - 1]
    window_ids = torch.cat([root[:, None], candidate_tokens.gather(1, chosen)], 1)

    # Where each candidate went; the place behind the last one is the root's.
    index = torch.arange(num_tokens, dtype=torch.int32, device=device)
    place = index.new_zeros(batch, num_candidates + 1)
    place.scatter_(1, chosen, index[1:].expand(batch, -1))
    parent_candidate = candidate_parents.gather(1, chosen).long()
    parents = place.gather(1, torch.where(parent_candidate < 0, num_candidates, parent_candidate))
    parents = torch.cat([index.new_full((batch, 1), -1), parents], 1)

    # Ancestors by pointer doubling: after i rounds a node sees 2^i generations, itself included. The root is its own parent.
    visible = torch.eye(num_tokens, dtype=torch.bool, device=device).expand(batch, -1, -1)
    hop = parents.clamp(min=0).long()
    for _ in range(max(1, (num_tokens - 1).bit_length())):
        visible = visible | visible.gather(1, hop[:, :, None].expand(-1, -1, num_tokens))
        hop = hop.gather(1, hop)
    depth = (visible.sum(2) - 1).to(torch.int32)
    return window_ids, parents, depth, _pack_bits(visible)


def _pack_bits(visible: Tensor) -> Tensor:
    """bool [..., N] to int32 [..., ceil(N / 32)], bit j % 32 of word j // 32."""
    num_tokens = visible.shape[-1]
    words = (num_tokens + 31) // 32
    padded = torch.nn.functional.pad(visible, (0, words * 32 - num_tokens)).unflatten(-1, (words, 32))
    bits = torch.ones(32, dtype=torch.int64, device=visible.device) << torch.arange(32, device=visible.device)
    return (padded * bits).sum(-1).to(torch.int32)  # keeps the low 32 bits


@build_tree.register_fake
def build_tree_fake(
    candidate_tokens, candidate_scores, candidate_parents, root, num_draft_tokens
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_window(candidate_tokens, num_draft_tokens)
    shape = candidate_tokens.shape[0], num_draft_tokens
    window_ids = root.new_empty(shape)
    parents = candidate_parents.new_empty(shape)
    mask = candidate_parents.new_empty(*shape, (num_draft_tokens + 31) // 32)
    return window_ids, parents, parents.new_empty(shape), mask


@build_tree.register_kernel("cuda")
def build_tree_cuda(
    candidate_tokens, candidate_scores, candidate_parents, root, num_draft_tokens
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from spec_compile.ops.kernels import tree_ops

    _check_window(candidate_tokens, num_draft_tokens)
    return tree_ops.build_tree(candidate_tokens, candidate_scores, candidate_parents, root, num_draft_tokens)
