"""N-gram drafting: copy what followed the last time the current words stood in the text (prompt included).

No weights and no keys or values, so a draft costs microseconds; it pays on text that quotes or edits its input.
Source: prompt lookup decoding (Saxena 2023, github.com/apoorvumang/prompt-lookup-decoding).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from spec_compile.drafts.base import Proposal
from spec_compile.ops import ngram as ngram_ops  # registers spec_compile::ngram_propose
from spec_compile.runtime.state import DecodeState, SamplingPlan

__all__ = ["NgramDraft", "ngram_ops"]


class NgramDraft:
    """Matches each row's longest repeated suffix of ``max_ngram`` down to ``min_ngram`` tokens."""

    kind = "ngram"

    def __init__(self, num_steps: int, min_ngram: int, max_ngram: int) -> None:
        self.num_steps, self.min_ngram, self.max_ngram = num_steps, min_ngram, max_ngram

    def q_law(self, plan: SamplingPlan) -> Literal["one-hot", "full"]:
        return "one-hot"

    def reserve(self, rows: int, capacity: int) -> bool:
        return False

    def prepare(self, rows: int, plan: SamplingPlan) -> None:
        pass

    def prefill(self, prompts: list[Tensor], state: DecodeState) -> None:
        pass  # the state's token history is all it reads

    def propose(self, state: DecodeState, plan: SamplingPlan) -> Proposal:
        return Proposal(state.next_draft[:, : self.num_steps], None)  # found by look_ahead

    def look_ahead(self, state: DecodeState) -> Tensor:
        tokens, match_length = torch.ops.spec_compile.ngram_propose(
            state.tokens, state.cache_len, self.num_steps, self.min_ngram, self.max_ngram
        )
        state.next_draft.copy_(tokens)
        return match_length
