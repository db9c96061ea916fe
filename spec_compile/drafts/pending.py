"""What plain rounds leave for a draft head that does not run in them: it would cost more than it brings while nobody drafts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from spec_compile.runtime.draft import MOST_PENDING, Verified
from spec_compile.runtime.state import DecodeState


@dataclass(frozen=True)
class PendingStates:
    """Target states of the tokens that plain rounds emitted since the head last ran.

    Attributes:
        states: [R, MOST_PENDING, n * Ht].
        count: int32 [R], how many of them count.
    """

    states: Tensor
    count: Tensor

    def put_aside(self, verified: Verified) -> None:
        """Append a plain round's only state."""
        rows, _, width = verified.states.shape
        index = self.count[:rows].clamp(max=MOST_PENDING - 1).long()[:, None, None].expand(-1, -1, width)
        self.states[:rows].scatter_(1, index, verified.states)
        self.count[:rows].add_(verified.count)

    def take(self, state: DecodeState) -> Verified:
        """All that was put aside, as if one round had committed it; nothing is left."""
        rows = state.cache_len.shape[0]
        count = self.count[:rows].clone()
        self.count[:rows].zero_()
        return Verified(state.cache_len - count, count, self.states[:rows])

    def forget(self) -> None:
        """A new request begins: a head that caught up over a cleared state would read behind its bounds."""
        self.count.zero_()


def new_pending(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> PendingStates:
    """Room for ``rows`` rows of states with ``width`` features."""
    states = torch.zeros(rows, MOST_PENDING, width, dtype=dtype, device=device)
    return PendingStates(states, torch.zeros(rows, dtype=torch.int32, device=device))


def no_pending() -> PendingStates:
    """What a draft has before its buffers are made."""
    return PendingStates(torch.empty(0), torch.empty(0, dtype=torch.int32))
