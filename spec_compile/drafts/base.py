"""What every kind of draft offers to the round. One file per kind; ``make_draft`` in ``__init__`` picks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from spec_compile.runtime.state import DecodeState, SamplingPlan


@dataclass(frozen=True)
class Proposal:
    """Drafted tokens and the law they were drawn from.

    Attributes:
        tokens: int64 [B, K].
        probs: float32 [B, K, V] when the tokens were sampled from it (q is ``full``); None when they were not drawn at
            all (q is ``one-hot``). Verification is exact for what is said here, and only for that.
    """

    tokens: Tensor
    probs: Tensor | None


class Draft(Protocol):
    """A source of drafts. Everything but ``prefill`` and ``prepare`` runs inside the round: static shapes, no host sync.

    Attributes:
        kind: ``"ngram"``, ``"causal_lm"``, … for reports.
        num_steps: tokens drafted a round (K).
    """

    kind: str
    num_steps: int

    def q_law(self, plan: SamplingPlan) -> Literal["one-hot", "full"]:
        """Which q ``propose`` hands over under ``plan``."""

    def reserve(self, rows: int, capacity: int) -> bool:
        """Make room for ``rows`` rows of ``capacity`` tokens; True when buffers moved (captured graphs are void)."""

    def prepare(self, rows: int, plan: SamplingPlan) -> None:
        """Build whatever ``propose`` needs for windows of ``rows`` rows, before capture."""

    def prefill(self, prompts: list[Tensor], state: DecodeState) -> None:
        """See the prompts; runs once a request, outside the round."""

    def propose(self, state: DecodeState, plan: SamplingPlan) -> Proposal:
        """Draft K tokens behind each row's root token."""

    def look_ahead(self, state: DecodeState) -> Tensor | None:
        """Called when tokens were committed. int32 [B]: how promising the next proposal is, 0 for not at all; None when
        that cannot be told without drafting."""
