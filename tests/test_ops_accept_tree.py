"""Verification of trees is exact: the walk against a recursion, and the emitted tokens' law against the target's."""

from __future__ import annotations

import random

import pytest
import torch
from torch.library import opcheck

from spec_compile.ops.accept import accept_greedy
from spec_compile.ops.accept_tree import accept_tree_greedy, accept_tree_sampled


@pytest.fixture(autouse=True)
def fresh_seed():
    seed = random.SystemRandom().randrange(1 << 31)
    print("seed", seed)  # shown when a test fails
    torch.manual_seed(seed)
    random.seed(seed)


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
# Registration


def test_opcheck():
    window, parents = random_trees(3, 9, 5)
    opcheck(accept_tree_greedy, (window, parents, torch.randint(5, (3, 9)), 4))
    opcheck(accept_tree_sampled, (window, parents, torch.rand(3, 9, 5), seeds(3), int32([1, 2, 3]), 4))
