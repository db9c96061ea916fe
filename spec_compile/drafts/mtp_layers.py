"""Drafting with MTP heads in turn: a checkpoint with L of them was trained to draft step j of a round with head j.

Head j (1 … L) holds one entry for every position p, made of the token at p + j and of state j - 1 at p: the target's after its
final norm for the first head, what head j - 1 put out for the others. A step's draft is read at the newest position whose
target state is known. The entries of the last j - 1 positions are made of drafted tokens, so the next round makes them again of
what was committed there: a window of the newest positions and of L - 1 older ones, whose target states are kept.

The first head runs over that window when tokens are committed, the others when the next round drafts: each needs the draft of
the one before. All of them run in every drafting round, whatever its number of steps, so no cache ever has a hole. Plain rounds
put the target's states aside, as with an EAGLE head, and catching up fills every cache.

Source: DeepSeek-V3 (2412.19437, 2.2); entries are those of transformers' MtpModel and MTPCandidateGenerator
(modeling_layers.py, generation/candidate_generator.py), which crops its caches and computes entries again after a refusal. Its
rotary positions are j places on, here an entry's is its own: attention sees differences of them alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spec_compile.config import RoundShape
from spec_compile.drafts.choose import choose_tokens
from spec_compile.drafts.head_runner import HeadRunner
from spec_compile.drafts.pending import new_pending, no_pending
from spec_compile.runtime.draft import MOST_PENDING, Proposal, RoundInputs, Verified
from spec_compile.runtime.state import DecodeState, SamplingPlan


@dataclass(frozen=True)
class _Window:
    """Positions that heads run over, oldest first.

    Attributes:
        start: int32 [B], the first position.
        count: int32 [B], positions whose target states are known; slots behind them are overwritten before they are read.
        input_ids: int64 [B, N], what the first head reads: the token behind each position.
        position_ids: int64 [B, N].
        newest: int64 [B, 1], the slot of the newest position.
    """

    start: Tensor
    count: Tensor
    input_ids: Tensor
    position_ids: Tensor
    newest: Tensor


class MtpLayersDraft:
    """Drafts chains, step j with runner j; each runs an ``MtpHead`` over a pool of its own.

    Attributes:
        num_older: positions of a window whose entries may be made of drafted tokens, L - 1.
        num_slots: of a window, N: older positions, and the most that a round commits.
        older_states: [R, L - 1, H], target states of the positions before those that are committed next, newest last.
        level_start, level_count: int32 [R], the window that the first head ran over last.
        level_states: [R, N, H], what it put out there.
        level_logits: [R, V], of the newest position.
        pending: what plain rounds put aside for ``catch_up``.
    """

    kind = "mtp"
    can_skip = True
    reports_match_length = False

    def __init__(self, runners: tuple[HeadRunner, ...], shape: RoundShape, vocab_size: int) -> None:
        self.runners, self.shape, self.vocab_size = runners, shape, vocab_size
        self.programs = tuple(runner.programs for runner in runners)
        self.taps = runners[0].head.taps
        self.num_older = len(runners) - 1
        self.num_slots = self.num_older + shape.num_steps + 1
        self.reach = max(shape.num_steps + 1, MOST_PENDING)
        self.older_states = self.level_start = self.level_count = self.level_states = self.level_logits = torch.empty(0)
        self.pending = no_pending()

    def reserve(self, rows: int, capacity: int) -> bool:
        moved = [programs.reserve(rows, capacity) for programs in self.programs]
        if any(moved) or self.level_logits.shape[0] < rows:
            rows, device, head = self.programs[0].pool.rows, self.programs[0].device, self.runners[0].head
            like = {"dtype": head.dtype, "device": device}
            self.older_states = torch.zeros(rows, self.num_older, head.target_width, **like)
            self.level_start = torch.zeros(rows, dtype=torch.int32, device=device)
            self.level_count = torch.zeros(rows, dtype=torch.int32, device=device)
            self.level_states = torch.zeros(rows, self.num_slots, head.config.hidden_size, **like)
            self.level_logits = torch.zeros(rows, self.vocab_size, **like)
            self.pending = new_pending(rows, head.target_width, head.dtype, device)
            return True
        return False

    def forget(self) -> None:
        # The next request may leave rows to padding, over no page of their own: they run over its first slots again.
        for tensor in (self.level_start, self.level_count):
            tensor.zero_()
        self.pending.forget()

    def prepare(self, rows: int, plan: SamplingPlan, shape: RoundShape) -> None:
        for runner in self.runners:
            runner.prefill_program()
            runner.extend_program(rows, self.num_slots, all_states=True)

    def prefill(self, prompts: list[Tensor], page_table: Tensor, states: Tensor, max_tokens: int, first_row: int) -> None:
        """Every head over what is known of the prompts: the last j tokens' entries wait for tokens behind the prompt."""
        end = 0
        for row, prompt in enumerate(prompts, first_row):
            end += len(prompt)
            known = min(self.num_older, len(prompt) - 1)  # before the last token's, which is committed like a round's
            self.older_states[row, self.num_older - known :] = states[end - 1 - known : end - 1]
        for runner in self.runners:
            filled = runner.fill(prompts, page_table, states, max_tokens)
            if not filled:
                break
            prompts, states = [prompt[1:] for prompt in prompts], torch.cat(filled)

    def extend(self, state: DecodeState, verified: Verified) -> None:
        """Run the first head over the committed tokens and the older positions, and keep what it says; see the module.

        A plain round's only state is put aside instead.
        """
        if verified.states.shape[1] == 1:
            self.pending.put_aside(verified)
            return
        window, states = self._extend(state, verified, self.num_slots)
        self._keep(window.start, window.count, states)

    def catch_up(self, state: DecodeState) -> None:
        """Fill every cache with all that plain rounds put aside."""
        rows = state.cache_len.shape[0]
        before = self._window(state, self.level_start[:rows], self.level_count[:rows], self.num_slots)
        self._fill(state, before, self.level_states[:rows])  # the round before them left this to a proposal
        window, states = self._extend(state, self.pending.take(state), self.num_older + MOST_PENDING)
        self._fill(state, window, states)
        passed = (window.count - self.num_slots).clamp(min=0)  # the next proposal goes over the newest of them again
        self._keep(window.start + passed, window.count - passed, _slots(states, passed, self.num_slots))

    def propose(self, state: DecodeState, plan: SamplingPlan, shape: RoundShape, inputs: RoundInputs) -> Proposal:
        rows = state.cache_len.shape[0]
        window = self._window(state, self.level_start[:rows], self.level_count[:rows], self.num_slots)
        ids, states, logits = window.input_ids, self.level_states[:rows], self.level_logits[:rows, None]
        tokens, probs = [], []
        for depth in range(len(self.runners)):
            if depth > 0:
                ids = ids.roll(-1, 1)  # the slot of the newest position now lacks its token, which was drafted
                if depth <= shape.num_steps:
                    ids = ids.scatter(1, window.newest, tokens[-1])
                logits, states = self._run(depth, state, window, ids, states)
            if depth < shape.num_steps:
                token, q = choose_tokens(logits, inputs.lens[depth + 1][:, None], state, plan, None, self.vocab_size)
                tokens.append(token)
                probs.append(q)
        return Proposal(torch.cat([inputs.root, *tokens], 1), torch.cat(probs, 1) if plan.do_sample else None)

    def _extend(self, state: DecodeState, verified: Verified, num_slots: int) -> tuple[_Window, Tensor]:
        """The first head over a window of ``num_slots`` that ends with the committed tokens: the window, states [B, N, H]."""
        rows = verified.start.shape[0]
        known = torch.cat([self.older_states[:rows], verified.states], 1)  # [B, L - 1 + E, H]
        self.older_states[:rows].copy_(_slots(known, verified.count, self.num_older))
        older = verified.start.clamp(max=self.num_older)  # a text has no positions before its first
        window = self._window(state, verified.start - older, verified.count + older, num_slots)
        states = _slots(known, self.num_older - older, num_slots)
        logits, states = self._run(0, state, window, window.input_ids, states)
        self.level_logits[:rows].copy_(logits[:, 0])
        return window, states

    def _fill(self, state: DecodeState, window: _Window, states: Tensor) -> None:
        """The other heads over a window, for their entries; ``states`` [B, N, H] are the first one's. Entries that need tokens
        behind the text hold anything: the next proposal makes them again."""
        ids = window.input_ids
        for depth in range(1, len(self.runners)):
            ids = ids.roll(-1, 1)
            _, states = self._run(depth, state, window, ids, states)

    def _keep(self, start: Tensor, count: Tensor, states: Tensor) -> None:
        rows = start.shape[0]
        self.level_start[:rows].copy_(start)
        self.level_count[:rows].copy_(count)
        self.level_states[:rows].copy_(states)

    def _window(self, state: DecodeState, start: Tensor, count: Tensor, num_slots: int) -> _Window:
        ids, positions, newest = torch.ops.spec_compile.extend_inputs(state.tokens, start, count, state.end_len, num_slots)
        return _Window(start, count, ids, positions, newest)

    def _run(self, depth: int, state: DecodeState, window: _Window, input_ids: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        """Head ``depth`` over a window: logits [B, 1, V] of its newest position, states [B, N, H]."""
        rows, num_slots = input_ids.shape
        return self.runners[depth].extend_program(rows, num_slots, all_states=True)(
            input_ids=input_ids,
            hidden_states=states,
            position_ids=window.position_ids,
            page_table=state.page_table,
            cache_len=window.start,
            slots=window.newest,
        )


def _slots(states: Tensor, first: Tensor, count: int) -> Tensor:
    """``count`` slots of ``states`` [B, N, H] from each row's ``first`` on; the last slot stands for any behind it."""
    index = first[:, None] + torch.arange(count, device=first.device)
    index = index.clamp(max=states.shape[1] - 1).long()
    return states.gather(1, index[:, :, None].expand(-1, -1, states.shape[2]))
