"""How many tokens a round drafts: by what the source promises, what drafts brought so far, and what rounds cost."""

from __future__ import annotations

import pytest

from spec_compile.runtime.policy import DraftPolicy

K = 5
SIZES = (0, 2, K)
MS = {0: 10.0, 2: 11.5, K: 16.0}  # as on a CPU: a short window costs hardly more than one token


def measured() -> DraftPolicy:
    """A policy that knows what its rounds cost and nothing of its drafts."""
    policy = DraftPolicy(SIZES)
    policy.round_ms = dict(MS)
    return policy


def taught(accept_length: float, promise: int = 2, rounds: int = 30) -> DraftPolicy:
    """A measured policy whose full drafts of one promise ended at ``accept_length`` each time."""
    policy = measured()
    for _ in range(rounds):
        policy.observe(promise, K, accept_length, MS[K])
    return policy


def test_a_hopeless_proposal_is_never_verified():
    assert DraftPolicy(SIZES).choose(0) == 0
    assert taught(6.0).choose(0) == 0


def test_a_source_without_promises_always_drafts():
    """A causal LM must not be left out of a round: its cache would miss the tokens of that round."""
    policy = DraftPolicy((K,))
    for _ in range(50):
        assert policy.choose(None) == K
        policy.observe(None, K, 1.0, 1000.0)


def test_short_matches_are_tried_with_short_drafts_and_long_ones_with_long():
    policy = measured()
    assert policy.choose(1) == 2
    assert policy.choose(9) == K


@pytest.mark.parametrize("accept_length,drafts", [(1.0, 0), (2.0, 2), (6.0, K)])
def test_the_size_with_most_expected_tokens_per_second_wins(accept_length: float, drafts: int):
    """Refused at once, after one token, or never: no draft, a short one, a full one."""
    assert taught(accept_length).choose(2) == drafts


def test_round_times_decide_too():
    policy = taught(2.0)
    policy.round_ms |= {2: 30.0, K: 30.0}
    assert policy.choose(2) == 0, "2 tokens in 30 ms are worse than 1 in 10"
    policy = taught(6.0)
    policy.round_ms[K] = 100.0
    assert policy.choose(2) == 2


def test_sizes_not_measured_yet_are_guessed_from_those_that_were():
    policy = DraftPolicy(SIZES)
    assert policy.choose(9) == K, "nothing is known: the promise decides"
    policy.observe(9, K, 1.0, 150.0)
    assert policy._cost(0) == pytest.approx(100.0) and policy._cost(2) == pytest.approx(120.0)


def test_classes_of_proposals_are_judged_apart():
    policy = taught(1.0, promise=1)
    for _ in range(10):
        policy.observe(4, K, 6.0, MS[K])
    assert policy.choose(1) == 0 and policy.choose(4) == K


def test_only_positions_that_were_reached_are_judged():
    policy = measured()
    policy.observe(2, K, 2.0, MS[K])  # the first draft accepted, the second refused
    first, second, third = policy.seen[2][:3]
    assert (first.accepted, first.tried) == (1.0, 1.0)
    assert (second.accepted, second.tried) == (0.0, 1.0)
    assert third.tried == 0.0


def test_a_batch_counts_the_share_of_rows_that_got_there():
    policy = measured()
    policy.observe(2, K, 2.5, MS[K])
    assert [p.accepted for p in policy.seen[2][:3]] == [1.0, 0.5, 0.0]


def test_a_loser_gets_another_chance_now_and_then_and_a_cheap_one():
    policy = taught(1.0)
    choices = []
    for _ in range(100):
        size = policy.choose(2)
        choices.append(size)
        policy.observe(2, size, 1.0, MS[size])
    assert choices[:10] == [0] * 10
    assert 1 <= choices.count(2) <= 15 and K not in choices


def test_a_text_that_turns_repetitive_is_drafted_again():
    policy = taught(1.0)
    chosen = []
    for _ in range(120):
        size = policy.choose(2)
        chosen.append(size)
        policy.observe(2, size, size + 1.0, MS[size])
    assert chosen[0] == 0 and chosen[-1] == K


def test_times_follow_the_newest_observations():
    policy = DraftPolicy(SIZES)
    for ms in (10.0, 20.0):
        policy.observe(2, K, 2.0, ms)
    assert policy.round_ms[K] == pytest.approx(13.0)
