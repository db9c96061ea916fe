"""kv_write, kv_write_packed and kv_commit against loops: what each slot must hold afterwards, and that nothing else moved."""

from __future__ import annotations

import random

import pytest
import torch
from torch.library import opcheck

from spec_compile.ops.kv_cache import kv_commit, kv_write, kv_write_packed

pytestmark = pytest.mark.usefixtures("fresh_seed")


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def shuffled_table(batch, pages_per_row, num_pages):
    pages = random.sample(range(1, num_pages), batch * pages_per_row)
    return int32(pages).view(batch, pages_per_row)


def place(table, row, slot, page_size):
    return int(table[row, slot // page_size]), slot % page_size


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


# ----------------------------------------------------------------------------------------------------------------------
# kv_write


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
def test_kv_write(page_size, cache_dtype):
    lengths, num_tokens = [0, random.randrange(1, 9), 15], 5
    table = shuffled_table(3, -(-20 // page_size), 70)
    k_cache = torch.full((70, page_size, 2, 4), float("nan"), dtype=cache_dtype)
    v_cache = torch.full((70, page_size, 2, 3), float("nan"), dtype=cache_dtype)
    k, v = torch.randn(3, num_tokens, 2, 4), torch.randn(3, num_tokens, 2, 3)
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for b, length in enumerate(lengths):
        for i in range(num_tokens):
            expected_k[place(table, b, length + i, page_size)] = k[b, i].to(cache_dtype)
            expected_v[place(table, b, length + i, page_size)] = v[b, i].to(cache_dtype)
    cache_len = int32(lengths)
    assert kv_write(k, v, k_cache, v_cache, table, cache_len) is None
    assert_same(k_cache, expected_k)
    assert_same(v_cache, expected_v)
    assert cache_len.tolist() == lengths


def test_kv_write_past_the_last_page_spares_live_slots():
    """The window of a row at its limit hangs over: what does not fit goes to page 0."""
    table = int32([[2, 1]])
    k_cache, v_cache = torch.zeros(4, 4, 1, 2), torch.zeros(4, 4, 1, 2)
    new = torch.arange(1.0, 6.0).view(1, 5, 1, 1).expand(1, 5, 1, 2)
    kv_write(new, new, k_cache, v_cache, table, int32([6]))
    assert k_cache[1, :, 0, 0].tolist() == [0, 0, 1, 2]
    assert k_cache[2].abs().sum() == 0 and k_cache[3].abs().sum() == 0
    assert k_cache[0, :3, 0, 0].tolist() == [3, 4, 5]


def test_kv_write_takes_views():
    fused = torch.randn(2, 3, 2, 12)  # [B, N, Hkv, D + D], as a fused projection leaves it
    k, v = fused.split(6, -1)
    caches = torch.zeros(6, 4, 2, 6), torch.zeros(6, 4, 2, 6)
    copies = caches[0].clone(), caches[1].clone()
    table, cache_len = shuffled_table(2, 2, 6), int32([1, 4])
    kv_write(k, v, *caches, table, cache_len)
    kv_write(k.contiguous(), v.contiguous(), *copies, table, cache_len)
    assert_same(caches[0], copies[0])
    assert_same(caches[1], copies[1])
    assert caches[0].abs().sum() > 0


# ----------------------------------------------------------------------------------------------------------------------
# kv_write_packed


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 5])
def test_kv_write_packed(page_size, cache_dtype, window):
    lengths = [random.randrange(1, 9), 0, 17, 0]
    table = shuffled_table(4, -(-20 // page_size), 90)
    k_cache = torch.full((90, page_size, 2, 4), float("nan"), dtype=cache_dtype)
    v_cache = torch.full((90, page_size, 2, 3), float("nan"), dtype=cache_dtype)
    k, v = torch.randn(sum(lengths), 2, 7).split([4, 3], -1)  # views, as of a fused projection
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    token = 0
    for b, length in enumerate(lengths):
        for i in range(length):
            if window == 0 or i >= length - window:
                expected_k[place(table, b, i, page_size)] = k[token].to(cache_dtype)
                expected_v[place(table, b, i, page_size)] = v[token].to(cache_dtype)
            token += 1
    bounds = int32([0, *torch.tensor(lengths).cumsum(0).tolist()])
    assert kv_write_packed(k, v, k_cache, v_cache, table, bounds, window) is None
    assert_same(k_cache[1:], expected_k[1:])  # page 0 is the null page
    assert_same(v_cache[1:], expected_v[1:])


def test_kv_write_packed_keeps_what_does_not_fit_out_of_live_pages():
    """Tokens behind the last prompt, of a buffer padded to a bucket, count as its continuation."""
    caches, new = [torch.zeros(4, 2, 1, 1) for _ in range(2)], torch.arange(1.0, 7.0).view(6, 1, 1)
    kv_write_packed(new, new, *caches, int32([[1], [2]]), int32([0, 2, 3]))
    assert caches[0][1:, :, 0, 0].tolist() == [[1, 2], [3, 4], [0, 0]]
    assert caches[0][0, :, 0, 0].tolist() == [5, 6]


# ----------------------------------------------------------------------------------------------------------------------
# kv_commit


def random_path(num_tokens):
    """Root, then strictly later nodes, then -1: the path down a tree whose nodes stand behind their ancestors."""
    accepted = random.randrange(1, num_tokens + 1)
    return [0, *sorted(random.sample(range(1, num_tokens), accepted - 1))] + [-1] * (num_tokens - accepted)


def commit_by_hand(caches, table, lengths, path):
    expected = [cache.clone() for cache in caches]
    for b, length in enumerate(lengths):
        for j, source in enumerate(path[b]):
            if source >= 0:
                for cache, result in zip(caches, expected, strict=True):
                    page_size = cache.shape[1]
                    old = cache[place(table, b, length + source, page_size)]
                    result[place(table, b, length + j, page_size)] = old
    return expected


def layers(page_size, num_pages=70):
    """Caches of unlike widths and types, as a hybrid of GQA, MLA and an fp8 cache has them."""
    shapes = [((2, 4), torch.float32), ((2, 3), torch.bfloat16), ((7,), torch.float32), ((2, 8), torch.float8_e4m3fn)]
    return [torch.randn(num_pages, page_size, *shape).to(dtype) for shape, dtype in shapes]


def bits(caches):
    return [cache.view(torch.uint8) for cache in caches]


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_kv_commit(page_size):
    for _ in range(5):
        num_tokens = random.randrange(2, 12)
        lengths = [0, random.randrange(1, 9), 15]
        table = shuffled_table(3, -(-28 // page_size), 90)
        caches = layers(page_size, 90)
        path = [random_path(num_tokens) for _ in lengths]
        expected = commit_by_hand(caches, table, lengths, path)
        cache_len = int32(lengths)
        assert kv_commit(caches, table, cache_len, int32(path)) is None
        for actual, wanted in zip(bits(caches), bits(expected), strict=True):
            assert_same(actual, wanted)
        assert cache_len.tolist() == lengths


@pytest.mark.parametrize(
    "path",
    [
        [0, 2, 3, 4, 5, -1],  # every source but the last is a destination too
        [0, 1, 2, 3, 4, 5],  # nothing moves
        [0, -1, -1, -1, -1, -1],  # only the root
        [0, 5, -1, -1, -1, -1],
        [0, 3, 3, 5, 5, -1],  # not a path, but only path[j] >= j is required
        [1, 2, 3, 4, 5, 5],
    ],
)
def test_kv_commit_reads_before_it_writes(path):
    caches = [torch.arange(12.0).view(3, 4, 1).clone()]
    table, lengths = int32([[2, 1]]), [1]
    expected = commit_by_hand(caches, table, lengths, [path])
    kv_commit(caches, table, int32(lengths), int32([path]))
    assert_same(caches[0], expected[0])


def test_kv_commit_keeps_committed_slots_and_other_rows():
    table = shuffled_table(3, 4, 20)
    caches = layers(4, 20)
    before = [cache.clone() for cache in caches]
    path = int32([[0, 1, 2, -1], [0, 2, 3, -1], [-1, -1, -1, -1]])
    lengths = [3, 6, 5]
    kv_commit(caches, table, int32(lengths), path)
    changed = set()
    for old, new in zip(bits(before), bits(caches), strict=True):
        changed |= {tuple(place) for place in (old != new).flatten(2).any(-1).nonzero().tolist()}
    assert changed == {place(table, 1, 7, 4), place(table, 1, 8, 4)}


def test_attention_after_a_commit_sees_the_accepted_path():
    """Verify a tree, keep one path, and the next round must attend as if that path had been a chain."""
    from spec_compile.ops.attention import attention

    def round_inputs(num_tokens):
        return [torch.randn(1, num_tokens, h, 4, dtype=torch.float64) for h in (2, 1, 1)]

    table, prefix = int32([[3, 1, 2]]), round_inputs(3)
    first, second = round_inputs(4), round_inputs(2)
    accepted = [0, 2, 3]  # parents: 0 -> 1, 0 -> 2 -> 3
    tree = int32([[[0b0001], [0b0011], [0b0101], [0b1101]]])

    caches = [torch.full((4, 4, 1, 4), float("nan"), dtype=torch.float64) for _ in range(2)]
    attention(*prefix, *caches, table, int32([0]), None, 0.5, 0, 0.0, None)
    attention(*first, *caches, table, int32([3]), tree, 0.5, 0, 0.0, None)
    kv_commit(caches, table, int32([3]), int32([[*accepted, -1]]))
    out = attention(*second, *caches, table, int32([6]), None, 0.5, 0, 0.0, None)

    chain = [torch.full_like(cache, float("nan")) for cache in caches]
    attention(*prefix, *chain, table, int32([0]), None, 0.5, 0, 0.0, None)
    attention(*[x[:, accepted] for x in first], *chain, table, int32([3]), None, 0.5, 0, 0.0, None)
    expected = attention(*second, *chain, table, int32([6]), None, 0.5, 0, 0.0, None)
    assert_same(out, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Registration


def test_opcheck():
    table, cache_len = shuffled_table(2, 3, 8), int32([1, 5])
    k, v = torch.randn(2, 4, 2, 4), torch.randn(2, 4, 2, 3)
    opcheck(kv_write, (k, v, torch.zeros(8, 4, 2, 4), torch.zeros(8, 4, 2, 3), table, cache_len))
    opcheck(kv_write_packed, (k[0], v[0], torch.zeros(8, 4, 2, 4), torch.zeros(8, 4, 2, 3), table, int32([0, 1, 4])))
    caches = [torch.randn(8, 4, 2, 4), torch.randn(8, 4, 6)]
    opcheck(kv_commit, (caches, table, cache_len, int32([[0, 2, 3, -1], [0, 1, 3, -1]])))


def test_the_mutated_list_survives_functionalization():
    """auto_functionalize must write the moved rows back into every cache of the list."""
    table, cache_len, path = int32([[2, 1]]), int32([1]), int32([[0, 2, 3]])
    eager = [torch.randn(4, 4, 2), torch.randn(4, 4, 3)]
    traced = [cache.clone() for cache in eager]

    def step(caches, path):
        kv_commit(caches, table, cache_len, path + 0)
        return [cache.sum() for cache in caches]

    expected = step(eager, path)
    actual = torch.compile(step, backend="aot_eager", fullgraph=True)(traced, path)
    for a, b in zip([*actual, *traced], [*expected, *eager], strict=True):
        assert_same(a, b)
