"""N-gram drafting: copy what followed the last time the current words stood in the text (prompt included).

No weights and no keys or values, so a draft costs microseconds; it pays on text that quotes or edits its input.
Source: prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

import torch
from torch import Tensor

from spec_compile.config import RoundShape
from spec_compile.runtime.draft import Proposal, RoundInputs, Verified
from spec_compile.runtime.state import DecodeState, SamplingPlan


class NgramDraft:
    """Matches each row's longest repeated suffix of ``max_ngram`` down to ``min_ngram`` tokens."""

    kind = "ngram"
    taps = ()
    programs = ()
    reach = 0
    can_skip = True
    reports_match_length = True

    def __init__(self, shape: RoundShape, min_ngram: int, max_ngram: int) -> None:
        self.shape, self.min_ngram, self.max_ngram = shape, min_ngram, max_ngram

    def reserve(self, rows: int, capacity: int) -> bool:
        return False

    def forget(self) -> None:
        pass

    def prepare(self, rows: int, plan: SamplingPlan, shape: RoundShape) -> None:
        pass

    def prefill(self, prompts: list[Tensor], page_table: Tensor, states: None, max_tokens: int, first_row: int) -> None:
        pass  # the state's token history is all it reads

    def catch_up(self, state: DecodeState) -> None:
        pass  # as in prefill

    def propose(self, state: DecodeState, plan: SamplingPlan, shape: RoundShape, inputs: RoundInputs) -> Proposal:
        return Proposal(torch.cat([inputs.root, state.next_draft[:, : shape.num_steps]], 1))  # found by extend

    def extend(self, state: DecodeState, verified: Verified) -> Tensor:
        tokens, match_length = torch.ops.spec_compile.ngram_propose(
            state.tokens, state.cache_len, self.shape.num_steps, self.min_ngram, self.max_ngram
        )
        state.next_draft.copy_(tokens)
        return match_length
