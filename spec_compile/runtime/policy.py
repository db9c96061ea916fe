"""Whether the next round drafts: measured, between rounds, on devices where the host knows the last round's result."""

from __future__ import annotations

from dataclasses import dataclass, field

_SMOOTHING = 0.3  # weight of the newest observation
_RETRY_EVERY = 24  # a class of proposals that lost is tried again after so many chances: texts change


@dataclass
class DraftPolicy:
    """Draft when the expected tokens per second with drafts exceed those without.

    Proposals are told apart by how promising their source calls them (for n-grams: the length of the match).

    Attributes:
        num_steps: tokens drafted when drafting.
        timed: decide by measured times too; without it only hopeless proposals (promise 0) are left out, which depends
            on the text alone and keeps sampled output reproducible.
    """

    num_steps: int
    timed: bool
    round_ms: dict[int, float] = field(default_factory=dict)  # drafts in the round -> smoothed time
    accept_length: dict[int, float] = field(default_factory=dict)  # promise -> smoothed accept length
    skipped: dict[int, int] = field(default_factory=dict)

    def choose(self, promise: int | None) -> int:
        """Number of tokens to draft in the next round: ``num_steps`` or 0."""
        if promise == 0:
            return 0
        key = -1 if promise is None else promise
        if not self.timed or key not in self.accept_length or len(self.round_ms) < 2:
            return self.num_steps
        worth = self.accept_length[key] * self.round_ms[0] > self.round_ms[self.num_steps]
        if worth or self.skipped.get(key, 0) >= _RETRY_EVERY:
            self.skipped[key] = 0
            return self.num_steps
        self.skipped[key] = self.skipped.get(key, 0) + 1
        return 0

    def observe(self, promise: int | None, num_drafts: int, accept_length: float, ms: float) -> None:
        """Learn from a finished round: mean accept length of its live rows and its wall time."""
        self.round_ms[num_drafts] = _smooth(self.round_ms.get(num_drafts), ms)
        if num_drafts > 0:
            key = -1 if promise is None else promise
            self.accept_length[key] = _smooth(self.accept_length.get(key), accept_length)


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else (1 - _SMOOTHING) * old + _SMOOTHING * new
