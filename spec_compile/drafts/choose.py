"""How draft heads pick tokens from their logits, greedily or drawn from a distribution that verification will be told."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from spec_compile.ops.sampling import DRAFT_STREAM
from spec_compile.runtime.state import DecodeState, SamplingPlan


def choose_tokens(
    logits: Tensor, positions: Tensor, state: DecodeState, plan: SamplingPlan, draft_ids: Tensor | None, vocab_size: int
) -> tuple[Tensor, Tensor | None]:
    """One token a slot, each slot on its own.

    Args:
        logits: [B, N, Vd].
        positions: int32 [B, N], where the tokens will stand in the text.
        draft_ids: int64 [Vd], the target's id of each draft id; None when both have one vocabulary.
        vocab_size: V, the target's.

    Returns:
        Target ids int64 [B, N]; when sampling, the distribution float32 [B, N, V] they were drawn from, else None.
    """
    shape = logits.shape[:2]
    if not plan.do_sample:
        ids, _ = torch.ops.spec_compile.draft_topk(logits.flatten(0, 1), 1, draft_ids)
        return ids.view(shape), None
    q = plan.probabilities(logits, state)  # [B, N, Vd]
    seeds = plan.draft_seed(state)[:, None].expand(shape).reshape(-1)
    tokens = torch.ops.spec_compile.sample_token(q.flatten(0, 1), seeds, positions.reshape(-1), DRAFT_STREAM).view(shape)
    if draft_ids is None:
        return tokens, F.pad(q, (0, vocab_size - q.shape[2]))
    full = q.new_zeros(*shape, vocab_size).index_copy(2, draft_ids, q)
    return draft_ids[tokens], full
