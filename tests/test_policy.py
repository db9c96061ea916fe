"""Whether a round drafts: by what the source promises, what drafts brought so far, and what rounds cost."""

from __future__ import annotations

import pytest

from spec_compile.runtime.policy import DraftPolicy

K = 5


def taught(accept_length: float, *, plain_ms: float = 10.0, drafted_ms: float = 15.0, promise: int = 2) -> DraftPolicy:
    """A timed policy that has seen a plain round and a drafted one."""
    policy = DraftPolicy(K, timed=True)
    policy.observe(0, 0, 1.0, plain_ms)
    policy.observe(promise, K, accept_length, drafted_ms)
    return policy


def test_a_hopeless_proposal_is_never_verified():
    assert DraftPolicy(K, timed=False).choose(0) == 0
    assert DraftPolicy(K, timed=True).choose(0) == 0
    assert taught(6.0, promise=0).choose(0) == 0


def test_whatever_has_not_been_tried_is_tried():
    fresh = DraftPolicy(K, timed=True)
    assert fresh.choose(3) == K and fresh.choose(None) == K
    assert taught(1.0, promise=2).choose(3) == K, "another promise is another class"


def test_drafts_stay_out_while_the_cost_of_plain_rounds_is_unknown():
    policy = DraftPolicy(K, timed=True)
    for _ in range(20):
        policy.observe(2, K, 1.0, 100.0)
    assert policy.choose(2) == K, "there is nothing to compare with"


@pytest.mark.parametrize("accept_length,drafts", [(1.0, 0), (1.49, 0), (1.51, K), (4.0, K)])
def test_drafting_must_bring_more_tokens_per_second(accept_length: float, drafts: int):
    """A drafted round costs 1.5 plain ones here."""
    assert taught(accept_length).choose(2) == drafts


def test_untimed_policies_decide_by_the_text_alone():
    policy = DraftPolicy(K, timed=False)
    for _ in range(20):
        policy.observe(2, K, 1.0, 1000.0)
        policy.observe(0, 0, 1.0, 0.001)
    assert policy.choose(2) == K and policy.choose(0) == 0


def test_classes_of_proposals_are_judged_apart():
    policy = taught(1.0, promise=1)
    policy.observe(4, K, 6.0, 15.0)
    assert policy.choose(1) == 0 and policy.choose(4) == K


def test_a_loser_gets_another_chance_now_and_then():
    policy = taught(1.0)
    choices = [policy.choose(2) for _ in range(100)]
    assert choices.count(K) == 4 and choices[:24] == [0] * 24 and choices[24] == K


def test_a_text_that_turns_repetitive_is_drafted_again():
    policy = taught(1.0)
    assert policy.choose(2) == 0
    for _ in range(10):
        policy.observe(2, K, 6.0, 15.0)  # the retries went well
    assert policy.choose(2) == K
    for _ in range(10):
        policy.observe(2, K, 1.0, 15.0)
    assert policy.choose(2) == 0


def test_averages_follow_the_newest_observations():
    policy = DraftPolicy(K, timed=True)
    for ms in (10.0, 20.0):
        policy.observe(2, K, 2.0, ms)
    assert policy.round_ms[K] == pytest.approx(13.0)
    policy.observe(0, 0, 1.0, 8.0)
    assert policy.round_ms == {K: pytest.approx(13.0), 0: 8.0} and policy.accept_length == {2: 2.0}, (
        "a plain round says nothing about drafts"
    )


def test_a_draft_that_cannot_tell_its_promise_is_always_used():
    """Only rounds with promise 0 run plain, so a draft without promises never has anything to be compared with. A causal LM
    must not be left out of a round: its cache would miss the tokens of that round."""
    policy = DraftPolicy(K, timed=True)
    for _ in range(50):
        drafts = policy.choose(None)
        assert drafts == K
        policy.observe(None, drafts, 1.0, 1000.0)
