"""Drafting with an EAGLE head: one small layer over the target's own hidden states, as a chain or as a dynamic tree.

Between rounds the head holds one entry for every token of the target's cache and, of the newest one, its logits and state:
level 1 of the next round. A round drafts from there; what drafting writes into the head's cache is made of the head's own
states, and the extension that follows verification overwrites it with the target's true ones.

Source: EAGLE (2401.15077), EAGLE-2's dynamic trees (2406.16858), EAGLE-3 (2503.01840).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spec_compile.config import RoundShape
from spec_compile.drafts.choose import choose_tokens
from spec_compile.drafts.head_runner import HeadRunner
from spec_compile.drafts.pending import new_pending, no_pending
from spec_compile.errors import ConfigError
from spec_compile.runtime.draft import MOST_PENDING, Proposal, RoundInputs, Tree, Verified
from spec_compile.runtime.state import DecodeState, SamplingPlan


class EagleDraft:
    """Drafts with a head of ``hf_integration``; ``kind`` is the head's.

    A tree is drafted over one window of all nodes that are ever expanded, (num_steps - 1) × topk slots: each step runs it
    whole and reads the newest level. The head's weights are read once a step whatever the window, so the slots not drafted
    yet cost next to nothing, and one program with one mask serves every level.

    Attributes:
        level_logits: [R, Vd], of each row's newest entry.
        level_states: [R, H], what the head hands on there.
        pending: what plain rounds put aside for ``catch_up``.
    """

    can_skip = True
    reports_match_length = False

    def __init__(self, runner: HeadRunner, shape: RoundShape, vocab_size: int) -> None:
        head = runner.head
        choices = vocab_size if head.draft_ids is None else head.draft_ids.shape[0]
        if shape.topk > choices:
            raise ConfigError(f"topk={shape.topk}: the draft head has a vocabulary of {choices} tokens.")
        self.runner, self.programs = runner, (runner.programs,)
        self.head, self.shape, self.vocab_size = head, shape, vocab_size
        self.kind, self.taps = head.kind, head.taps
        self.reach = max(shape.num_steps * shape.topk, MOST_PENDING)
        self.level_logits = self.level_states = torch.empty(0)
        self.pending = no_pending()

    def reserve(self, rows: int, capacity: int) -> bool:
        moved = self.runner.programs.reserve(rows, capacity)
        if moved or self.level_logits.shape[0] < rows:
            head, device = self.head, self.runner.programs.device
            vocab_size = self.vocab_size if head.draft_ids is None else head.draft_ids.shape[0]
            rows = self.runner.programs.pool.rows
            self.level_logits = torch.zeros(rows, vocab_size, dtype=head.dtype, device=device)
            self.level_states = torch.zeros(rows, head.config.hidden_size, dtype=head.dtype, device=device)
            self.pending = new_pending(rows, head.target_width, head.dtype, device)
            moved = True
        return moved

    def forget(self) -> None:
        self.pending.forget()

    def prepare(self, rows: int, plan: SamplingPlan, shape: RoundShape) -> None:
        self.runner.prefill_program()
        self.runner.extend_program(rows, shape.num_steps + 1)
        if shape.num_steps > 1:
            self._step_program(rows, shape)

    def _step_program(self, rows: int, shape: RoundShape):
        return self.runner.step_program(rows, (shape.num_steps - 1) * shape.topk if shape.is_tree else 1, shape.topk)

    def prefill(self, prompts: list[Tensor], page_table: Tensor, states: Tensor, max_tokens: int, first_row: int) -> None:
        self.runner.fill(prompts, page_table, states, max_tokens)

    def extend(self, state: DecodeState, verified: Verified) -> None:
        """Write the committed tokens' entries, made of the target's states, and keep what the newest one predicts.

        A plain round's only state is put aside instead: the head would cost more than it brings while nobody drafts.
        """
        if verified.states.shape[1] > 1:
            self._extend(state, verified)
        else:
            self.pending.put_aside(verified)

    def catch_up(self, state: DecodeState) -> None:
        """Extend by all that plain rounds put aside."""
        self._extend(state, self.pending.take(state))

    def _extend(self, state: DecodeState, verified: Verified) -> None:
        rows, num_tokens = verified.states.shape[:2]
        input_ids, position_ids, newest = torch.ops.spec_compile.extend_inputs(
            state.tokens, verified.start, verified.count, state.end_len, num_tokens
        )
        inputs = {
            "input_ids": input_ids,
            "hidden_states": verified.states,
            "position_ids": position_ids,
            "page_table": state.page_table,
            "cache_len": verified.start,
        }
        if num_tokens > 1:
            inputs["slots"] = newest
        logits, states = self.runner.extend_program(rows, num_tokens)(**inputs)
        self.level_logits[:rows].copy_(logits[:, 0])
        self.level_states[:rows].copy_(states[:, 0])

    def propose(self, state: DecodeState, plan: SamplingPlan, shape: RoundShape, inputs: RoundInputs) -> Proposal:
        if shape.is_tree:
            return self._propose_tree(state, shape, inputs)
        return self._propose_chain(state, plan, shape, inputs)

    def _propose_chain(self, state: DecodeState, plan: SamplingPlan, shape: RoundShape, inputs: RoundInputs) -> Proposal:
        rows = state.cache_len.shape[0]
        logits, states = self.level_logits[:rows], self.level_states[:rows, None]  # [B, Vd], [B, 1, H]
        tokens, probs = [], []
        for step in range(shape.num_steps):
            positions = inputs.lens[step + 1][:, None]
            token, q = choose_tokens(logits[:, None], positions, state, plan, self.head.draft_ids, self.vocab_size)
            tokens.append(token)
            probs.append(q)
            if step + 1 < shape.num_steps:
                logits, states = self._step_program(rows, shape)(
                    input_ids=token,
                    hidden_states=states,
                    position_ids=inputs.position_ids[:, step : step + 1],
                    page_table=state.page_table,
                    cache_len=inputs.lens[step],
                )
                logits = logits[:, 0]
        return Proposal(torch.cat([inputs.root, *tokens], 1), torch.cat(probs, 1) if plan.do_sample else None)

    def _propose_tree(self, state: DecodeState, shape: RoundShape, inputs: RoundInputs) -> Proposal:
        ops = torch.ops.spec_compile
        rows, topk, steps = state.cache_len.shape[0], shape.topk, shape.num_steps
        device, num_slots = state.cache_len.device, (steps - 1) * topk
        num_candidates = topk + (steps - 1) * topk**2
        candidates = (
            torch.zeros(rows, num_candidates, dtype=torch.int64, device=device),
            torch.zeros(rows, num_candidates, dtype=torch.float32, device=device),
            torch.zeros(rows, num_candidates, dtype=torch.int32, device=device),
        )
        mask = torch.zeros(rows, num_slots, (num_slots + 31) // 32, dtype=torch.int32, device=device)
        nodes = torch.zeros(rows, num_slots, dtype=torch.int64, device=device)
        fed = torch.zeros(rows, num_slots, self.level_states.shape[1], dtype=self.level_states.dtype, device=device)
        positions = inputs.position_ids[:, : steps - 1].repeat_interleave(topk, dim=1)  # [B, P]; level 0 is behind the root
        states = self.level_states[:rows, None].expand(-1, topk, -1)  # [B, K, H]: all of level 0 continue the root
        ids, logprobs = ops.draft_topk(self.level_logits[:rows], topk, self.head.draft_ids)
        beam = None
        for level in range(steps):
            tokens, beam, parent = ops.expand_beam(ids, logprobs, beam, *candidates, mask, level)
            if level == steps - 1:
                break
            here = slice(level * topk, (level + 1) * topk)
            nodes[:, here] = tokens
            fed[:, here] = states.gather(1, parent[:, :, None].expand(-1, -1, states.shape[2]))
            fed_in = {
                "input_ids": nodes,
                "hidden_states": fed,
                "position_ids": positions,
                "tree_mask": mask,
                "page_table": state.page_table,
                "cache_len": state.cache_len,
            }
            if num_slots > topk:
                slots = torch.arange(here.start, here.stop, device=device)
                fed_in["slots"] = slots.expand(rows, -1)
            logits, states = self._step_program(rows, shape)(**fed_in)
            ids, logprobs = ops.draft_topk(logits.flatten(0, 1), topk, self.head.draft_ids)
        window, parents, depth, tree_mask = ops.build_tree(*candidates, inputs.root[:, 0], shape.num_draft_tokens)
        return Proposal(window, None, Tree(parents, depth, tree_mask, candidates[1]))
