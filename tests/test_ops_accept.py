"""Verification is exact: the emitted tokens follow the target's distribution, whatever the draft.

Shown twice. By enumeration: the op's own mathematics, summed over every draft and every branch, gives the target's
joint distribution to 1e-6. By sampling through the op itself: the distance to that distribution shrinks as 1 / sqrt(samples).
Both are run on a draft that lies about its distribution as well, and must then find it wrong.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from languages import (
    DRAFTS,
    VOCAB,
    argmax_of,
    conditional_distribution,
    draft_tokens,
    joint_distribution,
    overflowing,
    restricted,
    tables,
    total_variation,
)
from torch.library import opcheck

from spec_compile.ops.accept import accept_greedy, accept_sampled, count_accepted, residual_weights
from spec_compile.ops.sampling import DRAFT_STREAM, sample_token

pytestmark = pytest.mark.usefixtures("fresh_seed")


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def seeds(count):
    return torch.randint(1 << 62, (count,))


# ----------------------------------------------------------------------------------------------------------------------
# accept_greedy


def test_accept_greedy_against_a_loop():
    window, target = torch.randint(2, (400, 6)), torch.randint(2, (400, 6))
    expected = []
    for row, wanted in zip(window.tolist(), target.tolist(), strict=True):
        length = 1
        while length < 6 and row[length] == wanted[length - 1]:
            length += 1
        expected.append(length)
    assert set(expected) == set(range(1, 7))  # every branch was met
    result = accept_greedy(window, target)
    assert result.dtype == torch.int32 and result.tolist() == expected


def test_accept_greedy_bounds():
    target = torch.tensor([[5, 6, 7, 8]])
    assert accept_greedy(torch.tensor([[0, 5, 6, 7]]), target).tolist() == [4]
    assert accept_greedy(torch.tensor([[0, 4, 6, 7]]), target).tolist() == [1]
    assert accept_greedy(torch.tensor([[0, 5, 4, 7]]), target).tolist() == [2]  # a later hit does not count
    assert accept_greedy(torch.tensor([[0]]), torch.tensor([[5]])).tolist() == [1]


# ----------------------------------------------------------------------------------------------------------------------
# accept_sampled, enumerated


def acceptance_by_bisection(window, draft_probs, target_probs, slot):
    """The probability with which the op accepts the draft at ``slot``, found by asking it: u below it is accepted."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        uniforms = torch.full((1, DRAFTS), -1.0, dtype=torch.float64)  # earlier drafts are always accepted,
        uniforms[0, slot + 1 :] = 2.0  # later ones never
        uniforms[0, slot] = middle
        accepted = int(count_accepted(window, draft_probs, target_probs, uniforms))
        low, high = (middle, high) if accepted > slot else (low, middle)
    return high


def emitted_distribution(target, proposal, claimed):
    """The joint distribution of the first DRAFTS + 1 tokens of text, summed over all drafts and all branches of one round.

    Args:
        target: the target's language.
        proposal: the language the drafts are really sampled from.
        claimed: what the draft says it sampled from.
    """
    joint = torch.zeros([VOCAB] * (DRAFTS + 1), dtype=torch.float64)
    acceptance = {}
    for draft in itertools.product(range(VOCAB), repeat=DRAFTS):
        drawn = float(torch.stack([proposal[draft[:i]][token] for i, token in enumerate(draft)]).prod())
        if drawn == 0:
            continue
        window = torch.tensor([[0, *draft]])
        target_probs = torch.stack([target[draft[:i]] for i in range(DRAFTS + 1)])[None]
        draft_probs = torch.stack([claimed[draft[:i]] for i in range(DRAFTS)])[None]
        reached = drawn
        for stop in range(DRAFTS + 1):
            accept = 0.0
            if stop < DRAFTS:
                key = draft[: stop + 1]
                if key not in acceptance:
                    acceptance[key] = acceptance_by_bisection(window, draft_probs, target_probs, stop)
                accept = acceptance[key]
            weights = residual_weights(window, draft_probs, target_probs, torch.tensor([stop]))[0]
            last = reached * (1 - accept) * weights / weights.sum()
            # Behind the emitted tokens the text goes on by the target's distribution, in later rounds.
            for token in range(VOCAB):
                text = (*draft[:stop], token)
                for rest in itertools.product(range(VOCAB), repeat=DRAFTS - stop):
                    full = text + rest
                    steps = [target[full[:i]][full[i]] for i in range(stop + 1, DRAFTS + 1)]
                    joint[full] += last[token] * (torch.stack(steps).prod() if steps else 1.0)
            reached *= accept
    return joint


def emitted_distribution_one_hot(target, draft):
    """The same distribution for drafts chosen without chance: summed over all that the target can sample at the window's slots.

    Args:
        draft: the drafted tokens, DRAFTS of them.
    """
    joint = torch.zeros([VOCAB] * (DRAFTS + 1), dtype=torch.float64)
    for sampled in itertools.product(range(VOCAB), repeat=DRAFTS + 1):
        drawn = torch.stack([target[draft[:i]][token] for i, token in enumerate(sampled)]).prod()
        length = int(accept_greedy(torch.tensor([[0, *draft]]), torch.tensor([sampled])))
        for rest in itertools.product(range(VOCAB), repeat=DRAFTS + 1 - length):
            full = sampled[:length] + rest
            steps = [target[full[:i]][full[i]] for i in range(length, DRAFTS + 1)]
            joint[full] += drawn * (torch.stack(steps).prod() if steps else 1.0)
    return joint


def test_enumeration_full_draft_distribution():
    target, draft = conditional_distribution(), conditional_distribution()
    assert total_variation(joint_distribution(target), joint_distribution(draft)) > 0.05  # else there is nothing to correct
    assert total_variation(emitted_distribution(target, draft, draft), joint_distribution(target)) < 1e-6


def test_enumeration_one_hot_draft():
    """A draft looked up somewhere, or chosen by argmax, that says so."""
    target, draft = conditional_distribution(), tuple(torch.randint(VOCAB, (DRAFTS,)).tolist())
    assert total_variation(emitted_distribution_one_hot(target, draft), joint_distribution(target)) < 1e-6


def test_enumeration_one_hot_given_as_probabilities():
    target, draft = conditional_distribution(), argmax_of(conditional_distribution())
    assert total_variation(emitted_distribution(target, draft, draft), joint_distribution(target)) < 1e-6


def test_enumeration_restricted_vocabulary():
    target, draft = conditional_distribution(), restricted(conditional_distribution())
    assert total_variation(emitted_distribution(target, draft, draft), joint_distribution(target)) < 1e-6


def test_enumeration_draft_equal_to_target():
    target = conditional_distribution()
    assert total_variation(emitted_distribution(target, target, target), joint_distribution(target)) < 1e-6


def test_enumeration_draft_that_overflows():
    target, (proposal, claimed) = conditional_distribution(), overflowing(conditional_distribution())
    assert total_variation(emitted_distribution(target, proposal, claimed), joint_distribution(target)) < 1e-6


def test_enumeration_finds_a_draft_that_lies():
    """Argmax drafts declared as sampled from the full distribution, the fault of transformers#47932."""
    target = conditional_distribution(0.5)
    distribution = emitted_distribution(target, argmax_of(target), target)
    assert total_variation(distribution, joint_distribution(target)) > 0.05


# ----------------------------------------------------------------------------------------------------------------------
# accept_sampled, sampled through the op


def one_round(target, claimed, drafts, seed, position):
    """Run the op on ``count`` rows with the tables of a language; returns emitted, accept_length."""
    target_probs = tables(target, drafts, DRAFTS + 1)
    draft_probs = None if claimed is None else tables(claimed, drafts, DRAFTS)
    window = torch.cat([torch.zeros(len(drafts), 1, dtype=torch.int64), drafts], 1)
    return accept_sampled(window, draft_probs, target_probs, seed, position)


def sampled_distance(target, proposal, claimed, count):
    """TV between the target's distribution of two tokens and what the op emits first, continued by the target's
    distribution."""
    seed, position = seeds(count), torch.randint(1000, (count,), dtype=torch.int32)
    emitted, length = one_round(target, claimed, draft_tokens(proposal, seed, position), seed, position)
    joint = torch.zeros(VOCAB, VOCAB, dtype=torch.float64)
    for first, second, stop in zip(emitted[:, 0].tolist(), emitted[:, 1].tolist(), length.tolist(), strict=True):
        if stop > 1:
            joint[first, second] += 1
        else:
            joint[first] += target[(first,)]
    return total_variation(joint / count, joint_distribution(target).sum((2, 3)))


def noise_level(count):
    """Bounds the TV that sampling itself causes: about sum(sqrt(p / n)) * 0.4 <= sqrt(cells / n) * 0.4, doubled."""
    return 2 * (VOCAB**2 / count) ** 0.5 / 2


@pytest.mark.parametrize("kind", ["full", "one_hot", "restricted", "overflowing"])
def test_sampling_converges_to_the_target(kind):
    target, draft = conditional_distribution(), conditional_distribution()
    proposal = {"full": draft, "one_hot": argmax_of(draft), "restricted": restricted(draft)}.get(kind)
    claimed = None if kind == "one_hot" else proposal
    if kind == "overflowing":
        proposal = claimed = overflowing(draft)[1]  # drawn by the op itself
    for count in (400, 6400, 25600):
        assert sampled_distance(target, proposal, claimed, count) < noise_level(count)


def test_sampling_finds_a_draft_that_lies():
    target = conditional_distribution(0.5)
    assert sampled_distance(target, argmax_of(target), target, 25600) > 2 * noise_level(25600)


def test_the_three_uses_of_chance_are_independent():
    """Drafting, testing and resampling one position: the joint distribution of draft and emitted token, not only its margin.

    Sharing noise between them leaves every number fair and the combination biased.
    """
    count, vocab = 200_000, 6
    p, q = torch.randn(2, vocab, dtype=torch.float64).softmax(-1)
    seed, position = seeds(count), torch.randint(1000, (count,), dtype=torch.int32)
    draft = sample_token(q.float().expand(count, -1), seed, position + 1, DRAFT_STREAM)
    window = torch.stack([torch.zeros_like(draft), draft], 1)
    emitted, _ = accept_sampled(window, q.float().expand(count, 1, -1), p.float().expand(count, 2, -1), seed, position)
    observed = torch.bincount(draft * vocab + emitted[:, 0], minlength=vocab**2).double() / count
    accept = (p / q).clamp(max=1)
    residual = (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()
    expected = torch.diag(q * accept) + (q * (1 - accept))[:, None] * residual
    noise = 0.4 * (expected / count).sqrt().sum()
    assert total_variation(observed, expected.flatten()) < 2 * noise + 1e-3


def test_uncorrelated_rounds():
    """Consecutive rounds of one row reuse positions; the text of two rounds must still follow the target's distribution.

    The language has no memory here, so that the distribution of the text is a product and any correlation shows.
    """
    count = 20000
    probs, draft = torch.randn(VOCAB).softmax(0), torch.randn(VOCAB).softmax(0)
    seed, position = seeds(count), torch.zeros(count, dtype=torch.int32)
    text, length = torch.zeros(count, 8, dtype=torch.int64), torch.zeros(count, dtype=torch.int64)
    for _ in range(4):  # at least four tokens
        drafts = torch.stack(
            [sample_token(draft.expand(count, -1), seed, position + 1 + i, DRAFT_STREAM) for i in range(DRAFTS)], 1
        )
        window = torch.cat([torch.zeros(count, 1, dtype=torch.int64), drafts], 1)
        q, p = draft.expand(count, DRAFTS, -1), probs.expand(count, DRAFTS + 1, -1)
        emitted, accepted = accept_sampled(window, q, p, seed, position)
        for j in range(DRAFTS + 1):
            write = (j < accepted) & (length + j < 8)
            text[write, (length + j)[write]] = emitted[write, j]
        length += accepted
        position += accepted
    cells = text[:, 0] * VOCAB**3 + text[:, 1] * VOCAB**2 + text[:, 2] * VOCAB + text[:, 3]
    observed = torch.bincount(cells, minlength=VOCAB**4).double() / count
    expected = torch.einsum("a,b,c,d->abcd", *[probs.double()] * 4).flatten()
    assert total_variation(observed, expected) < 1.5 * (expected / count).sqrt().sum() / 2


# ----------------------------------------------------------------------------------------------------------------------
# accept_sampled, branches


def certain(tokens, vocab=6):
    """[N, V] one-hot distributions, so that nothing is left to chance."""
    return torch.nn.functional.one_hot(torch.tensor(tokens), vocab).float()


@pytest.mark.parametrize("accepted", [0, 1, 2, 3])
@pytest.mark.parametrize("full", [False, True])
def test_every_branch(accepted, full):
    """The target is certain of 1 2 3 4; the draft agrees for ``accepted`` tokens."""
    wanted = [1, 2, 3, 4]
    draft = [token if i < accepted else 5 for i, token in enumerate(wanted[:3])]
    draft_probs = certain(draft)[None].expand(32, -1, -1) if full else None
    window = torch.tensor([[0, *draft]]).expand(32, -1)
    target_probs = certain(wanted)[None].expand(32, -1, -1)
    emitted, length = accept_sampled(window, draft_probs, target_probs, seeds(32), int32([7] * 32))
    assert emitted.dtype == torch.int64 and length.dtype == torch.int32
    assert length.tolist() == [accepted + 1] * 32
    assert emitted[:, : accepted + 1].tolist() == [wanted[: accepted + 1]] * 32


def test_equal_distributions_accept_everything():
    probs = torch.randn(256, 4, 50).softmax(-1)
    seed, position = seeds(256), int32([3] * 256)
    drafts = torch.stack([sample_token(probs[:, i], seed, position + 1 + i, DRAFT_STREAM) for i in range(3)], 1)
    window = torch.cat([torch.zeros(256, 1, dtype=torch.int64), drafts], 1)
    emitted, length = accept_sampled(window, probs[:, :3].contiguous(), probs, seed, position)
    assert length.eq(4).all() and emitted[:, :3].equal(drafts)


def test_disjoint_supports_reject_everything():
    target, draft = torch.rand(256, 2, 8), torch.rand(256, 1, 8)
    target[..., 4:], draft[..., :4] = 0, 0
    target, draft = target / target.sum(-1, keepdim=True), draft / draft.sum(-1, keepdim=True)
    window = torch.stack([torch.zeros(256, dtype=torch.int64), torch.randint(4, 8, (256,))], 1)
    emitted, length = accept_sampled(window, draft, target, seeds(256), int32([0] * 256))
    assert length.eq(1).all() and emitted.lt(4).all()
    assert emitted[:, 0].unique().numel() == 4


def test_with_one_hot_drafts_the_text_does_not_depend_on_them():
    """What is emitted is what sampling one token at a time emits, whatever was drafted and however much."""
    probs, seed, position = torch.randn(200, 4, 2).softmax(-1), seeds(200), torch.randint(99, (200,), dtype=torch.int32)
    alone = [
        accept_sampled(torch.zeros(200, 1, dtype=torch.int64), None, probs[:, i : i + 1], seed, position + i)[0]
        for i in range(4)
    ]
    alone = torch.cat(alone, 1)  # [200, 4]
    lengths = []
    for num_drafts in (1, 3):
        window = torch.randint(2, (200, num_drafts + 1))
        emitted, length = accept_sampled(window, None, probs[:, : num_drafts + 1], seed, position)
        counts = torch.arange(num_drafts + 1) < length[:, None]
        assert torch.equal(emitted[counts], alone[:, : num_drafts + 1][counts])
        assert torch.equal(window[:, 1:][counts[:, 1:]], emitted[:, :-1][counts[:, 1:]]), "an accepted draft is emitted"
        lengths += length.tolist()
    assert set(lengths) == {1, 2, 3, 4}


def test_a_one_hot_draft_is_accepted_with_its_probability():
    target = torch.tensor([0.5, 0.25, 0.25]).expand(512, 2, 3)
    emitted, length = accept_sampled(torch.zeros(512, 2, dtype=torch.int64), None, target, seeds(512), int32([0] * 512))
    rejected = length == 1
    assert 150 < int(rejected.sum()) < 362  # a half, to ten standard deviations
    assert emitted[rejected, 0].min() > 0 and emitted[rejected, 0].unique().numel() == 2


def test_no_residual_mass_falls_back_to_the_target():
    """p == q everywhere and yet rejected, as rounding can do."""
    probs = torch.tensor([[[0.25, 0.75, 0.0]]])
    weights = residual_weights(torch.tensor([[0, 1]]), probs, probs.expand(1, 2, 3), torch.tensor([0]))
    assert weights.tolist() == [[0.25, 0.75, 0.0]]


def test_without_drafts_it_samples_the_target():
    probs = torch.tensor([0.1, 0.0, 0.6, 0.3])
    emitted, length = accept_sampled(
        torch.zeros(8000, 1, dtype=torch.int64), None, probs.expand(8000, 1, 4), seeds(8000), int32([4] * 8000)
    )
    assert emitted.shape == (8000, 1) and length.eq(1).all()
    observed = torch.bincount(emitted[:, 0], minlength=4) / 8000
    assert observed[1] == 0 and (observed - probs).abs().max() < 0.035  # six standard deviations


def test_rows_do_not_depend_on_their_batch():
    window, seed = torch.randint(40, (9, 4)), seeds(9)
    target, draft = torch.randn(9, 4, 40).softmax(-1), torch.randn(9, 3, 40).softmax(-1)
    position = torch.randint(100, (9,), dtype=torch.int32)
    emitted, length = accept_sampled(window, draft, target, seed, position)
    order = torch.randperm(9)[:4]
    again = accept_sampled(window[order], draft[order], target[order], seed[order], position[order])
    assert again[0].equal(emitted[order]) and again[1].equal(length[order])
    for row in range(9):
        alone = accept_sampled(*(x[row : row + 1] for x in (window, draft, target, seed, position)))
        assert alone[0].equal(emitted[row : row + 1])


def test_seed_and_position_matter():
    window, target = torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 2, 1000), 1e-3)
    tokens = set()
    for seed, position in itertools.product(range(8), range(8)):
        emitted, _ = accept_sampled(window, None, target, torch.tensor([seed]), int32([position]))
        tokens.add(int(emitted[0, 0]))
    assert len(tokens) > 50


# ----------------------------------------------------------------------------------------------------------------------
# Registration


def test_opcheck():
    window, seed, position = torch.randint(11, (3, 4)), seeds(3), int32([1, 2, 3])
    target, draft = torch.randn(3, 4, 11).softmax(-1), torch.randn(3, 3, 11).softmax(-1)
    opcheck(accept_greedy, (window, window.flip(0)))
    opcheck(accept_sampled, (window, draft, target, seed, position))
    opcheck(accept_sampled, (window, None, target, seed, position))
