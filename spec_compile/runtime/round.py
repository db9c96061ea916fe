"""The round: draft → verify → accept → commit, over static tensors, without a host sync. A CUDA graph records one call."""

from __future__ import annotations

import torch
from torch import Tensor

from spec_compile.drafts.base import Draft, Proposal
from spec_compile.ops import accept as accept_ops  # registers spec_compile::accept_greedy, …
from spec_compile.ops.sampling import uniform
from spec_compile.runtime.model_runner import ModelRunner
from spec_compile.runtime.state import DecodeState, SamplingPlan

__all__ = ["accept_ops", "commit", "run_round", "verify"]

_SIMULATION_STREAM = 7


def run_round(
    target: ModelRunner,
    draft: Draft | None,
    state: DecodeState,
    plan: SamplingPlan,
    *,
    num_drafts: int,
    simulate_accept_length: float | None = None,
) -> None:
    """Advance every unfinished row by 1 to ``num_drafts + 1`` tokens; the result stands in ``state.out``.

    Args:
        num_drafts: how many of the draft's K tokens to verify; 0 for plain decoding.
        simulate_accept_length: benchmarks only; see ``SpecConfig``.
    """
    root = state.tokens.gather(1, state.cache_len[:, None].long())  # [B, 1]
    proposal = draft.propose(state, plan) if draft is not None and num_drafts > 0 else None
    window = root if proposal is None else torch.cat([root, proposal.tokens[:, :num_drafts]], 1)  # [B, N]
    result = verify(target, window, state, argmax=plan.ids_only)
    emitted, accept_length = _accept(window, proposal, result, state, plan)
    if simulate_accept_length is not None and num_drafts > 0:
        accept_length = _simulated(simulate_accept_length, window.shape[1], state)
    commit(draft, state, emitted, accept_length)


def verify(target: ModelRunner, window: Tensor, state: DecodeState, *, argmax: bool) -> Tensor:
    """The target over windows [B, N]: logits [B, N, V], or greedy ids [B, N]."""
    batch, num_tokens = window.shape
    positions = state.positions(state.cache_len, num_tokens)
    return target.window_program(batch, num_tokens, argmax=argmax)(
        input_ids=window, position_ids=positions, page_table=state.page_table, cache_len=state.cache_len
    )


def _accept(
    window: Tensor, proposal: Proposal | None, result: Tensor, state: DecodeState, plan: SamplingPlan
) -> tuple[Tensor, Tensor]:
    """(emitted int64 [B, N], accept_length int32 [B]) by the target's own law."""
    if plan.ids_only:
        return result, torch.ops.spec_compile.accept_greedy(window, result)
    logits = plan.restrict(result, state)
    if not plan.do_sample:
        ids = logits.argmax(-1)
        return ids, torch.ops.spec_compile.accept_greedy(window, ids)
    probs = plan.probabilities(logits, state)
    draft_probs = None if proposal is None else proposal.probs
    return torch.ops.spec_compile.accept_sampled(window, draft_probs, probs, state.seed, state.cache_len)


def _simulated(mean: float, num_tokens: int, state: DecodeState) -> Tensor:
    """Accept lengths of the given mean, per row and position, at most ``num_tokens``: int32 [B]."""
    if mean == int(mean):
        return torch.full_like(state.cache_len, min(int(mean), num_tokens))
    chance = uniform(state.seed, state.cache_len, _SIMULATION_STREAM)
    length = int(mean) + (chance < mean - int(mean)).to(torch.int32)
    return length.clamp(max=num_tokens).to(torch.int32)


def commit(draft: Draft | None, state: DecodeState, emitted: Tensor, accept_length: Tensor) -> None:
    """Append the emitted tokens, let the draft look ahead, and leave what the host wants to know in ``state.out``."""
    count = torch.ops.spec_compile.commit_tokens(
        state.tokens, state.cache_len, state.finished, emitted, accept_length, state.end_len, state.eos_ids
    )
    promise = draft.look_ahead(state) if draft is not None else None
    state.out[:, : emitted.shape[1]].copy_(emitted)
    state.out[:, -3].copy_(count)
    state.out[:, -2].copy_(state.finished)
    if promise is not None:
        state.out[:, -1].copy_(promise)
