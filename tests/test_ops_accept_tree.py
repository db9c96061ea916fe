"""Verification of trees is exact: the walk against a recursion, and the emitted tokens' distribution against the target's."""

from __future__ import annotations

import random

import pytest
import torch
from languages import DRAFTS, VOCAB, conditional_distribution, continued, joint_distribution, total_variation
from torch.library import opcheck

from spec_compile.ops.accept import accept_greedy, accept_sampled
from spec_compile.ops.accept_tree import accept_tree_greedy, accept_tree_sampled
from spec_compile.ops.sampling import TARGET_STREAM, sample_token

pytestmark = pytest.mark.usefixtures("fresh_seed")


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def seeds(count):
    return torch.randint(1 << 62, (count,))


def random_tree(num_tokens, vocab):
    """(tokens, parents) of one row: siblings have different tokens, parents stand in front."""
    tokens, parents = [random.randrange(vocab)], [-1]
    while len(tokens) < num_tokens:
        parent = random.randrange(len(tokens))
        free = set(range(vocab)) - {tokens[i] for i in range(len(tokens)) if parents[i] == parent}
        if free:
            tokens.append(random.choice(sorted(free)))
            parents.append(parent)
    return tokens, parents


def random_trees(batch, num_tokens, vocab):
    rows = [random_tree(num_tokens, vocab) for _ in range(batch)]
    return torch.tensor([r[0] for r in rows]), int32([r[1] for r in rows])


def longest_path(tokens, parents, chosen, node=0):
    """The accepted nodes from ``node`` on, by recursion."""
    for child in range(len(tokens)):
        if parents[child] == node and tokens[child] == chosen[node]:
            return [node, *longest_path(tokens, parents, chosen, child)]
    return [node]


def check_triple(triple, paths, chosen, max_accept):
    """What an op returned against the path of every row and the tokens chosen at its nodes."""
    emitted, path, length = triple
    assert emitted.dtype == torch.int64 and path.dtype == length.dtype == torch.int32
    for row, expected in enumerate(paths):
        kept = expected[:max_accept]
        assert int(length[row]) == len(kept)
        assert path[row].tolist() == kept + [-1] * (max_accept - len(kept))
        tokens = [chosen[row][node] for node in kept]
        assert emitted[row].tolist() == tokens + tokens[-1:] * (max_accept - len(kept))


# ----------------------------------------------------------------------------------------------------------------------
# accept_tree_greedy


@pytest.mark.parametrize("num_tokens,max_accept", [(1, 1), (1, 3), (4, 4), (8, 6), (8, 2), (32, 7), (64, 6), (60, 8)])
def test_greedy_against_a_recursion(num_tokens, max_accept):
    window, parents = random_trees(60, num_tokens, 3)
    target = torch.randint(3, (60, num_tokens))
    paths = [longest_path(*row) for row in zip(window.tolist(), parents.tolist(), target.tolist(), strict=True)]
    check_triple(accept_tree_greedy(window, parents, target, max_accept), paths, target.tolist(), max_accept)
    if num_tokens > 4:
        assert len({len(path) for path in paths}) > 2


def test_a_chain_is_a_tree():
    window, target = torch.randint(2, (200, 5)), torch.randint(2, (200, 5))
    parents = (torch.arange(5, dtype=torch.int32) - 1).expand(200, -1)
    emitted, path, length = accept_tree_greedy(window, parents, target, 5)
    assert length.equal(accept_greedy(window, target)) and set(length.tolist()) == {1, 2, 3, 4, 5}
    counts = torch.arange(5) < length[:, None]
    assert emitted[counts].equal(target[counts])
    assert path.equal(torch.where(counts, torch.arange(5), -1).to(torch.int32))


def test_the_first_of_equal_siblings_counts():
    window, parents = torch.tensor([[0, 5, 5, 6, 6]]), int32([[-1, 0, 0, 2, 1]])
    target = torch.tensor([[5, 6, 6, 1, 2]])
    assert accept_tree_greedy(window, parents, target, 3)[1].tolist() == [[0, 1, 4]]


# ----------------------------------------------------------------------------------------------------------------------
# accept_tree_sampled is a walk over the target's samples


def probabilities(*shape):
    return (torch.randn(*shape) * 2).softmax(-1)


@pytest.mark.parametrize("num_tokens,max_accept", [(1, 1), (4, 4), (8, 6), (12, 3), (40, 7)])
def test_sampled_is_greedy_on_the_samples_of_every_node(num_tokens, max_accept):
    window, parents = random_trees(80, num_tokens, 3)
    probs, seed, position = probabilities(80, num_tokens, 3), seeds(80), torch.randint(500, (80,), dtype=torch.int32)
    depth = torch.zeros(80, num_tokens, dtype=torch.int32)
    for node in range(1, num_tokens):
        depth[:, node] = depth.gather(1, parents[:, node : node + 1].long())[:, 0] + 1
    at = position[:, None] + 1 + depth
    chosen = torch.stack([sample_token(probs[:, i], seed, at[:, i], TARGET_STREAM) for i in range(num_tokens)], 1)
    paths = [longest_path(*row) for row in zip(window.tolist(), parents.tolist(), chosen.tolist(), strict=True)]
    triple = accept_tree_sampled(window, parents, probs, seed, position, max_accept)
    check_triple(triple, paths, chosen.tolist(), max_accept)
    greedy = accept_tree_greedy(window, parents, chosen, max_accept)
    assert all(a.equal(b) for a, b in zip(triple, greedy, strict=True))


def test_on_a_chain_it_is_accept_sampled():
    window, probs, seed = torch.randint(3, (300, 4)), probabilities(300, 4, 3), seeds(300)
    position = torch.randint(99, (300,), dtype=torch.int32)
    parents = (torch.arange(4, dtype=torch.int32) - 1).expand(300, -1)
    emitted, _, length = accept_tree_sampled(window, parents, probs, seed, position, 4)
    expected, expected_length = accept_sampled(window, None, probs, seed, position)
    counts = torch.arange(4) < length[:, None]
    assert length.equal(expected_length) and emitted[counts].equal(expected[counts]) and set(length.tolist()) == {1, 2, 3, 4}


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_a_dead_row_gives_valid_tokens(bad):
    """A finished or padding row: its probabilities mean nothing, and its neighbours must not notice."""
    window, parents = random_trees(6, 9, 5)
    probs, seed, position = probabilities(6, 9, 5), seeds(6), int32([3] * 6)
    alive = accept_tree_sampled(window, parents, probs, seed, position, 4)
    probs[::2] = bad
    emitted, path, length = accept_tree_sampled(window, parents, probs, seed, position, 4)
    assert emitted.min() >= 0 and emitted.max() < 5 and length.min() >= 1 and path[:, 0].eq(0).all()
    for a, b in zip((emitted, path, length), alive, strict=True):
        assert a[1::2].equal(b[1::2])


def test_rows_do_not_depend_on_their_batch():
    window, parents = random_trees(9, 12, 3)
    args = window, parents, probabilities(9, 12, 3), seeds(9), torch.randint(100, (9,), dtype=torch.int32)
    order = torch.randperm(9)[:4]
    whole, part = accept_tree_sampled(*args, 5), accept_tree_sampled(*(x[order] for x in args), 5)
    assert all(a[order].equal(b) for a, b in zip(whole, part, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# The distribution of what is emitted


def node_texts(tokens, parents):
    """The text that each node stands for, the root's being empty."""
    texts = [()]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        texts.append((*texts[parent], token))
    return texts


def shallow_tree(num_tokens):
    """A random tree of at most DRAFTS levels: deeper nodes have no place in the language."""
    while True:
        tokens, parents = random_tree(num_tokens, VOCAB)
        if max(len(text) for text in node_texts(tokens, parents)) <= DRAFTS:
            return tokens, parents


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 6])
def test_enumeration(num_tokens):
    """Summed over everything the target can draw at the nodes: the emitted text, continued, follows the target's
    distribution."""
    distribution, (tokens, parents) = conditional_distribution(), shallow_tree(num_tokens)
    probs = torch.stack([distribution[text] for text in node_texts(tokens, parents)])  # [N, V]
    drawn = torch.cartesian_prod(*[torch.arange(VOCAB)] * num_tokens).view(-1, num_tokens)
    weight = probs[torch.arange(num_tokens), drawn].prod(1)
    rows = len(drawn)
    window, tree = torch.tensor(tokens).expand(rows, -1), int32(parents).expand(rows, -1)
    emitted, _, length = accept_tree_greedy(window, tree, drawn, DRAFTS + 1)
    joint, outcomes = torch.zeros([VOCAB] * (DRAFTS + 1), dtype=torch.float64), {}
    for text, count, probability in zip(emitted.tolist(), length.tolist(), weight.tolist(), strict=True):
        outcome = tuple(text[:count])
        outcomes[outcome] = outcomes.get(outcome, 0.0) + probability
    for outcome, probability in outcomes.items():
        joint += probability * continued(distribution, outcome)
    assert total_variation(joint, joint_distribution(distribution)) < 1e-6
    # and it is the rule of the literature, outcome by outcome
    expected = siblings_in_order(distribution, tokens, parents)
    assert outcomes.keys() == expected.keys()
    assert max(abs(outcomes[outcome] - expected[outcome]) for outcome in outcomes) < 1e-9


def siblings_in_order(distribution, tokens, parents, node=0, text=(), remove=True):
    """P(emitted) of recursive rejection over one-hot children; without ``remove`` a refused token is not zeroed."""
    left, outcomes, reached = distribution[text].clone(), {}, 1.0
    for child in (i for i, parent in enumerate(parents) if parent == node):
        accept = float(left[tokens[child]] / left.sum())
        for outcome, p in siblings_in_order(distribution, tokens, parents, child, (*text, tokens[child]), remove).items():
            outcomes[outcome] = outcomes.get(outcome, 0.0) + reached * accept * p
        reached *= 1 - accept
        if remove:
            left[tokens[child]] = 0
    for token in range(VOCAB):
        p = reached * float(left[token] / left.sum()) if left.sum() > 0 else 0.0
        if p > 0 or remove is False:
            outcomes[(*text, token)] = outcomes.get((*text, token), 0.0) + p
    return outcomes


def test_enumeration_finds_a_rule_that_forgets_to_zero():
    distribution, (tokens, parents) = conditional_distribution(), ([0, 0, 1], [-1, 0, 0])
    distribution[()] = torch.tensor([0.4, 0.4, 0.1, 0.1], dtype=torch.float64)
    wrong = siblings_in_order(distribution, tokens, parents, remove=False)
    joint = sum(p * continued(distribution, outcome) for outcome, p in wrong.items())
    assert total_variation(joint, joint_distribution(distribution)) > 0.05


def sampled_distance(distribution, tree, count, probs_of):
    """TV between the target's distribution of DRAFTS + 1 tokens and that of ``count`` rows through the op, continued.

    Args:
        probs_of: the target's table of the nodes, [N, V], from the nodes' texts.
    """
    tokens, parents = tree
    probs = probs_of(node_texts(tokens, parents)).float()
    window, parents = torch.tensor(tokens).expand(count, -1), int32(parents).expand(count, -1)
    position = torch.randint(1000, (count,), dtype=torch.int32)
    emitted, _, length = accept_tree_sampled(window, parents, probs.expand(count, -1, -1), seeds(count), position, DRAFTS + 1)
    outcomes = {}
    for text, stop in zip(emitted.tolist(), length.tolist(), strict=True):
        outcomes[tuple(text[:stop])] = outcomes.get(tuple(text[:stop]), 0) + 1
    joint = sum(n / count * continued(distribution, outcome) for outcome, n in outcomes.items())
    return total_variation(joint, joint_distribution(distribution))


def noise_level(count):
    """Bounds the TV that sampling itself causes: about 0.4 * sqrt(cells / n), doubled."""
    return 0.8 * (VOCAB ** (DRAFTS + 1) / count) ** 0.5


def test_sampling_converges_to_the_target():
    distribution, tree = conditional_distribution(), shallow_tree(7)
    for count in (400, 6400, 25600):
        found = sampled_distance(distribution, tree, count, lambda texts: torch.stack([distribution[t] for t in texts]))
        assert found < noise_level(count)


def test_sampling_finds_probabilities_of_the_wrong_nodes():
    """The negative control: every node judged by its neighbour's distribution."""
    distribution, tree = conditional_distribution(), ([0, 0, 1, 2, 3], [-1, 0, 0, 0, 0])
    for token in range(VOCAB):
        distribution[(token,)] = torch.full((VOCAB,), 0.02, dtype=torch.float64)
        distribution[(token,)][token] = 0.94
    wrong = sampled_distance(distribution, tree, 25600, lambda texts: torch.stack([distribution[t] for t in texts]).roll(1, 0))
    assert wrong > 2 * noise_level(25600)


def test_the_text_does_not_depend_on_the_trees():
    """Rounds of random trees write, token by token, what one-token rounds with the same seeds write."""
    rows, vocab, length = 40, 3, 9
    table, seed = torch.randn(61, vocab).softmax(-1), seeds(rows)

    def next_probs(text):
        return table[hash(tuple(text)) % 61]

    def generate(num_tokens):
        texts, lengths = [[0] for _ in range(rows)], []
        while min(len(text) for text in texts) <= length:
            window, parents, probs = [], [], []
            for text in texts:
                tokens, tree = random_tree(num_tokens, vocab)
                tokens[0] = text[-1]
                window.append(tokens)
                parents.append(tree)
                probs.append(torch.stack([next_probs([*text, *node]) for node in node_texts(tokens, tree)]))
            cache_len = int32([len(text) - 1 for text in texts])
            triple = accept_tree_sampled(torch.tensor(window), int32(parents), torch.stack(probs), seed, cache_len, 4)
            for text, emitted, count in zip(texts, triple[0].tolist(), triple[2].tolist(), strict=True):
                text += emitted[:count]
                lengths.append(count)
        return [text[: length + 1] for text in texts], set(lengths)

    alone, ones = generate(1)
    for num_tokens in (4, 13):
        texts, lengths = generate(num_tokens)
        assert texts == alone
        assert ones == {1} and lengths >= {1, 2, 3}


# ----------------------------------------------------------------------------------------------------------------------
# Registration


def test_opcheck():
    window, parents = random_trees(3, 9, 5)
    opcheck(accept_tree_greedy, (window, parents, torch.randint(5, (3, 9)), 4))
    opcheck(accept_tree_sampled, (window, parents, torch.rand(3, 9, 5), seeds(3), int32([1, 2, 3]), 4))
