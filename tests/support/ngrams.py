"""N-gram drafts that are right as often as a test needs them to be."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spec_compile.drafts.ngram import NgramDraft
from spec_compile.runtime.draft import Verified
from spec_compile.runtime.state import DecodeState


def looked_up(text: Tensor, mask: Tensor) -> Callable[[NgramDraft, DecodeState, Verified], Tensor]:
    """``extend`` as if the answers had stood in the prompts: drafts of ``text`` [B, P + n], every fifth token wrong.

    Args:
        mask: [B, P], 0 at the padding.
    """
    rows = [row[int((kept == 0).sum()) :].clone() for row, kept in zip(text, mask, strict=True)]
    for row in rows:
        row[::5] = (row[::5] + 1) % 96

    def extend(self: NgramDraft, state: DecodeState, verified: Verified) -> Tensor:
        for row, length, draft in zip(rows, state.cache_len.tolist(), state.next_draft, strict=False):
            future = row[length + 1 : length + 1 + self.shape.num_steps]
            draft[: len(future)] = future
        return torch.full_like(state.cache_len, self.max_ngram)

    return extend
