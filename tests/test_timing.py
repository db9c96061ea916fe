"""The GPU's idle share from the events around rounds, on a made-up clock."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from spec_compile.config import RoundShape, chain
from spec_compile.runtime.decode import RoundResult, Timing, _accept_lengths


@dataclass
class Event:
    """A moment, in milliseconds."""

    at: float

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at

    def synchronize(self) -> None:
        pass


def timing(rounds: list[tuple[RoundShape, float]], gap: float = 0.0, late: float = 0.0) -> Timing:
    """Rounds (shape, ms) one behind another, ``gap`` ms apart; every second one's launch came ``late`` ms late."""
    result, now = Timing(), 0.0
    for number, (shape, ms) in enumerate(rounds):
        end = now + ms + late * (number % 2)
        result.events.append((shape, Event(now), Event(end)))
        now = end + gap
    return result


def test_rounds_without_gaps_leave_nothing_idle_whatever_their_shapes():
    """A plain round takes half as long as one that drafts; the difference is not idle time."""
    rounds = [(chain(0), 4.0), (chain(5), 8.0), (chain(5), 8.0), (chain(2), 5.0)] * 10
    assert timing(rounds).idle_fraction() == pytest.approx(0.0)


def test_gaps_and_late_launches_are_idle():
    rounds = [(chain(0), 4.0)] * 10 + [(chain(5), 8.0)] * 10
    assert timing(rounds, gap=1.0).idle_fraction() == pytest.approx(19 / 139)
    assert timing(rounds, late=2.0).idle_fraction() == pytest.approx(20 / 140)


def test_without_events_nobody_knows():
    assert Timing().idle_fraction() is None


def test_a_rounds_milliseconds_reach_to_the_next_rounds_start():
    rounds = [(chain(0), 4.0), (chain(5), 8.0), (chain(2), 5.0)]
    assert timing(rounds, gap=1.0).round_milliseconds() == [5.0, 9.0]
    assert Timing().round_milliseconds() == []


def test_rows_that_end_within_their_window_were_not_refused():
    """Cut off by the length asked for: what was drafted behind it was judged, but nobody can tell how."""
    result = RoundResult([[5], [5, 6, 7], [5, 6], []], [True, True, False, True], drafted=2, match_length=[3] * 4)
    assert _accept_lengths(result, [0, 1, 2, 3], chain(2)) == [3, 2]
