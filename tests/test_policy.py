"""How the next round drafts: by the match length, by what drafts brought so far, and by what rounds cost."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from spec_compile.config import RoundShape, chain
from spec_compile.runtime.policy import DraftPolicy

PLAIN, SHORT, FULL, TREE = chain(0), chain(2), chain(5), RoundShape(5, 4, 8)
MS = {PLAIN: 10.0, SHORT: 11.5, FULL: 16.0}  # as on a CPU: a short window costs hardly more than one token


def measured() -> DraftPolicy:
    """A policy that knows what its rounds cost and nothing of its drafts."""
    policy = DraftPolicy((PLAIN, SHORT, FULL))
    policy.round_ms = dict(MS)
    return policy


def taught(accept_length: int, match_length: int | None = 2, rounds: int = 30) -> DraftPolicy:
    """A measured policy whose full drafts of one match length ended at ``accept_length`` each time."""
    policy = measured()
    for _ in range(rounds):
        policy.observe(match_length, FULL, [accept_length], MS[FULL])
    return policy


def test_a_hopeless_proposal_is_never_verified():
    assert DraftPolicy((PLAIN, SHORT, FULL)).choose(0) == PLAIN
    assert taught(6).choose(0) == PLAIN


def test_a_source_with_one_shape_always_drafts():
    """A causal LM must not be left out of a round: its cache would miss the tokens of that round."""
    policy = DraftPolicy((FULL,))
    for _ in range(50):
        assert policy.choose(None) == FULL
        policy.observe(None, FULL, [1], 1000.0)


def test_short_matches_are_tried_with_short_drafts_and_long_ones_with_long():
    policy = measured()
    assert policy.choose(1) == SHORT
    assert policy.choose(9) == FULL


@pytest.mark.parametrize("match_length", [2, None])
@pytest.mark.parametrize("accept_length,shape", [(1, PLAIN), (2, SHORT), (6, FULL)])
def test_the_shape_with_most_expected_tokens_per_second_wins(accept_length: int, shape: RoundShape, match_length: int | None):
    """Refused at once, after one token, or never: no draft, a short one, a full one."""
    assert taught(accept_length, match_length).choose(match_length) == shape


def test_round_times_decide_too():
    policy = taught(2)
    policy.round_ms |= {SHORT: 30.0, FULL: 30.0}
    assert policy.choose(2) == PLAIN, "2 tokens in 30 ms are worse than 1 in 10"
    policy = taught(6)
    policy.round_ms[FULL] = 100.0
    assert policy.choose(2) == SHORT


def test_shapes_not_measured_yet_are_guessed_from_those_that_were():
    policy = DraftPolicy((PLAIN, SHORT, FULL))
    assert policy.choose(9) == FULL, "nothing is known: the match length decides"
    policy.observe(9, FULL, [1], 150.0)
    assert policy.cost(PLAIN) == pytest.approx(100.0) and policy.cost(SHORT) == pytest.approx(120.0)


def test_classes_of_proposals_are_judged_apart():
    policy = taught(1, match_length=1)
    for _ in range(10):
        policy.observe(4, FULL, [6], MS[FULL])
    assert policy.choose(1) == PLAIN and policy.choose(4) == FULL


def test_trees_and_chains_are_judged_apart():
    """A tree accepts where a chain is refused; until it was watched, it is expected to do as the chain did."""
    policy = DraftPolicy((PLAIN, FULL, TREE), round_ms={PLAIN: 10.0, FULL: 14.0, TREE: 14.0})
    for _ in range(30):
        policy.observe(None, FULL, [1, 2], None)
    assert policy.expected_tokens(None, TREE) == policy.expected_tokens(None, FULL)
    for _ in range(30):
        policy.observe(None, TREE, [3, 4], None)
    assert policy.choose(None) == TREE and policy.expected_tokens(None, FULL) < 1.7, "the chain, by what it did: 1.5"


def test_a_tree_that_lost_is_tried_again_while_a_short_chain_does_best():
    """Easy text behind middling text: nothing that short chains bring says what a tree would."""
    policy = DraftPolicy((PLAIN, SHORT, TREE), round_ms={PLAIN: 10.0, SHORT: 11.5, TREE: 16.0})
    chosen = {"middling": [], "easy": []}
    for text, rounds in (("middling", 1000), ("easy", 200)):
        for number in range(rounds):
            shape = policy.choose(None)
            chosen[text].append(shape)
            middling = 3 - number % 2 if shape == SHORT else 1
            policy.observe(None, shape, [shape.num_steps + 1 if text == "easy" else middling], policy.cost(shape))
    assert 0 < chosen["middling"][20:].count(TREE) < 40, "and trying it costs next to nothing"
    assert chosen["easy"][-20:] == [TREE] * 20


def test_only_positions_that_were_reached_are_judged():
    policy = measured()
    policy.observe(2, FULL, [2], MS[FULL])  # the first draft accepted, the second refused
    first, second, third = policy.seen[2, False][:3]
    assert (first.accepted, first.tried) == (1.0, 1.0)
    assert (second.accepted, second.tried) == (0.0, 1.0)
    assert third.tried == 0.0


def test_a_batch_counts_the_rows_that_got_there():
    policy = measured()
    policy.observe(2, FULL, [2, 3, 1, 3], MS[FULL])
    assert [(p.accepted, p.tried) for p in policy.seen[2, False][:3]] == [(3, 4), (2, 3), (0, 2)]


@pytest.mark.parametrize("rows", [1, 64])
def test_however_many_rows_lost_a_source_comes_back_as_soon(rows: int):
    policy = measured()
    for _ in range(20):
        policy.observe(3, FULL, [1] * rows, MS[FULL])
    waited = 0
    while policy.choose(3) == PLAIN:
        policy.observe(3, PLAIN, [1] * rows, MS[PLAIN])
        waited += 1
    assert 10 < waited < 60


def test_many_rows_tell_in_one_round_what_one_row_tells_in_many():
    """Drafting costs a large batch most, so it must not go on for rounds only because a guess said so."""
    many, one = measured(), measured()
    many.observe(None, FULL, [2] * 19 + [1] * 45, MS[FULL])
    one.observe(None, FULL, [1], MS[FULL])
    assert many.expected_tokens(None, chain(1)) == pytest.approx(1 + 19 / 64, abs=0.02)
    assert one.expected_tokens(None, chain(1)) == pytest.approx(1 + 1.2 / 3)


def test_a_loser_gets_another_chance_now_and_then_and_a_cheap_one():
    policy = taught(1)
    choices = []
    for _ in range(100):
        shape = policy.choose(2)
        choices.append(shape)
        policy.observe(2, shape, [1], MS[shape])
    assert choices[:10] == [PLAIN] * 10
    assert 1 <= choices.count(SHORT) <= 15 and FULL not in choices


def test_a_losing_draft_model_rests_longer_each_time():
    """So that drafting where it does not pay costs next to nothing: here one round in fifty is a probe."""
    policy = taught(1, match_length=None)
    choices = []
    for _ in range(3000):
        shape = policy.choose(None)
        choices.append(shape)
        policy.observe(None, shape, [1] * 8, MS[shape])
    probes = [i for i, shape in enumerate(choices) if shape != PLAIN]
    gaps = [b - a for a, b in itertools.pairwise(probes) if b - a > 1]
    assert choices[:31] == [PLAIN] * 31 and FULL not in choices
    assert len(probes) < 60 and gaps == sorted(gaps) and gaps[-1] > 250


@pytest.mark.parametrize("match_length", [2, None])
def test_a_text_that_turns_easy_is_drafted_again(match_length: int | None):
    policy = taught(1, match_length)
    chosen = []
    for _ in range(160):
        shape = policy.choose(match_length)
        chosen.append(shape)
        policy.observe(match_length, shape, [shape.num_steps + 1], MS[shape])
    assert chosen[0] == PLAIN and chosen[-1] == FULL


def test_times_follow_the_newest_observations():
    policy = DraftPolicy((PLAIN, SHORT, FULL))
    for ms in (10.0, 20.0):
        policy.observe(2, FULL, [2], ms)
    assert policy.round_ms[FULL] == pytest.approx(13.0)


# Milliseconds of rounds of 0, 2 and 5 drafts, 8B with an EAGLE-3 head on an H200 (benchmarks/results/h200-adaptive.json)
H200_MS = {8: {PLAIN: 4.74, SHORT: 5.6, FULL: 6.55}, 64: {PLAIN: 6.42, SHORT: 8.87, FULL: 13.85}}


def speedup_of_a_call(batch: int, rate: float, new_tokens: int = 192) -> float:
    """Tokens a second of a first call over plain decoding's, each draft accepted with probability ``rate``; the host knows of a
    round when the next one runs. Rows end apart, and rounds of few rows cost what those of all cost."""
    ms = H200_MS[batch]
    policy = DraftPolicy(tuple(ms), dict(ms))
    left, spent, unseen = [new_tokens] * batch, 0.0, []
    while any(left):
        shape, lengths = policy.choose(None), []
        for row in (row for row in range(batch) if left[row]):
            accepted = next((n for n in range(shape.num_steps) if random.random() >= rate), shape.num_steps)
            lengths.append(min(accepted + 1, left[row]))
            left[row] -= lengths[-1]
        spent += ms[shape]
        unseen.append((shape, lengths))
        if len(unseen) > 1:
            seen, lengths = unseen.pop(0)
            policy.observe(None, seen, lengths, ms[seen])
    return new_tokens * ms[PLAIN] / spent


@pytest.mark.parametrize("batch", H200_MS)
@pytest.mark.parametrize("rate", [0.05, 0.2, 0.3, 0.4])
def test_a_call_that_drafts_in_vain_is_hardly_slower_than_a_plain_one(batch: int, rate: float):
    """Where drafting just about pays too: what all rows win then, the last ones lose."""
    assert statistics.mean(speedup_of_a_call(batch, rate) for _ in range(20)) > 0.975


def test_a_call_that_drafts_well_is_as_fast_as_it_can_be():
    assert statistics.mean(speedup_of_a_call(8, 0.9) for _ in range(5)) > 2.7, (
        "of 3.4 with full rounds and rows that end together"
    )
