"""The round: draft → verify → accept → commit, over static tensors, without a host sync. A CUDA graph records one call."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from spec_compile.config import RoundShape
from spec_compile.runtime.draft import Draft, Proposal, RoundInputs, Tree, Verified
from spec_compile.runtime.model_runner import ModelRunner
from spec_compile.runtime.state import DecodeState, SamplingPlan


@dataclass(frozen=True)
class Accepted:
    """What verification lets stand.

    Attributes:
        emitted: int64 [B, E], of which the first ``accept_length`` count.
        accept_length: int32 [B], 1..E.
        path: int32 [B, E], window index of each kept token, -1 behind; None for a chain, where it counts up.
        slot_probs: float32 [B, N], one probability of each slot's, NaN where there is no distribution to draw from; None for
            greedy rounds.
    """

    emitted: Tensor
    accept_length: Tensor
    path: Tensor | None
    slot_probs: Tensor | None = None


@dataclass(frozen=True)
class RoundRecord:
    """Tensors of a round for who wants to look at it (``draft_tree.read_tree``).

    While a captured round's record lives, neither its own graph nor another one puts anything else into their memory.
    """

    window: Tensor
    tree: Tree | None
    accepted: Accepted


def run_round(
    target: ModelRunner,
    draft: Draft | None,
    state: DecodeState,
    plan: SamplingPlan,
    shape: RoundShape,
    *,
    simulated_rates: Tensor | None = None,
) -> RoundRecord:
    """Advance every unfinished row by 1 to ``shape.num_steps + 1`` tokens; the result stands in ``state.out``.

    Args:
        simulated_rates: float32 [B, T], benchmarks only: the probability that draft j stands if those before it do, in the
            place of the target's verdict.
    """
    inputs = round_inputs(state, shape)
    proposal = draft.propose(state, plan, shape, inputs) if draft is not None and shape.num_steps > 0 else Proposal(inputs.root)
    window, tree = proposal.window, proposal.tree  # [B, N]
    result, states = verify(target, window, state, inputs, argmax=plan.ids_only, tree=tree)
    accepted = _accept(proposal, result, state, plan, shape)
    if simulated_rates is not None and shape.num_steps > 0:
        ids = result if plan.ids_only else accepted.emitted if tree is None else window  # [B, N]; any will do
        accepted = dataclasses.replace(
            _simulate(simulated_rates, window, tree, ids, state, shape), slot_probs=accepted.slot_probs
        )
    if accepted.path is not None:
        for page_table, caches in target.programs.pool.by_table(state.page_table):
            torch.ops.spec_compile.kv_commit(caches, page_table, state.cache_len, accepted.path)
        if states is not None:  # like the cache: what belongs to the path comes to the front
            index = accepted.path.clamp(min=0).long()[:, :, None]
            states = states.gather(1, index.expand(-1, -1, states.shape[2]))  # [B, E, n * Ht]
    count = commit(draft, state, accepted, inputs.lens[0], states)
    if target.programs.states is not None:
        target.programs.states.commit(state.state_slot, accepted.path, count)
    return RoundRecord(window, tree, dataclasses.replace(accepted, slot_probs=None))  # whose memory is all the probabilities'


def round_inputs(state: DecodeState, shape: RoundShape) -> RoundInputs:
    """Roots, positions and lengths of a round."""
    ends = state.position_end
    return RoundInputs(*torch.ops.spec_compile.round_inputs(state.tokens, state.cache_len, ends, shape.num_steps + 1))


def verify(
    target: ModelRunner,
    window: Tensor,
    state: DecodeState,
    inputs: RoundInputs,
    *,
    argmax: bool,
    tree: Tree | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The target over windows [B, N]: logits [B, N, V] or greedy ids [B, N], and the tapped states [B, N, n * Ht]."""
    batch, num_tokens = window.shape
    program = target.window_program(batch, num_tokens, argmax=argmax, tree=tree is not None)
    fed = {
        "input_ids": window,
        "page_table": state.page_table,
        "cache_len": state.cache_len,
        "state_slot": state.state_slot,
    }
    if tree is None:
        fed["position_ids"] = inputs.position_ids
    else:
        fed |= {"position_ids": inputs.position_ids.gather(1, tree.depth.long()), "tree_mask": tree.mask}
    result, *states = program(**fed)
    return result, states[0] if states else None


def _accept(proposal: Proposal, result: Tensor, state: DecodeState, plan: SamplingPlan, shape: RoundShape) -> Accepted:
    """Which drafts stand: those that the target chooses itself, or, when sampling, those that keep its distribution."""
    ops = torch.ops.spec_compile
    window, tree = proposal.window, proposal.tree
    depth = None if tree is None else tree.depth
    if plan.do_sample:
        probs = plan.probabilities(plan.restrict(result, state, depth), state)
        if tree is not None:
            emitted, path, length = ops.accept_tree_sampled(
                window, tree.parents, probs, state.seed, state.cache_len, shape.num_steps + 1
            )
            return Accepted(emitted, length, path, probs[..., 0])
        judge = ops.accept_block if plan.block and proposal.probs is not None else ops.accept_sampled
        seed = state.seed if proposal.probs is None else plan.draft_seed(state)
        emitted, length = judge(window, proposal.probs, probs, seed, state.cache_len)
        return Accepted(emitted, length, None, probs[..., 0])
    ids = result if plan.ids_only else plan.restrict(result, state, depth).argmax(-1)
    if tree is not None:
        emitted, path, length = ops.accept_tree_greedy(window, tree.parents, ids, shape.num_steps + 1)
        return Accepted(emitted, length, path)
    return Accepted(ids, ops.accept_greedy(window, ids), None)


def _simulate(rates: Tensor, window: Tensor, tree: Tree | None, ids: Tensor, state: DecodeState, shape: RoundShape) -> Accepted:
    """Accept lengths by decree, per row and position; on a tree as deep as its nodes go."""
    parents, depth = (None, None) if tree is None else (tree.parents, tree.depth)
    emitted, path, length = torch.ops.spec_compile.simulate_accept(
        window, parents, depth, ids, rates, state.seed, state.cache_len, shape.num_steps + 1
    )
    return Accepted(emitted, length, None if tree is None else path)


def commit(draft: Draft | None, state: DecodeState, accepted: Accepted, start: Tensor, states: Tensor | None) -> Tensor:
    """Append the emitted tokens, extend the draft by them, and leave what the host wants to know in ``state.out``.

    Args:
        start: int32 [B], a copy of ``cache_len``.
        states: see ``Verified``.

    Returns:
        int32 [B], how many tokens were appended.
    """
    count, status = torch.ops.spec_compile.commit_tokens(
        state.tokens,
        state.cache_len,
        state.finished,
        accepted.emitted,
        accepted.accept_length,
        state.end_len,
        state.eos_ids,
        accepted.slot_probs,
        accepted.path,
    )
    match_length = draft.extend(state, Verified(start, count, states)) if draft is not None else None
    state.out[:, : accepted.emitted.shape[1]].copy_(accepted.emitted)
    state.out[:, -3].copy_(count)
    state.out[:, -2].copy_(status)
    if match_length is not None:
        state.out[:, -1].copy_(match_length)
    return count
