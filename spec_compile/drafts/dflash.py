"""Drafting with a DFlash head: a block of tokens in one forward, behind a context made of the target's own hidden states.

Between rounds the head holds one entry for every token of the target's cache. A round runs one block, the root and masks, whose
keys and values land behind that context; the entries of the committed tokens overwrite them after verification.

Source: DFlash (Chen et al. 2026, arXiv 2602.06036).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spec_compile.config import RoundShape
from spec_compile.drafts.choose import choose_tokens
from spec_compile.drafts.dflash_runner import DFlashRunner
from spec_compile.runtime.draft import Proposal, RoundInputs, Verified
from spec_compile.runtime.state import DecodeState, SamplingPlan


class DFlashDraft:
    """Drafts chains with a head of ``hf_integration``. Slots are independent given the context, so sampled drafts come with
    each slot's own distribution.

    Attributes:
        block_mask: int32 [R, block_size, W], every slot sees all of the block.
    """

    can_skip = False
    reports_match_length = False

    def __init__(self, runner: DFlashRunner, shape: RoundShape, vocab_size: int) -> None:
        head = runner.head
        self.runner, self.programs = runner, (runner.programs,)
        self.head, self.shape, self.vocab_size = head, shape, vocab_size
        self.kind, self.taps, self.reach = head.kind, head.taps, head.block_size
        self.block_mask = torch.empty(0)

    def reserve(self, rows: int, capacity: int) -> bool:
        moved = self.runner.programs.reserve(rows, capacity)
        if moved:
            slots = self.head.block_size
            words = [(1 << min(slots - first, 32)) - 1 for first in range(0, slots, 32)]
            words = torch.tensor(words, device=self.runner.programs.device).to(torch.int32)  # bit 31 is the sign
            self.block_mask = words.repeat(self.runner.programs.pool.rows, slots, 1)
        return moved

    def forget(self) -> None:
        pass

    def prepare(self, rows: int, plan: SamplingPlan, shape: RoundShape) -> None:
        self.runner.prefill_program()
        self.runner.extend_program(rows, shape.num_steps + 1)
        self.runner.block_program(rows, shape.num_steps)

    def prefill(self, prompts: list[Tensor], page_table: Tensor, states: Tensor, max_tokens: int, first_row: int) -> None:
        self.runner.fill(prompts, page_table, states)  # the target's groups are this large at most

    def extend(self, state: DecodeState, verified: Verified) -> None:
        """Write the committed tokens' entries; what is written behind them is not attended to before it is overwritten."""
        rows, num_tokens = verified.states.shape[:2]
        offsets = torch.arange(num_tokens, device=verified.start.device)
        self.runner.extend_program(rows, num_tokens)(
            hidden_states=verified.states,
            position_ids=verified.start[:, None] + offsets,
            page_table=state.page_table,
            cache_len=verified.start,
        )

    def catch_up(self, state: DecodeState) -> None:
        pass  # never left out

    def propose(self, state: DecodeState, plan: SamplingPlan, shape: RoundShape, inputs: RoundInputs) -> Proposal:
        rows, head = state.cache_len.shape[0], self.head
        offsets = torch.arange(head.block_size, device=state.cache_len.device)
        (logits,) = self.runner.block_program(rows, shape.num_steps)(
            input_ids=head.block(inputs.root[:, 0]),
            position_ids=state.cache_len[:, None] + offsets,
            tree_mask=self.block_mask[:rows],
            page_table=state.page_table,
            cache_len=state.cache_len,
        )
        positions = inputs.lens[1:].T  # [B, T]
        tokens, probs = choose_tokens(logits, positions, state, plan, head.draft_ids, self.vocab_size)
        return Proposal(torch.cat([inputs.root, tokens], 1), probs)
