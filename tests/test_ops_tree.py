"""Drafting a tree: the beam, its candidates and the window, against a brute force that knows nothing of tensors."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from spec_compile.ops.tree import build_tree, draft_topk, expand_beam

SHAPES = [(1, 1, 2), (3, 1, 4), (5, 4, 8), (6, 10, 32), (5, 8, 64), (7, 10, 60), (2, 3, 13)]  # num_steps, topk, window
POISON = -(1 << 20)


pytestmark = pytest.mark.usefixtures("fresh_seed")


# ----------------------------------------------------------------------------------------------------------------------
# draft_topk


def topk_by_hand(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab,k", [(1, 1), (11, 1), (11, 11), (50, 4), (3000, 10)])
def test_draft_topk(dtype, vocab, k):
    logits = (torch.randn(7, vocab, dtype=torch.float64) * 4).to(dtype)
    logits[0] = 0.0  # all equal
    logits[1] = torch.randint(2, (vocab,)).to(dtype)  # many ties
    logits[2, vocab // 2 :] = float("-inf")
    logits[2, 0] = -0.0
    ids, logprobs = draft_topk(logits, k, None)
    assert ids.dtype == torch.int64 and logprobs.dtype == torch.float32
    assert ids.tolist() == [topk_by_hand(row, k) for row in logits.float().tolist()]
    expected = logits.double().log_softmax(-1).gather(1, ids)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    assert (logprobs <= 0).all()


def test_draft_topk_gives_the_targets_ids():
    """A reduced vocabulary: EAGLE-3's draft id i is the target's i + d2t[i]."""
    logits, draft_ids = torch.randn(5, 20), torch.randperm(1000)[:20].sort().values
    ids, logprobs = draft_topk(logits, 6, draft_ids)
    own, same = draft_topk(logits, 6, None)
    assert ids.equal(draft_ids[own]) and logprobs.equal(same)


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_draft_topk_of_a_dead_row_is_valid(bad):
    logits = torch.full((2, 30), bad)
    logits[1] = torch.randn(30)
    logits[1, 7] = bad
    ids, logprobs = draft_topk(logits, 5, None)
    for row in ids.tolist():
        assert len(set(row)) == 5 and min(row) >= 0 and max(row) < 30
    assert (logprobs[0] == float("-inf")).all() and not logprobs.isnan().any()


@pytest.mark.parametrize("k", [0, 6])
def test_draft_topk_refuses(k):
    with pytest.raises(ValueError, match="vocabulary of 5"):
        draft_topk(torch.randn(2, 5), k, None)


# ----------------------------------------------------------------------------------------------------------------------
# A whole tree, by hand: nodes are tuples of tokens


def log_distribution(vocab, ties):
    """The draft's language: logits of the next token, a pure function of the text."""
    table = torch.randn(2 if ties else 997, vocab)
    if ties:  # two different distributions, of few different values: equal sums everywhere
        table = table.round()
    return lambda text: table[hash(text) % len(table)]


def drafted(distribution, batch, num_steps, topk, num_tokens):
    """Draft and build by the ops; returns everything the tests look at."""
    num_candidates, slots = topk + (num_steps - 1) * topk**2, (num_steps - 1) * topk
    tokens = torch.full((batch, num_candidates), POISON)
    scores = torch.full((batch, num_candidates), float("nan"))
    parents = torch.full((batch, num_candidates), POISON, dtype=torch.int32)
    mask = torch.full((batch, slots, (slots + 31) // 32), -1, dtype=torch.int32)
    texts = [[(row,)] for row in range(batch)]  # what the draft has read at each node of the level
    beam, read = None, []
    for level in range(num_steps):
        logits = torch.stack([distribution(text) for row in texts for text in row])
        ids, logprobs = draft_topk(logits, topk, None)
        beam_tokens, beam, beam_parent = expand_beam(ids, logprobs, beam, tokens, scores, parents, mask, level)
        texts = [
            [texts[row][i] + (token,) for i, token in zip(beam_parent[row].tolist(), beam_tokens[row].tolist(), strict=True)]
            for row in range(batch)
        ]
        read.append(texts)
    root = torch.arange(batch)
    return build_tree(tokens, scores, parents, root, num_tokens), (tokens, scores, parents, mask), read


def tree_by_hand(distribution, row, num_steps, topk, num_tokens):
    """(beams of every level, window nodes) of one row."""
    nodes = []  # (score, text) in candidate order
    level = [(0.0, (row,))]
    beams = []
    for _ in range(num_steps):
        children = []
        for score, text in level:
            ids, logprobs = draft_topk(distribution(text)[None], topk, None)  # checked above; here its last bits matter
            for token, logprob in zip(ids[0].tolist(), logprobs[0], strict=True):
                children.append((float(score + logprob), (*text, token)))
        order = topk_by_hand([score for score, _ in children], topk)
        level = [children[i] for i in order]
        beams.append([text for _, text in level])
        nodes += children
    chosen = sorted(topk_by_hand([score for score, _ in nodes], num_tokens - 1))
    return beams, [nodes[i][1] for i in chosen]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("num_steps,topk,num_tokens", SHAPES)
def test_a_tree_against_brute_force(num_steps, topk, num_tokens, batch, ties):
    distribution = log_distribution(max(topk, 12), ties)
    (window, parents, depth, mask), (_, _, _, draft_mask), read = drafted(distribution, batch, num_steps, topk, num_tokens)
    for row in range(batch):
        beams, nodes = tree_by_hand(distribution, row, num_steps, topk, num_tokens)
        assert [level[row] for level in read] == beams
        nodes = [(row,), *nodes]
        assert window[row].tolist() == [text[-1] for text in nodes]
        assert parents[row].tolist() == [-1] + [nodes.index(text[:-1]) for text in nodes[1:]]
        assert depth[row].tolist() == [len(text) - 1 for text in nodes]
        assert unpacked(mask[row], num_tokens) == [[other == text[: len(other)] for other in nodes] for text in nodes]
        slots = [text for level in beams[: num_steps - 1] for text in level]
        assert unpacked(draft_mask[row], len(slots)) == [[other == text[: len(other)] for other in slots] for text in slots]


def unpacked(mask, num_tokens):
    return [[bool((int(row[j // 32]) >> (j % 32)) & 1) for j in range(num_tokens)] for row in mask]


def test_unused_mask_bits_are_zero():
    (_, _, _, mask), (_, _, _, draft_mask), _ = drafted(log_distribution(12, False), 2, 3, 5, 9)
    assert (mask >> 9 == 0).all() and (draft_mask >> 10 == 0).all()
    assert mask.shape == (2, 9, 1) and draft_mask.shape == (2, 10, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Parts


def buffers(batch, num_steps, topk):
    num_candidates, slots = topk + (num_steps - 1) * topk**2, (num_steps - 1) * topk
    return (
        torch.full((batch, num_candidates), POISON),
        torch.full((batch, num_candidates), float("nan")),
        torch.full((batch, num_candidates), POISON, dtype=torch.int32),
        torch.full((batch, slots, (slots + 31) // 32), POISON, dtype=torch.int32),
    )


def test_a_level_writes_its_own_stretch_only():
    """Candidates of other levels and mask rows of other beams are left alone, in the last level all mask rows are."""
    batch, num_steps, topk = 3, 3, 4
    state, beam = buffers(batch, num_steps, topk), None
    for level in range(num_steps):
        before = [x.clone() for x in state]
        rows = batch * (1 if level == 0 else topk)
        ids, logprobs = draft_topk(torch.randn(rows, 9), topk, None)
        _, beam, _ = expand_beam(ids, logprobs, beam, *state, level)
        first, last = (0, 4) if level == 0 else (4 + (level - 1) * 16, 4 + level * 16)
        for x, old in zip(state[:3], before[:3], strict=True):
            assert x[:, :first].equal(old[:, :first]) and x[:, last:].isnan().eq(old[:, last:].isnan()).all()
            assert (x[:, first:last] != old[:, first:last]).all()
        slots = slice(level * topk, (level + 1) * topk)
        untouched = torch.ones(before[3].shape[1], dtype=torch.bool)
        untouched[slots] = False
        assert state[3][:, untouched].equal(before[3][:, untouched])
        assert (state[3][:, slots] > 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("-inf"), float("inf"), 3.0])
def test_a_dead_row_builds_a_valid_tree(bad):
    """A finished row may draft from NaN: whatever it builds has to be a tree of tokens that exist."""
    num_steps, topk, num_tokens = 3, 4, 12
    state, beam = buffers(2, num_steps, topk), None
    for level in range(num_steps):
        rows = 2 if level == 0 else 2 * topk
        logprobs = torch.rand(rows, topk).neg().sort(descending=True).values
        logprobs[: rows // 2] = bad
        tokens, beam, _ = expand_beam(torch.randint(50, (rows, topk)), logprobs, beam, *state, level)
        assert tokens.min() >= 0 and tokens.max() < 50
    assert not state[1].isnan().any() and (state[1] <= 0).all()
    window, parents, depth, mask = build_tree(*state[:3], torch.tensor([7, 8]), num_tokens)
    assert window[:, 0].tolist() == [7, 8] and window.min() >= 0 and window.max() < 50
    assert parents[:, 0].tolist() == [-1, -1] and (parents[:, 1:] >= 0).all()
    assert (parents < torch.arange(num_tokens)).all()
    assert depth.gather(1, parents[:, 1:].long()).eq(depth[:, 1:] - 1).all()
    assert (mask[:, :, 0] & 1 == 1).all()


@pytest.mark.parametrize("num_tokens", [0, 8])
def test_build_tree_refuses_a_window_larger_than_its_candidates(num_tokens):
    tokens, scores, parents, _ = buffers(1, 1, 6)
    with pytest.raises(ValueError, match="6 candidates"):
        build_tree(tokens, scores, parents, torch.tensor([0]), num_tokens)


@pytest.mark.parametrize("topk", [1, 4])
def test_a_drafting_loop_compiles(topk):
    """All levels in one graph: what a level writes is what the next one reads."""
    num_steps = 4
    logits = [torch.randn(2 * (topk if level else 1), 30) for level in range(num_steps)]

    def draft(*state):
        beam, read = None, []
        for level in range(num_steps):
            ids, logprobs = draft_topk(logits[level], topk, None)
            tokens, beam, parent = expand_beam(ids, logprobs, beam, *state, level)
            read += [tokens, beam, parent, state[3][:, level * topk : (level + 1) * topk].clone()]
        return [*read, *build_tree(*state[:3], read[0][:, 0], num_steps + 1)]

    ours, theirs = buffers(2, num_steps, topk), buffers(2, num_steps, topk)
    expected = draft(*ours)
    actual = torch.compile(draft, backend="aot_eager", fullgraph=True)(*theirs)
    for a, b in zip([*actual, *theirs], [*expected, *ours], strict=True):
        assert a.equal(b)


# ----------------------------------------------------------------------------------------------------------------------
# Registration


@pytest.mark.parametrize("topk,num_tokens", [(1, 4), (4, 9), (8, 40)])
def test_opcheck(topk, num_tokens):
    num_steps, beam, state = 3, None, buffers(2, 3, topk)
    for level in range(num_steps):
        logits = torch.randn(2 * (topk if level else 1), 30)
        for draft_ids in (None, torch.randperm(60)[:30]):
            opcheck(draft_topk, (logits, topk, draft_ids))
        ids, logprobs = draft_topk(logits, topk, None)
        opcheck(expand_beam, (ids, logprobs, beam, *[x.clone() for x in state], level))
        _, beam, _ = expand_beam(ids, logprobs, beam, *state, level)
    opcheck(build_tree, (*state[:3], torch.tensor([5, 6]), min(num_tokens, state[0].shape[1] + 1)))
