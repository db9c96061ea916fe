"""The Triton kernels of token trees against the same ops on the CPU, or in the interpreter (see ``kernel_checks``)."""

from __future__ import annotations

import random

import pytest
import torch
from kernel_checks import (
    INTERPRETED,
    check,
    check_capture,
    check_no_host_sync,
    int32,
    lose_distributions,
    needs_device,
    needs_kernels,
    raw,
    seeds,
    to_device,
)
from torch.library import opcheck

from spec_compile.ops import accept_block, accept_tree, simulate, tree

pytestmark = [pytest.mark.gpu, needs_kernels]

SHAPES = [(1, 1, 2), (3, 1, 4), (5, 4, 8), (6, 10, 32), (5, 8, 64), (7, 10, 60), (2, 3, 13)]  # num_steps, topk, window
BATCHES = [1, 3] if INTERPRETED else [1, 3, 8, 32]
POISON = -(1 << 20)


@pytest.fixture(autouse=True)
def fresh_seed():
    seed = random.SystemRandom().randrange(1 << 31)
    print("seed", seed)  # shown when a test fails
    torch.manual_seed(seed)
    random.seed(seed)


# ----------------------------------------------------------------------------------------------------------------------
# draft_topk


def check_topk(logits, k, draft_ids=None):
    """Which tokens and in what order is exact; their log-probabilities are summed in another order."""
    expected_ids, expected = tree.draft_topk(logits, k, draft_ids)
    args = [to_device(logits), k, to_device(draft_ids)]
    ids, logprobs = tree.draft_topk_cuda(*args) if INTERPRETED else tree.draft_topk(*args)
    assert ids.dtype == torch.int64 and logprobs.dtype == torch.float32
    assert ids.cpu().equal(expected_ids)
    torch.testing.assert_close(logprobs.cpu(), expected, rtol=1e-5, atol=2e-5)
    assert (logprobs <= 0).all()


VOCABS = [1, 7, 2048, 5003] if INTERPRETED else [1, 7, 2048, 5003, 32000, 49152, 128256, 151936]


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("k", [1, 4, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_draft_topk(vocab, k, dtype):
    for rows in (1, 10) if INTERPRETED else (1, 3, 8, 80):
        logits = (torch.randn(rows, vocab) * 4).to(dtype)  # 16-bit logits tie often
        logits[-1] = torch.randint(3, (vocab,)).to(dtype)
        check_topk(logits, min(k, vocab), torch.randperm(2 * vocab)[:vocab] if rows > 3 else None)


def test_draft_topk_ties_and_infinities():
    logits = torch.zeros(6, 4500)
    logits[1] = float("-inf")
    logits[2, 100:] = float("-inf")
    logits[3, ::7] = -0.0
    logits[4, 4499] = 5.0
    logits[5] = 1e30
    for k in (1, 5, 10):
        check_topk(logits, k)


def test_draft_topk_of_a_row_with_nan():
    logits = torch.randn(3, 4100)
    logits[0] = float("nan")
    logits[1, 17] = float("nan")
    args = to_device(logits), 6, None
    ids, logprobs = (x.cpu() for x in (tree.draft_topk_cuda(*args) if INTERPRETED else tree.draft_topk(*args)))
    assert all(len(set(row)) == 6 and 0 <= min(row) <= max(row) < 4100 for row in ids.tolist())
    assert (logprobs[:2] == float("-inf")).all() and logprobs[2].isfinite().all()


def test_draft_topk_of_strided_rows():
    wide = torch.randn(5, 3000)
    check_topk(wide[:, 7:2900], 4)
    check_topk(torch.randn(2000, 3).t(), 4)


@needs_device
@pytest.mark.parametrize("rows", [1, 320])
def test_draft_topk_again_and_again(rows):
    """The arrival counters are left as they were found."""
    logits = torch.randn(rows, 49152)
    expected, _ = tree.draft_topk(logits, 10, None)
    moved = to_device(logits)
    for _ in range(50):
        assert tree.draft_topk(moved, 10, None)[0].cpu().equal(expected)


# ----------------------------------------------------------------------------------------------------------------------
# expand_beam and build_tree


def buffers(batch, num_steps, topk):
    num_candidates, slots = topk + (num_steps - 1) * topk**2, (num_steps - 1) * topk
    return [
        torch.full((batch, num_candidates), POISON),
        torch.full((batch, num_candidates), float("nan")),
        torch.full((batch, num_candidates), POISON, dtype=torch.int32),
        torch.full((batch, slots, (slots + 31) // 32), POISON, dtype=torch.int32),
    ]


def level_logprobs(rows, topk, kind):
    """(ids, logprobs) of a level; few different values, all equal, or with rows that are dead."""
    logprobs = torch.rand(rows, topk).mul(4).neg().sort(descending=True, dim=1).values
    if kind == "ties":
        logprobs = logprobs.round()
    if kind == "dead":
        logprobs[::2] = random.choice([float("nan"), float("-inf"), 0.0])
    return torch.randint(50000, (rows, topk)), logprobs


@pytest.mark.parametrize("kind", ["random", "ties", "dead"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("num_steps,topk,num_tokens", SHAPES)
def test_a_tree(num_steps, topk, num_tokens, batch, kind):
    state, beam = buffers(batch, num_steps, topk), None
    for level in range(num_steps):
        ids, logprobs = level_logprobs(batch * (topk if level else 1), topk, kind)
        _, beam, _ = check(tree.expand_beam, tree.expand_beam_cuda, ids, logprobs, beam, *state, level)
    root = torch.randint(50000, (batch,))
    check(tree.build_tree, tree.build_tree_cuda, *state[:3], root, num_tokens)


@pytest.mark.parametrize("num_tokens", [1, 2, 33, 70, 111])
def test_windows_of_any_size(num_tokens):
    """From the root alone to every candidate there is; 110 of them."""
    state, beam = buffers(2, 2, 10), None
    for level in range(2):
        ids, logprobs = level_logprobs(2 * (10 if level else 1), 10, "random")
        _, beam, _ = tree.expand_beam(ids, logprobs, beam, *state, level)
    check(tree.build_tree, tree.build_tree_cuda, *state[:3], torch.tensor([3, 4]), num_tokens)


def test_candidates_in_wider_buffers():
    """Rows of a larger allocation, as a bucket of a larger batch or configuration would have them."""
    wide = [torch.nn.functional.pad(x, (0, 5)) for x in buffers(3, 3, 4)[:3]]
    mask = torch.zeros(3, 20, 3, dtype=torch.int32)
    state, beam = [*[x[:, :36] for x in wide], mask[:, :8, :1]], None
    for level in range(3):
        ids, logprobs = level_logprobs(3 * (4 if level else 1), 4, "random")
        _, beam, _ = check(tree.expand_beam, tree.expand_beam_cuda, ids, logprobs, beam, *state, level)
    check(tree.build_tree, tree.build_tree_cuda, *state[:3], torch.tensor([3, 4, 5]), 9)


# ----------------------------------------------------------------------------------------------------------------------
# Acceptance


def random_trees(batch, num_tokens, vocab):
    """(window_ids, parents, depth): parents stand before their children; equal siblings happen."""
    parents = torch.full((batch, num_tokens), -1, dtype=torch.int32)
    depth = torch.zeros(batch, num_tokens, dtype=torch.int32)
    for node in range(1, num_tokens):
        parents[:, node] = torch.randint(max(0, node - 6), node, (batch,), dtype=torch.int32)
        depth[:, node] = depth.gather(1, parents[:, node : node + 1].long())[:, 0] + 1
    return torch.randint(vocab, (batch, num_tokens)), parents, depth


TREES = [(1, 1), (1, 4), (4, 4), (8, 6), (32, 7), (64, 6), (60, 8), (130, 9)]  # window, max_accept


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("num_tokens,max_accept", TREES)
def test_accept_tree_greedy(num_tokens, max_accept, batch):
    window, parents, _ = random_trees(batch, num_tokens, 3)
    target = torch.randint(3, (batch, num_tokens))
    *_, length = check(accept_tree.accept_tree_greedy, accept_tree.accept_tree_greedy_cuda, window, parents, target, max_accept)
    if batch == 32 and num_tokens >= 32:
        assert length.unique().numel() > 2


@pytest.mark.parametrize("vocab", [3, 2500] if INTERPRETED else [3, 2500, 49152])
@pytest.mark.parametrize("num_tokens,max_accept", TREES)
def test_accept_tree_sampled(num_tokens, max_accept, vocab):
    batch = 1 if vocab > 10000 else 2 if INTERPRETED else 9
    if INTERPRETED and vocab * num_tokens > 40000:
        pytest.skip("the interpreter takes long")
    window, parents, _ = random_trees(batch, num_tokens, 3)
    probs = torch.randn(batch, num_tokens, vocab).mul(3)
    probs[:, :, :3] += 6  # the window's tokens are likely
    wide = torch.zeros(batch, num_tokens + 1, vocab + 3)  # rows of a larger allocation
    wide[:, :num_tokens, :vocab] = probs.softmax(-1)
    position = torch.randint(5000, (batch,), dtype=torch.int32)
    check(
        accept_tree.accept_tree_sampled, accept_tree.accept_tree_sampled_cuda, window, parents,
        wide[:, :num_tokens, :vocab], seeds(batch), position, max_accept,
    )  # fmt: skip


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_accept_tree_sampled_of_a_dead_row(bad):
    window, parents, _ = random_trees(3, 8, 5)
    probs = torch.rand(3, 8, 5)
    probs[1] = bad
    args = [to_device(x) for x in (window, parents, probs, seeds(3), int32([1, 2, 3]))]
    op = accept_tree.accept_tree_sampled_cuda if INTERPRETED else accept_tree.accept_tree_sampled
    emitted, path, length = (x.cpu() for x in op(*args, 4))
    assert emitted.min() >= 0 and emitted.max() < 5 and length.min() >= 1 and path[:, 0].eq(0).all()


@needs_device
def test_sampled_trees_again_and_again():
    """The arrival counters are left as they were found."""
    window, parents, _ = random_trees(4, 32, 3)
    args = [to_device(x) for x in (window, parents, torch.rand(4, 32, 30000), seeds(4), int32([1, 2, 3, 4]))]
    expected = accept_tree.accept_tree_sampled(*args, 7)
    for _ in range(50):
        again = accept_tree.accept_tree_sampled(*args, 7)
        assert all(raw(a).equal(raw(b)) for a, b in zip(again, expected, strict=True))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("num_tokens,max_accept", TREES)
def test_simulate_accept(num_tokens, max_accept, batch):
    window, parents, depth = random_trees(batch, num_tokens, 1000)
    target, position = torch.randint(1000, (batch, num_tokens)), torch.randint(5000, (batch,), dtype=torch.int32)
    op, kernel = simulate.simulate_accept, simulate.simulate_accept_cuda
    for rates in (torch.rand(batch, 5), torch.rand(5, batch).sqrt().t(), torch.ones(1, 9).expand(batch, -1)):
        for shape in ((parents, depth), (None, None)):
            check(op, kernel, window, *shape, target, rates, seeds(batch), position, max_accept)


# ----------------------------------------------------------------------------------------------------------------------
# Block verification


def chain(batch, num_tokens, vocab):
    """(window_ids, draft_probs, target_probs) of drafts sampled from a distribution near the target's."""
    logits = torch.randn(batch, num_tokens, vocab) * 3
    draft = (logits[:, :-1] + torch.randn(batch, num_tokens - 1, vocab)).softmax(-1)
    drafted = torch.multinomial(draft.flatten(0, 1), 1).view(batch, num_tokens - 1)
    return torch.cat([torch.randint(vocab, (batch, 1)), drafted], 1), draft, logits.softmax(-1)


@pytest.mark.parametrize("vocab", [5, 2500] if INTERPRETED else [5, 2500, 49152])
@pytest.mark.parametrize("num_tokens", [2, 4, 8, 13])
def test_accept_block(num_tokens, vocab):
    batch = 2 if vocab > 10000 or INTERPRETED else 24
    window, draft, target = chain(batch, num_tokens, vocab)
    wide = torch.rand(batch, num_tokens + 2, vocab + 1)  # rows of a larger allocation
    wide[:, :num_tokens, :vocab] = target
    position = torch.randint(5000, (batch,), dtype=torch.int32)
    args = window, draft, wide[:, :num_tokens, :vocab], seeds(batch), position
    *_, length = check(accept_block.accept_block, accept_block.accept_block_cuda, *args)
    if batch == 24 and num_tokens == 8:
        assert length.unique().numel() > 2  # several branches were taken


def test_accept_block_without_anything_left():
    """p == q, and drafts that p excludes: the block ends at the root, and what follows comes from p."""
    probs = torch.rand(6, 2, 40)
    probs[..., 0] = 0
    target = torch.cat([probs, probs[:, :1]], 1)
    window = torch.zeros(6, 3, dtype=torch.int64)
    args = window, probs, target, seeds(6), int32([3] * 6)
    emitted, length = check(accept_block.accept_block, accept_block.accept_block_cuda, *args)
    assert (length == 1).all() and target[:, 0].gather(1, emitted[:, :1]).gt(0).all()


@pytest.mark.parametrize("num_tokens", [2, 5])
def test_accept_block_of_no_distribution(num_tokens):
    window, draft, target = chain(12, num_tokens, 60)
    seed, position = seeds(12), int32([7] * 12)
    lose_distributions(window, draft, seed, position)
    check(accept_block.accept_block, accept_block.accept_block_cuda, window, draft, target, seed, position)


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_accept_block_of_a_dead_row(bad):
    window, draft, target = chain(3, 4, 50)
    target[1], draft[1] = bad, bad
    args = [to_device(x) for x in (window, draft, target, seeds(3), int32([1, 2, 3]))]
    op = accept_block.accept_block_cuda if INTERPRETED else accept_block.accept_block
    emitted, length = (x.cpu() for x in op(*args))
    assert emitted.min() >= 0 and emitted.max() < 50 and length.min() >= 1 and length.max() <= 4


# ----------------------------------------------------------------------------------------------------------------------
# What only a device can show


OPS = {
    "draft_topk": tree.draft_topk,
    "expand_beam": tree.expand_beam,
    "build_tree": tree.build_tree,
    "accept_tree_greedy": accept_tree.accept_tree_greedy,
    "accept_tree_sampled": accept_tree.accept_tree_sampled,
    "simulate_accept": simulate.simulate_accept,
    "accept_block": accept_block.accept_block,
}


def device_round():
    """Inputs of every op on the device, as {name: arguments}."""
    batch, num_steps, topk, num_tokens = 4, 5, 4, 8
    state, beam = buffers(batch, num_steps, topk), None
    for level in range(num_steps):
        ids, logprobs = level_logprobs(batch * (topk if level else 1), topk, "random")
        if level == 2:
            expand = (ids, logprobs, beam, *[x.clone() for x in state], level)
        _, beam, _ = tree.expand_beam(ids, logprobs, beam, *state, level)
    window, parents, depth, _ = tree.build_tree(*state[:3], torch.randint(9, (batch,)), num_tokens)
    noise = seeds(batch), int32([1, 2, 3, 4])
    args = {
        "draft_topk": (torch.randn(batch * topk, 32000), topk, torch.randperm(128256)[:32000]),
        "expand_beam": expand,
        "build_tree": (*state[:3], window[:, 0].clone(), num_tokens),
        "accept_tree_greedy": (window, parents, window.roll(-1, 1), num_steps + 1),
        "accept_tree_sampled": (window, parents, torch.rand(batch, num_tokens, 5000), *noise, num_steps + 1),
        "simulate_accept": (window, parents, depth, window, torch.full((batch, num_steps), 0.7), *noise, num_steps + 1),
        "accept_block": (*chain(batch, 4, 5000), *noise),
    }
    return {name: [to_device(x) for x in values] for name, values in args.items()}


@needs_device
@pytest.mark.parametrize("name", OPS)
def test_opcheck_on_the_device(name):
    opcheck(OPS[name], tuple(device_round()[name]))


@needs_device
@pytest.mark.parametrize("name", OPS)
def test_no_host_sync(name):
    check_no_host_sync(OPS[name], device_round()[name])


@needs_device
@pytest.mark.parametrize("name", OPS)
def test_a_captured_op_does_what_an_eager_one_does(name):
    check_capture(OPS[name], device_round()[name])
