"""Acceptance by decree follows its rates, and its paths are paths."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from spec_compile.ops.simulate import acceptance_rates, simulate_accept
from spec_compile.ops.tree import build_tree

pytestmark = pytest.mark.usefixtures("fresh_seed")


def seeds(count):
    return torch.randint(1 << 62, (count,))


def trees(batch, num_steps, topk, num_tokens):
    """(window_ids, parents, depth) of random candidates: a child scores less than its parent."""
    candidates = topk + (num_steps - 1) * topk**2
    parents = torch.full((batch, candidates), -1, dtype=torch.int32)
    scores = torch.rand(batch, candidates).neg()
    for i in range(topk, candidates):
        level = (i - topk) // topk**2
        start, width = (0, topk) if level == 0 else (topk + (level - 1) * topk**2, topk**2)
        parents[:, i] = torch.randint(start, start + width, (batch,), dtype=torch.int32)
        scores[:, i] += scores.gather(1, parents[:, i : i + 1].long())[:, 0]
    tokens = torch.randint(1000, (batch, candidates))
    return build_tree(tokens, scores, parents, torch.randint(1000, (batch,)), num_tokens)[:3]


@pytest.mark.parametrize("mean", [1.0, 1.7, 3.3, 6.0])
def test_rates_give_the_mean(mean):
    rates = acceptance_rates(mean, 5)
    assert len(rates) == 5
    assert sum(rates[0] ** i for i in range(6)) == pytest.approx(mean)
    count = 20000
    window = torch.zeros(count, 6, dtype=torch.int64)
    position = torch.randint(1000, (count,), dtype=torch.int32)
    *_, length = simulate_accept(window, None, None, window, torch.tensor([rates]).expand(count, -1), seeds(count), position, 6)
    assert float(length.double().mean()) == pytest.approx(mean, abs=6 * 2.5 / count**0.5)


@pytest.mark.parametrize("mean", [0.9, 4.1])
def test_rates_refuse_an_impossible_mean(mean):
    with pytest.raises(ValueError, match="from 1 to 4"):
        acceptance_rates(mean, 3)


def test_a_chain_follows_its_rates():
    """Every row has rates of its own, one per position; accepted drafts are emitted and the target's token behind them."""
    count, num_tokens = 30000, 4
    window, target = torch.randint(100, (count, num_tokens)), torch.randint(100, 200, (count, num_tokens))
    rates = torch.tensor([[0.9, 0.5, 0.2], [0.0, 1.0, 1.0], [1.0, 1.0, 1.0]]).repeat(count // 3, 1)
    emitted, path, length = simulate_accept(
        window, None, None, target, rates, seeds(count), torch.zeros(count, dtype=torch.int32), num_tokens
    )
    assert length.dtype == path.dtype == torch.int32 and emitted.dtype == torch.int64
    assert length[1::3].eq(1).all() and length[2::3].eq(4).all()
    observed = torch.bincount(length[0::3] - 1, minlength=4) / (count / 3)
    expected = torch.tensor([0.1, 0.9 * 0.5, 0.9 * 0.5 * 0.8, 0.9 * 0.5 * 0.2])
    assert (observed - expected).abs().max() < 0.03  # six standard deviations
    for row in range(30):
        accepted = int(length[row])
        assert path[row].tolist() == [*range(accepted)] + [-1] * (num_tokens - accepted)
        tokens = [*window[row, 1:accepted].tolist(), int(target[row, accepted - 1])]
        assert emitted[row].tolist() == tokens + tokens[-1:] * (num_tokens - accepted)


@pytest.mark.parametrize("max_accept", [1, 3, 6])
@pytest.mark.parametrize("num_steps,topk,num_tokens", [(5, 4, 8), (5, 4, 60), (3, 2, 3)])
def test_on_a_tree_the_path_is_the_deepest_within_the_length(num_steps, topk, num_tokens, max_accept):
    count = 60
    window, parents, depth = trees(count, num_steps, topk, num_tokens)
    target, seed = torch.randint(2000, 3000, window.shape), seeds(count)
    position = torch.randint(1000, (count,), dtype=torch.int32)
    rates = torch.full((count, num_steps), 0.7)
    args = target, rates, seed, position, max_accept
    emitted, path, length = simulate_accept(window, parents, depth, *args)
    chain = torch.zeros(count, num_steps + 1, dtype=torch.int64)
    *_, wanted = simulate_accept(chain, None, None, chain, *args[1:])  # the same draw, where nothing is too short
    for row in range(count):
        depths = depth[row].tolist()
        reached = min(int(wanted[row]) - 1, max(depths))
        assert int(length[row]) == reached + 1
        node = depths.index(reached)
        expected = [node]
        while expected[0] > 0:
            expected.insert(0, int(parents[row, expected[0]]))
        assert path[row].tolist() == expected + [-1] * (max_accept - len(expected))
        tokens = [*window[row, expected[1:]].tolist(), int(target[row, node])]
        assert emitted[row].tolist() == tokens + tokens[-1:] * (max_accept - len(expected))


def test_opcheck():
    window, parents, depth = trees(2, 3, 3, 8)
    rates, seed, position = torch.full((2, 3), 0.5), seeds(2), torch.tensor([4, 9], dtype=torch.int32)
    for tree in ((parents, depth), (None, None)):
        opcheck(simulate_accept, (window, *tree, window, rates, seed, position, 4))
