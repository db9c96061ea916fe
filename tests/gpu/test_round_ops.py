"""The Triton kernels of the small ops against the same ops on the CPU, or in the interpreter (see ``kernel_checks``)."""

from __future__ import annotations

import random

import kernel_checks
import pytest
import torch
from kernel_checks import (
    INTERPRETED,
    check_capture,
    check_no_host_sync,
    int32,
    lose_distributions,
    needs_device,
    needs_kernels,
    seeds,
    to_device,
)
from torch.library import opcheck

from spec_compile.ops import accept, kv_cache, ngram, page_table, sampling

pytestmark = [pytest.mark.gpu, needs_kernels]

# The ops dispatch to their kernels on CUDA tensors; the interpreter's tensors are the CPU's, so there it calls them.
OPS = {
    "sample_token": (sampling.sample_token, sampling.sample_token_cuda),
    "accept_greedy": (accept.accept_greedy, accept.accept_greedy_cuda),
    "accept_sampled": (accept.accept_sampled, accept.accept_sampled_cuda),
    "commit_tokens": (accept.commit_tokens, accept.commit_tokens_cuda),
    "ngram_propose": (ngram.ngram_propose, ngram.ngram_propose_cuda),
    "kv_write": (kv_cache.kv_write, kv_cache.kv_write_cuda),
    "kv_write_packed": (kv_cache.kv_write_packed, kv_cache.kv_write_packed_cuda),
    "kv_commit": (kv_cache.kv_commit, kv_cache.kv_commit_cuda),
    "ring_page_table": (page_table.ring_page_table, page_table.ring_page_table_cuda),
}


@pytest.fixture(autouse=True)
def fresh_seed():
    seed = random.SystemRandom().randrange(1 << 31)
    print("seed", seed)  # shown when a test fails
    torch.manual_seed(seed)
    random.seed(seed)


def check(name, *args):
    return kernel_checks.check(*OPS[name], *args)


# ----------------------------------------------------------------------------------------------------------------------
# Sampling and acceptance


@pytest.mark.parametrize("vocab", [1, 7, 2048, 5003, 49152])
def test_sample_token(vocab):
    batch = 2 if vocab > 10_000 else 9
    probs = (torch.randn(batch, vocab) * 2).softmax(-1)
    probs = probs.masked_fill(torch.rand(batch, vocab) < 0.3, 0.0)
    probs[0] = 0  # a padding row
    for stream in (sampling.DRAFT_STREAM, sampling.ACCEPT_STREAM, sampling.TARGET_STREAM):
        position = torch.randint(1 << 20, (batch,), dtype=torch.int32)
        check("sample_token", probs, seeds(batch), position, stream)


def test_sample_token_of_a_slice():
    """A slot of [B, N, V] and one seed for all rows: strides that are not the obvious ones."""
    probs, seed = torch.rand(4, 3, 100), seeds(1)
    check("sample_token", probs[:, 1], seed.expand(4), int32([5, 6, 7, 8]), 0)


def chain(batch, num_tokens, vocab):
    """(window_ids, draft_probs, target_probs) of drafts that are sampled from a distribution near the target's."""
    logits = torch.randn(batch, num_tokens, vocab) * 8  # peaked, so that argmax drafts are accepted at times
    target = logits.softmax(-1)
    draft = (logits[:, :-1] + torch.randn(batch, num_tokens - 1, vocab)).softmax(-1)
    drafted = torch.zeros(batch, 0, dtype=torch.int64)
    if num_tokens > 1:
        drafted = torch.multinomial(draft.flatten(0, 1), 1).view(batch, num_tokens - 1)
    return torch.cat([torch.randint(vocab, (batch, 1)), drafted], 1), draft, target


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 8, 13])
@pytest.mark.parametrize("full", [True, False], ids=["full", "one_hot"])
def test_accept_sampled(num_tokens, full):
    batch, vocab = 24, 2500
    window, draft, target = chain(batch, num_tokens, vocab)
    if not full:  # the likeliest tokens, so that some are accepted
        window[:, 1:] = target[:, :-1].argmax(-1)
    position = torch.randint(5000, (batch,), dtype=torch.int32)
    _, length = check("accept_sampled", window, draft if full else None, target, seeds(batch), position)
    if num_tokens == 4:
        assert length.unique().numel() > 2  # several branches were taken


def test_accept_sampled_without_residual_mass():
    """p == q, but the test's draft of a token that p excludes is always rejected: what is left comes from p."""
    probs = torch.rand(16, 1, 40)
    probs[..., 0] = 0
    target = torch.cat([probs, probs], 1)
    window = torch.zeros(16, 2, dtype=torch.int64)
    emitted, length = check("accept_sampled", window, probs, target, seeds(16), int32([3] * 16))
    assert (length == 1).all() and target[:, 0].gather(1, emitted[:, :1]).gt(0).all()


@pytest.mark.parametrize("num_tokens", [2, 5])
def test_accept_sampled_of_no_distribution(num_tokens):
    window, draft, target = chain(12, num_tokens, 60)
    seed, position = seeds(12), int32([7] * 12)
    lose_distributions(window, draft, seed, position)
    check("sample_token", draft[:, 0].contiguous(), seed, position + 1, sampling.DRAFT_STREAM)
    check("accept_sampled", window, draft, target, seed, position)


def test_accept_sampled_strided():
    window, draft, target = chain(3, 4, 300)
    wide_draft, wide_target = torch.rand(3, 6, 300), torch.rand(3, 6, 300)
    wide_draft[:, :3], wide_target[:, :4] = draft, target
    check("accept_sampled", window, wide_draft[:, :3], wide_target[:, :4], seeds(3), int32([1, 2, 3]))


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 64])
def test_accept_greedy(num_tokens):
    check("accept_greedy", torch.randint(3, (70, num_tokens)), torch.randint(3, (70, num_tokens)))
    same = torch.randint(9, (2, num_tokens + 1))
    assert check("accept_greedy", same[:, :-1], same[:, 1:]).tolist() == [num_tokens] * 2


@pytest.mark.parametrize("num_tokens", [1, 5, 16])
@pytest.mark.parametrize("num_eos", [0, 1, 3])
def test_commit_tokens(num_tokens, num_eos):
    capacity, batch = 24, 64
    buffer = torch.randint(2, 12, (batch, capacity + 5))  # rows of a wider buffer
    check(
        "commit_tokens",
        buffer[:, :capacity],
        torch.randint(0, capacity, (batch,), dtype=torch.int32),
        torch.rand(batch) < 0.2,
        torch.randint(-1, 12, (batch, num_tokens)),
        torch.randint(0, num_tokens + 1, (batch,), dtype=torch.int32),
        torch.randint(1, capacity + 8, (batch,), dtype=torch.int32),
        torch.tensor([3, -1, 7])[:num_eos],
    )


@pytest.mark.parametrize("tree", [False, True])
def test_commit_tokens_of_no_distribution(tree):
    batch, num_tokens, capacity, vocab = 40, 5, 24, 7
    probs = torch.rand(batch, 9, vocab)
    probs[torch.rand(batch, 9) < 0.3] = float("nan")
    path = None
    if tree:
        path = torch.rand(batch, 9).argsort(1)[:, :num_tokens].to(torch.int32)
        path[:, 3:] = torch.where(torch.rand(batch, 2) < 0.5, -1, path[:, 3:])
    _, status = check(
        "commit_tokens",
        torch.randint(2, 12, (batch, capacity)),
        torch.randint(0, capacity, (batch,), dtype=torch.int32),
        torch.rand(batch) < 0.2,
        torch.randint(-1, 12, (batch, num_tokens)),
        torch.randint(0, num_tokens + 1, (batch,), dtype=torch.int32),
        torch.randint(1, capacity + 8, (batch,), dtype=torch.int32),
        torch.tensor([3]),
        probs[..., 0],
        path,
    )
    assert status.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("min_ngram,max_ngram", [(1, 1), (1, 3), (2, 5)])
@pytest.mark.parametrize("capacity", [3, 100, 9000])
@pytest.mark.parametrize("vocab", [2, 30])
def test_ngram_propose(min_ngram, max_ngram, capacity, vocab):
    batch = 12
    tokens = torch.randint(vocab, (batch, capacity))
    cache_len = torch.randint(0, capacity, (batch,), dtype=torch.int32)
    cache_len[0], cache_len[1] = 0, capacity - 1
    for num_steps in (1, 7):
        check("ngram_propose", tokens, cache_len, num_steps, min_ngram, max_ngram)


# ----------------------------------------------------------------------------------------------------------------------
# Caches


def table_and_lengths(page_size, batch=3, room=40):
    pages_per_row = -(-room // page_size)
    num_pages = batch * pages_per_row + 3
    pages = random.sample(range(1, num_pages), batch * pages_per_row)
    lengths = [random.randrange(0, 15) for _ in range(batch)]
    return int32(pages).view(batch, pages_per_row), int32(lengths), num_pages


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("num_tokens", [1, 6])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kv_write(page_size, num_tokens, cache_dtype):
    table, cache_len, num_pages = table_and_lengths(page_size)
    caches = [torch.randn(num_pages, page_size, 3, dim).to(cache_dtype) for dim in (24, 16)]
    fused = torch.randn(3, num_tokens, 3, 40)  # heads of a fused projection: strided
    if INTERPRETED:  # it cuts float32 to bfloat16 where devices round
        fused = fused.to(cache_dtype).float()
    check("kv_write", *fused.split([24, 16], -1), *caches, table, cache_len)


def test_kv_write_past_the_last_page():
    caches = [torch.zeros(4, 4, 1, 8) for _ in range(2)]
    check("kv_write", torch.randn(1, 5, 1, 8), torch.randn(1, 5, 1, 8), *caches, int32([[2, 1]]), int32([6]))


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kv_write_packed(page_size, cache_dtype):
    table, _, num_pages = table_and_lengths(page_size, batch=3)
    caches = [torch.randn(num_pages, page_size, 3, dim).to(cache_dtype) for dim in (24, 16)]
    prompts = torch.randn(26, 3, 40)
    if INTERPRETED:
        prompts = prompts.to(cache_dtype).float()
    bounds = int32([0, 17, 17, 25])  # one token over
    check("kv_write_packed", *prompts.split([24, 16], -1), *caches, table, bounds)


def test_kv_write_packed_keeps_the_window():
    """All but page 0: the reference sends there what the kernel does not write at all."""
    table, _, num_pages = table_and_lengths(16, batch=3)
    caches = [torch.randn(num_pages, 16, 3, dim) for dim in (24, 16)]
    args = (*torch.randn(26, 3, 40).split([24, 16], -1), *caches, table, int32([0, 17, 17, 25]), 6)
    moved = [to_device(x) for x in args]
    op, kernel = OPS["kv_write_packed"]
    op(*args)
    (kernel if INTERPRETED else op)(*moved)
    for cache, expected in zip(moved[2:4], caches, strict=True):
        torch.testing.assert_close(cache[1:].cpu(), expected[1:], rtol=0, atol=0)


@pytest.mark.parametrize("columns", [1, 7, 1500])
def test_ring_page_table(columns):
    first = torch.tensor([0, 1, 5, 2, 0])[:, None]  # rows of the pool, from 1; padding rows between them
    table = ((first - 1) * columns + 1 + torch.arange(columns)).masked_fill(first == 0, 0).to(torch.int32)
    for ring in {1, min(3, columns), columns}:
        check("ring_page_table", table, ring)
        check("ring_page_table", table[:, : max(1, columns // 2)], 1)


def random_path(num_tokens):
    accepted = random.randrange(1, num_tokens + 1)
    return [0, *sorted(random.sample(range(1, num_tokens), accepted - 1))] + [-1] * (num_tokens - accepted)


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 9, 23])
def test_kv_commit(page_size, num_tokens):
    table, cache_len, num_pages = table_and_lengths(page_size)
    wide = [((2, 320), torch.bfloat16), ((2, 64), torch.float32), ((576,), torch.bfloat16), ((1, 8), torch.uint8)]
    odd = [((3,), torch.uint8), ((2, 5), torch.float16)]  # rows that are no whole number of larger words
    for shapes in (wide, wide[:1], odd):
        caches = [torch.randn(num_pages, page_size, *shape).mul(9).to(dtype) for shape, dtype in shapes]
        path = int32([random_path(num_tokens) for _ in range(3)])
        check("kv_commit", caches, table, cache_len, path)


def test_kv_commit_shifts_by_one():
    """Every source but the last is a destination too: the overlap at its worst, over several groups of rows."""
    table, cache_len, num_pages = table_and_lengths(4)
    caches = [torch.randn(num_pages, 4, 2, 128) for _ in range(3)]
    path = torch.arange(1, 25).clamp(max=23).to(torch.int32).expand(3, -1)
    check("kv_commit", caches, table, cache_len, path)


# ----------------------------------------------------------------------------------------------------------------------
# What only a device can show


def device_round():
    """Inputs of every op on the device, as {name: arguments}."""
    window, draft, target = chain(4, 4, 1000)
    table, cache_len, num_pages = table_and_lengths(16, batch=4)
    caches = [torch.randn(num_pages, 16, 2, 64, dtype=torch.bfloat16) for _ in range(2)]
    new = [torch.randn(4, 4, 2, 64, dtype=torch.bfloat16) for _ in range(2)]
    position, state = int32([1, 2, 3, 4]), (torch.randint(9, (4, 50)), int32([3, 9, 12, 40]), torch.zeros(4).bool())
    args = {
        "sample_token": (target[:, 0], seeds(4), position, 0),
        "accept_greedy": (window, window.roll(-1, 1)),
        "accept_sampled": (window, draft, target, seeds(4), position),
        "commit_tokens": (*state, window, int32([4, 1, 2, 3]), int32([50] * 4), torch.tensor([2, -1])),
        "ngram_propose": (torch.randint(3, (4, 200)), int32([3, 90, 150, 199]), 5, 1, 3),
        "kv_write": (*new, *caches, table, cache_len),
        "kv_write_packed": (*[x.flatten(0, 1) for x in new], *caches, table, int32([0, 1, 1, 9, 16])),
        "ring_page_table": (torch.arange(1, 25, dtype=torch.int32).view(4, 6), 3),
        "kv_commit": (caches, table, cache_len, int32([random_path(4) for _ in range(4)])),
    }
    return {name: [to_device(x) for x in values] for name, values in args.items()}


@needs_device
def test_samples_follow_the_probabilities():
    count, probs = 100_000, torch.randn(12).softmax(-1)
    args = [to_device(x) for x in (probs.expand(count, -1), seeds(count), int32([5] * count))]
    tokens = sampling.sample_token(*args, sampling.TARGET_STREAM).cpu()
    observed = torch.bincount(tokens, minlength=12) / count
    assert (observed - probs).abs().max() < 6 * (0.25 / count) ** 0.5


@needs_device
@pytest.mark.parametrize("name", OPS)
def test_opcheck_on_the_device(name):
    opcheck(OPS[name][0], tuple(device_round()[name]))


@needs_device
@pytest.mark.parametrize("name", OPS)
def test_no_host_sync(name):
    check_no_host_sync(OPS[name][0], device_round()[name])


@needs_device
@pytest.mark.parametrize("name", OPS)
def test_a_captured_op_does_what_an_eager_one_does(name):
    check_capture(OPS[name][0], device_round()[name])
