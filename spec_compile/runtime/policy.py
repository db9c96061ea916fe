"""How many tokens the next round drafts: measured, between rounds, where the host knows the last round's result."""

from __future__ import annotations

from dataclasses import dataclass, field

_SMOOTHING = 0.3  # weight of the newest round time
_FORGET = 0.93  # what an observation counts for after one more
_FADE = 0.99  # what it counts for after a round that left its proposal out: a source that lost gets new chances
_PRIOR_WEIGHT = 2.0  # observations that the prior is worth


@dataclass
class DraftPolicy:
    """Choose the number of drafts with the most expected tokens per second.

    Expected tokens come from the acceptance seen at each draft position, apart for proposals that their source calls more
    or less promising (for n-grams: the length of the match). A match of m tokens starts at m / (m + 1); a position never
    reached is taken to be like the one before it. Windows of a few tokens cost hardly more than one on a CPU, so a short
    draft is how a doubtful source is tried.

    Attributes:
        sizes: numbers of drafts a round may have, ascending.
    """

    sizes: tuple[int, ...]
    round_ms: dict[int, float] = field(default_factory=dict)  # drafts in the round -> smoothed time
    seen: dict[int, list[_Position]] = field(default_factory=dict)  # promise -> one entry a draft position

    def choose(self, promise: int | None) -> int:
        """Number of tokens to draft in the next round, one of ``sizes``.

        A promise of 0 gets the fewest, a source without promises the most.
        """
        if promise == 0:
            return self.sizes[0]
        if promise is None:
            return self.sizes[-1]
        return max(self.sizes, key=lambda size: self._expected_tokens(promise, size) / self._cost(size))

    def observe(self, promise: int | None, num_drafts: int, accept_length: float, ms: float) -> None:
        """Learn from a finished round: mean accept length of its live rows and its wall time."""
        old = self.round_ms.get(num_drafts)
        self.round_ms[num_drafts] = ms if old is None else (1 - _SMOOTHING) * old + _SMOOTHING * ms
        if not promise:
            return
        positions = self.seen.setdefault(promise, [_Position() for _ in range(self.sizes[-1])])
        if num_drafts == 0:
            for position in positions:
                position.fade()
        for index in range(num_drafts):
            accepted = min(1.0, max(0.0, accept_length - 1 - index))  # of rows that end apart, the share that got here
            positions[index].add(accepted)
            if accepted < 1.0:
                break  # what follows a refused draft was not tried

    def _expected_tokens(self, promise: int, num_drafts: int) -> float:
        tokens = reach = 1.0
        rate = promise / (promise + 1)
        positions = self.seen.get(promise, ())
        for index in range(num_drafts):
            if index < len(positions):
                rate = positions[index].rate(prior=rate)
            reach *= rate
            tokens += reach
        return tokens

    def _cost(self, num_drafts: int) -> float:
        """Milliseconds of a round; one not measured yet is guessed from the nearest that was (10 % a draft)."""
        if num_drafts in self.round_ms or not self.round_ms:
            return self.round_ms.get(num_drafts, _guess(num_drafts))
        nearest = min(self.round_ms, key=lambda known: abs(known - num_drafts))
        return self.round_ms[nearest] * _guess(num_drafts) / _guess(nearest)


def _guess(num_drafts: int) -> float:
    return 1.0 + 0.1 * num_drafts


@dataclass
class _Position:
    """Acceptance at one draft position, newest observations first in weight."""

    accepted: float = 0.0
    tried: float = 0.0

    def add(self, accepted: float) -> None:
        self.accepted = self.accepted * _FORGET + accepted
        self.tried = self.tried * _FORGET + 1.0

    def fade(self) -> None:
        self.accepted *= _FADE
        self.tried *= _FADE

    def rate(self, prior: float) -> float:
        return (self.accepted + _PRIOR_WEIGHT * prior) / (self.tried + _PRIOR_WEIGHT)
