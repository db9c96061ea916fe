"""How the next round drafts: measured, between rounds, from what the last ones the host knows of brought and cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from spec_compile.config import RoundShape

_SMOOTHING = 0.3  # weight of the newest round time
_FORGET = 0.93  # what an observation counts for after one more
_FADE = 0.99  # what it counts for after a round that could not tell: a source or a shape that lost gets new chances
_MOST_FADING = 1.0 / (1.0 - _FORGET)  # the most that what fades counts for: what many rounds of one row come to
_PRIOR_WEIGHT = 2.0  # rows whose draft was seen that the prior is worth: many rows tell in one round
_PRIOR_RATE = 0.6  # acceptance of a draft model nobody has watched yet
_PROBES = 3  # rounds that try a draft model again
_SHORTEST_REST, _LONGEST_REST = 32, 256  # plain rounds before they do; doubled while it goes on losing
_MARGIN = 1.05  # plain rounds' advantage over a draft model, whose rows end at different times: the last ones run almost alone
_PROBE_BUDGET = 0.01  # share of the time that may go into trying the widest shape while another one does better


@dataclass
class DraftPolicy:
    """Choose the round shape with the most expected tokens per second.

    Expected tokens come from the acceptance seen at each draft position. It is counted separately for chains and for trees,
    and for each match length: how many tokens of the text an n-gram draft matched before it copied on. After a match of m
    tokens, a draft is first taken to be accepted with probability m / (m + 1); a position that was never reached is taken to
    be like the one before it. On a CPU, a window of a few tokens costs hardly more than one token, so a draft of unknown
    quality is tried with few drafts.

    A draft model has no match length. If it is slower than plain decoding, it rests for some rounds; each time it loses again,
    it rests longer. While a shorter shape than the one asked for does best, the one asked for is tried again from time to
    time, because the acceptance of a short chain does not show that of a long chain or a tree.

    Attributes:
        shapes: what a round may be, plain decoding first if that is a choice.
        round_ms: smoothed time of each shape seen so far.
    """

    shapes: tuple[RoundShape, ...]
    round_ms: dict[RoundShape, float] = field(default_factory=dict)
    seen: dict[tuple[int | None, bool], list[_Position]] = field(default_factory=dict)  # one entry a draft position
    resting: int = 0
    probing: int = 0
    probe: RoundShape | None = None  # what probing rounds draft
    rest: int = _SHORTEST_REST
    passed_over: int = 0  # rounds since the widest shape was last drafted

    def choose(self, match_length: int | None) -> RoundShape:
        """The shape of the next round.

        A match length of 0 gets the fewest drafts; None comes from a draft that has no match length.
        """
        if match_length == 0 or len(self.shapes) == 1:
            return self.shapes[0]
        if self.resting > 0:
            self.resting -= 1
            self.probing, self.probe = (_PROBES if self.resting == 0 else 0), self.shapes[1]
            return self.shapes[0]
        if self.probing > 0:
            self.probing -= 1
            return self.probe
        best = max(self.shapes, key=lambda shape: self._worth(match_length, shape))
        if match_length is None and best.num_steps == 0:
            self.resting, self.rest = self.rest - 1, min(2 * self.rest, _LONGEST_REST)
        elif match_length is None:
            self.rest = _SHORTEST_REST
            self._probe_widest(best)
        return best

    def _worth(self, match_length: int | None, shape: RoundShape) -> float:
        """Tokens a millisecond, plain rounds' with their advantage."""
        tokens = self.expected_tokens(match_length, shape) / self.cost(shape)
        return tokens * _MARGIN if match_length is None and shape.num_steps == 0 else tokens

    def _probe_widest(self, best: RoundShape) -> None:
        """Let the next rounds try the widest shape if it has been passed over for so long that they cost next to nothing."""
        widest = self.shapes[-1]
        self.passed_over = self.passed_over + 1 if best != widest else 0
        loss = _PROBES * (self.cost(widest) / self.cost(best) - 1)  # in rounds of the best, if the probes bring no more
        if self.passed_over >= max(_SHORTEST_REST, loss / _PROBE_BUDGET):
            self.passed_over, self.probing, self.probe = 0, _PROBES, widest

    def observe(self, match_length: int | None, shape: RoundShape, accept_lengths: list[int], ms: float | None) -> None:
        """Learn from a finished round: the accept length of each of its live rows, and its time if that is known."""
        if ms is not None:
            old = self.round_ms.get(shape)
            self.round_ms[shape] = ms if old is None else (1 - _SMOOTHING) * old + _SMOOTHING * ms
        if match_length == 0 or not accept_lengths:
            return
        if shape.num_steps > 0 or match_length is not None:  # a draft model that rests has its probes
            for key, known in self.seen.items():
                untold = shape.num_steps if key[1] == shape.is_tree else 0  # a plain round is a chain of none
                for position in known[untold:] if key[0] == match_length else ():
                    position.fade()
        if shape.num_steps == 0:
            return
        positions = self._positions(match_length, shape)
        for index in range(shape.num_steps):
            tried = [length for length in accept_lengths if length >= 1 + index]  # what follows a refused draft was not
            if not tried:
                break
            positions[index].add(sum(length > 1 + index for length in tried), len(tried))

    def _positions(self, match_length: int | None, shape: RoundShape) -> list[_Position]:
        longest = max(known.num_steps for known in self.shapes)
        return self.seen.setdefault((match_length, shape.is_tree), [_Position() for _ in range(longest)])

    def expected_tokens(self, match_length: int | None, shape: RoundShape) -> float:
        """Tokens that a round of ``shape`` emits on average, the bonus token included."""
        tokens = reach = 1.0
        rate = _PRIOR_RATE if match_length is None else match_length / (match_length + 1)
        positions = self.seen.get((match_length, shape.is_tree)) or self.seen.get((match_length, not shape.is_tree), ())
        for index in range(shape.num_steps):
            if index < len(positions):
                rate = positions[index].rate(prior=rate)
            reach *= rate
            tokens += reach
        return tokens

    def cost(self, shape: RoundShape) -> float:
        """Milliseconds of a round; one not measured yet is guessed from the nearest that was (10 % a draft)."""
        if shape in self.round_ms or not self.round_ms:
            return self.round_ms.get(shape, _guess(shape))
        nearest = min(self.round_ms, key=lambda known: abs(known.num_draft_tokens - shape.num_draft_tokens))
        return self.round_ms[nearest] * _guess(shape) / _guess(nearest)


def _guess(shape: RoundShape) -> float:
    return 1.0 + 0.1 * (shape.num_draft_tokens - 1)


@dataclass
class _Position:
    """Acceptance at one draft position: rows that took the draft, of those that reached it, newest rounds first in weight."""

    accepted: float = 0.0
    tried: float = 0.0

    def add(self, accepted: int, tried: int) -> None:
        self.accepted = self.accepted * _FORGET + accepted
        self.tried = self.tried * _FORGET + tried

    def fade(self) -> None:
        """Count for less; what many rows have shown is forgotten as soon as what one has."""
        kept = min(1.0, _MOST_FADING / max(self.tried, 1.0)) * _FADE
        self.accepted *= kept
        self.tried *= kept

    def rate(self, prior: float) -> float:
        return (self.accepted + _PRIOR_WEIGHT * prior) / (self.tried + _PRIOR_WEIGHT)
