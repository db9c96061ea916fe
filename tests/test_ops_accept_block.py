"""Block verification is exact, also over rounds, and keeps at least as much as one decision a draft."""

from __future__ import annotations

import itertools

import pytest
import torch
from languages import (
    DRAFTS,
    VOCAB,
    argmax_of,
    conditional_distribution,
    continued,
    draft_tokens,
    joint_distribution,
    overflowing,
    restricted,
    tables,
    total_variation,
)
from torch.library import opcheck

from spec_compile.ops.accept import accept_sampled, acceptance_probability
from spec_compile.ops.accept_block import accept_block, block_acceptance, finite_distributions, reach_of_drafts, round_seed
from spec_compile.ops.sampling import DRAFT_STREAM, sample_token

pytestmark = pytest.mark.usefixtures("fresh_seed")


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def seeds(count):
    return torch.randint(1 << 62, (count,))


# ----------------------------------------------------------------------------------------------------------------------
# Enumerated


def enumerated(target, proposal, claimed):
    """(distribution of the text, mean drafts kept by the block, mean kept one by one) over all drafts and all decisions of one
    round.

    Args:
        target: the target's language.
        proposal: the language the drafts are really sampled from.
        claimed: what the draft says it sampled from.
    """
    joint, by_block, one_by_one = torch.zeros([VOCAB] * (DRAFTS + 1), dtype=torch.float64), 0.0, 0.0
    for draft in itertools.product(range(VOCAB), repeat=DRAFTS):
        drawn = float(torch.stack([proposal[draft[:i]][token] for i, token in enumerate(draft)]).prod())
        if drawn == 0:
            continue
        window = torch.tensor([[0, *draft]])
        target_probs = torch.stack([target[draft[:i]] for i in range(DRAFTS + 1)])[None]
        draft_probs = torch.stack([claimed[draft[:i]] for i in range(DRAFTS)])[None]
        reach = reach_of_drafts(window, draft_probs, target_probs)
        accept, weights = block_acceptance(finite_distributions(window, draft_probs), target_probs, reach)
        left = drawn  # no longer block was kept
        for kept in range(DRAFTS, -1, -1):
            here = left * (1.0 if kept == 0 else float(accept[0, kept - 1].nan_to_num(0.0)))
            left -= here
            by_block += here * kept
            if here == 0:
                continue
            last = weights[0, kept] / weights[0, kept].sum()
            for token in range(VOCAB):
                joint += here * last[token] * continued(target, (*draft[:kept], token))
        ratios = [
            float(acceptance_probability(target[draft[:i]][token], claimed[draft[:i]][token]).nan_to_num(0.0))
            for i, token in enumerate(draft)
        ]
        one_by_one += drawn * sum(float(torch.tensor(ratios[: i + 1]).prod()) for i in range(DRAFTS))
    return joint, by_block, one_by_one


@pytest.mark.parametrize("kind", ["full", "restricted", "one_hot", "equal"])
def test_enumeration(kind):
    target, draft = conditional_distribution(), conditional_distribution()
    draft = {"full": draft, "restricted": restricted(draft), "one_hot": argmax_of(draft), "equal": target}[kind]
    joint, by_block, one_by_one = enumerated(target, draft, draft)
    assert total_variation(joint, joint_distribution(target)) < 1e-6
    assert by_block > one_by_one - 1e-6
    if kind == "full":
        assert by_block > one_by_one + 1e-3  # not by accident the same
    if kind == "equal":
        assert by_block == pytest.approx(DRAFTS)


def test_enumeration_draft_that_overflows():
    target, (proposal, claimed) = conditional_distribution(), overflowing(conditional_distribution())
    joint, by_block, one_by_one = enumerated(target, proposal, claimed)
    assert total_variation(joint, joint_distribution(target)) < 1e-6
    assert by_block > one_by_one - 1e-6, "the drafts before the overflow are kept as ever"
    assert one_by_one > 0  # there are some


def test_enumeration_finds_a_draft_that_lies():
    target = conditional_distribution(0.5)
    joint, _, _ = enumerated(target, argmax_of(target), target)
    assert total_variation(joint, joint_distribution(target)) > 0.05


def test_one_draft_is_judged_as_ever():
    """With K = 1 the block is the draft: the same test and the same residual, so with the same noise the same result."""
    target, draft = torch.randn(400, 2, 5).softmax(-1), torch.randn(400, 1, 5).softmax(-1)
    seed, position = seeds(400), torch.randint(99, (400,), dtype=torch.int32)
    drafted = sample_token(draft[:, 0], seed, position + 1, DRAFT_STREAM)
    args = torch.stack([torch.zeros_like(drafted), drafted], 1), draft, target, seed, position
    for a, b in zip(accept_block(*args), accept_sampled(*args), strict=True):
        assert a.equal(b)


# ----------------------------------------------------------------------------------------------------------------------
# Sampled through the op


def sampled_distance(target, proposal, claimed, count):
    """TV between the target's distribution of two tokens and what the op emits first, continued by the target's
    distribution."""
    seed, position = seeds(count), torch.randint(1000, (count,), dtype=torch.int32)
    drafts = draft_tokens(proposal, seed, position)
    window = torch.cat([torch.zeros(count, 1, dtype=torch.int64), drafts], 1)
    emitted, length = accept_block(window, tables(claimed, drafts, DRAFTS), tables(target, drafts, DRAFTS + 1), seed, position)
    joint = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for first, second, stop in zip(emitted[:, 0].tolist(), emitted[:, 1].tolist(), length.tolist(), strict=True):
        if stop > 1:
            joint[first, second] += 1
        else:
            joint[first] += target[(first,)]
    return total_variation(joint / count, joint_distribution(target).sum((2, 3)))


def noise_level(count):
    """Bounds the TV that sampling itself causes: about 0.4 * sqrt(cells / n), more than doubled."""
    return (VOCAB**2 / count) ** 0.5


@pytest.mark.parametrize("kind", ["full", "overflowing"])
def test_sampling_converges_to_the_target(kind):
    target, draft = conditional_distribution(), conditional_distribution()
    if kind == "overflowing":
        _, draft = overflowing(draft)  # drawn by the op itself
    for count in (400, 6400, 25600):
        assert sampled_distance(target, draft, draft, count) < noise_level(count)


def test_sampling_finds_a_draft_that_lies():
    target = conditional_distribution(0.5)
    assert sampled_distance(target, argmax_of(target), target, 25600) > 2 * noise_level(25600)


def distance_after_rounds(count, seed_of):
    """TV of the first four tokens that rounds of three drafts write, in a language without memory.

    Args:
        seed_of: what a round gives its drafting and its acceptance, from the rows' seeds and the root's positions.
    """
    target, draft, length, vocab = torch.tensor([0.6, 0.4]), torch.tensor([0.9, 0.1]), 4, 2
    seed, position = seeds(count), torch.zeros(count, dtype=torch.int32)
    text, written = torch.zeros(count, length, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    for _ in range(length):  # at least a token each
        own = seed_of(seed, position)
        drafts = [sample_token(draft.expand(count, -1), own, position + 1 + i, DRAFT_STREAM) for i in range(3)]
        window = torch.stack([torch.zeros_like(drafts[0]), *drafts], 1)
        q, p = draft.expand(count, 3, -1), target.expand(count, 4, -1)
        emitted, accepted = accept_block(window, q, p, own, position)
        for j in range(4):
            write = (j < accepted) & (written + j < length)
            text[write, (written + j)[write]] = emitted[write, j]
        written += accepted
        position += accepted
    cells = (text * vocab ** torch.arange(length)).sum(1)
    observed = torch.bincount(cells, minlength=vocab**length).double() / count
    expected = torch.einsum("a,b,c,d->dcba", *[target.double()] * 4).flatten()
    return total_variation(observed, expected)


def test_rounds_are_independent():
    """Over several rounds the text follows the target's distribution, with noise of the round's own."""
    assert distance_after_rounds(40000, round_seed) < 0.02  # sampling alone gives 0.008


def test_noise_of_the_position_would_be_wrong():
    """Why ``round_seed`` exists: what was kept depends on noise that the next round would draw again."""
    assert distance_after_rounds(40000, lambda seed, position: seed) > 0.05


def test_a_target_without_a_distribution_leaves_the_tokens_before_it_alone():
    """Behind the first token nothing can be drawn: the row will stop there, and that token still follows the target's
    distribution."""
    count = 20000
    target, draft = torch.tensor([[0.6, 0.3, 0.1]] * 3), torch.tensor([[0.2, 0.2, 0.6]] * 2)
    target[1] = float("nan")
    seed, position = seeds(count), int32([0] * count)
    drafts = [sample_token(draft[:1].expand(count, -1), seed, position + 1 + i, DRAFT_STREAM) for i in range(2)]
    window = torch.stack([torch.zeros_like(drafts[0]), *drafts], 1)
    emitted, length = accept_block(window, draft.expand(count, -1, -1), target.expand(count, -1, -1), seed, position)
    first = torch.bincount(emitted[:, 0], minlength=3) / count
    assert total_variation(first, target[0]) < 0.02 and length.max() == 2


# ----------------------------------------------------------------------------------------------------------------------
# Branches


def certain(tokens, vocab=6):
    """[N, V] one-hot distributions, so that nothing is left to chance."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), vocab).float()


@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
def test_every_branch(accepted):
    """The target is certain of 1 2 3 4; the draft agrees for ``accepted`` tokens."""
    wanted = [1, 2, 3, 4]
    draft = [token if i < accepted else 5 for i, token in enumerate(wanted[:3])]
    window = torch.tensor([[0, *draft]]).expand(32, -1)
    draft_probs, target_probs = (x[None].expand(32, -1, -1) for x in (certain(draft), certain(wanted)))
    emitted, length = accept_block(window, draft_probs, target_probs, seeds(32), int32([7] * 32))
    assert emitted.dtype == torch.int64 and length.dtype == torch.int32
    assert length.tolist() == [accepted + 1] * 32
    assert emitted[:, : accepted + 1].tolist() == [wanted[: accepted + 1]] * 32


def test_a_liked_draft_redeems_the_one_before_it():
    """Sun et al.'s point: p / q of 1/2 and then 2 keeps both, where one decision a draft loses them half of the time."""
    target_probs = torch.tensor([[0.4, 0.6], [0.8, 0.2], [0.5, 0.5]]).expand(4000, -1, -1)
    draft_probs = torch.tensor([[0.8, 0.2], [0.4, 0.6]]).expand(4000, -1, -1)
    window = torch.zeros(4000, 3, dtype=torch.int64)
    assert reach_of_drafts(window, draft_probs, target_probs)[0].tolist() == [1.0, 0.5, 1.0]
    args = window, draft_probs, target_probs, seeds(4000), int32([0] * 4000)
    assert accept_block(*args)[1].eq(3).all()
    assert abs(float(accept_sampled(*args)[1].double().mean()) - 2.0) < 0.1  # six standard deviations


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_a_dead_row_gives_valid_tokens(bad):
    window, seed, position = torch.randint(5, (6, 4)), seeds(6), int32([3] * 6)
    target, draft = torch.rand(6, 4, 5), torch.rand(6, 3, 5)
    alive = accept_block(window, draft, target, seed, position)
    target[::2], draft[::2] = bad, bad
    emitted, length = accept_block(window, draft, target, seed, position)
    assert emitted.min() >= 0 and emitted.max() < 5 and length.min() >= 1 and length.max() <= 4
    assert emitted[1::2].equal(alive[0][1::2]) and length[1::2].equal(alive[1][1::2])


def test_opcheck():
    window, seed, position = torch.randint(11, (3, 4)), seeds(3), int32([1, 2, 3])
    target, draft = torch.randn(3, 4, 11).softmax(-1), torch.randn(3, 3, 11).softmax(-1)
    opcheck(accept_block, (window, draft, target, seed, position))
