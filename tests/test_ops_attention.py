"""The generic attention ops against a loop that looks at one query, one head and one key at a time, in float64.

The loop shares nothing with the ops: it walks parents instead of mask bits and indexes pages by hand. Whatever a query
must not read is NaN, so reading it shows.
"""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch.library import opcheck

from spec_compile.ops.attention import attention, mla_attention, mla_prefill_attention, prefill_attention

NAN = float("nan")


pytestmark = pytest.mark.usefixtures("fresh_seed")


# ----------------------------------------------------------------------------------------------------------------------
# The independent reference


def naive_query(q, keys, values, scale, softcap, sink):
    """One query [D] over lists of keys [D] and values [Dv]: float64 [Dv]."""
    scores = []
    for key in keys:
        score = float(q.double() @ key.double()) * scale
        scores.append(math.tanh(score / softcap) * softcap if softcap > 0 else score)
    peak = max([*scores, sink] if sink is not None else scores)
    weights = [math.exp(score - peak) for score in scores]
    total = sum(weights) + (math.exp(sink - peak) if sink is not None else 0.0)
    return sum(w / total * value.double() for w, value in zip(weights, values, strict=True))


def ancestors(parents, i):
    """Window indices token i sees: itself and its ancestors. ``parents[0]`` is -1."""
    seen = []
    while i >= 0:
        seen.append(i)
        i = parents[i]
    return seen


def naive_decode(q, k, v, k_cache, v_cache, table, lengths, parents, scale, window, softcap, sinks):
    """Reads the prefix from the caches as they were before the op, the window from k and v."""
    batch, num_tokens, num_heads, _ = q.shape
    group, page_size = num_heads // k.shape[2], k_cache.shape[1]
    out = torch.zeros(batch, num_tokens, num_heads, v.shape[3], dtype=torch.float64)
    for b in range(batch):
        for i in range(num_tokens):
            path = ancestors(parents[b], i)
            query_position = lengths[b] + len(path) - 1
            for h in range(num_heads):
                keys, values = [], []
                for s in range(lengths[b]):
                    if window == 0 or query_position - s < window:
                        page = int(table[b, s // page_size])
                        keys.append(k_cache[page, s % page_size, h // group])
                        values.append(v_cache[page, s % page_size, h // group])
                for j in path:
                    position = lengths[b] + len(ancestors(parents[b], j)) - 1
                    if window == 0 or query_position - position < window:
                        keys.append(k[b, j, h // group])
                        values.append(v[b, j, h // group])
                sink = float(sinks[h]) if sinks is not None else None
                out[b, i, h] = naive_query(q[b, i, h], keys, values, scale, softcap, sink)
    return out


# ----------------------------------------------------------------------------------------------------------------------
# Inputs


def random_parents(num_tokens):
    return [-1] + [random.randrange(i) for i in range(1, num_tokens)]


def chain_parents(num_tokens):
    return [i - 1 for i in range(num_tokens)]


def pack_tree(parents):
    """int32 [B, N, W] from lists of parents, bit by bit."""
    num_tokens = len(parents[0])
    words = (num_tokens + 31) // 32
    mask = torch.zeros(len(parents), num_tokens, words, dtype=torch.int32)
    for b, row in enumerate(parents):
        for i in range(num_tokens):
            packed = [0] * words
            for j in ancestors(row, i):
                packed[j // 32] |= 1 << (j % 32)
            mask[b, i] = torch.tensor([w - (1 << 32) if w >= 1 << 31 else w for w in packed], dtype=torch.int32)
    return mask


def paged(lengths, num_tokens, page_size, widths, dtype, spare_pages=3):
    """Caches full of NaN but for the committed slots, and a table of shuffled pages: (caches, table)."""
    pages_per_row = max((length + num_tokens + page_size - 1) // page_size for length in lengths)
    num_pages = 1 + len(lengths) * pages_per_row + spare_pages
    pages = random.sample(range(1, num_pages), len(lengths) * pages_per_row)
    table = torch.tensor(pages, dtype=torch.int32).view(len(lengths), pages_per_row)
    caches = [torch.full((num_pages, page_size, *width), NAN, dtype=dtype) for width in widths]
    for b, length in enumerate(lengths):
        for s in range(length):
            for cache in caches:
                cache[table[b, s // page_size], s % page_size] = torch.randn(cache.shape[2:], dtype=dtype)
    return caches, table


def check_written(before, after, new, table, lengths):
    """Exactly the window's slots changed, and they hold ``new`` [B, N, ...]."""
    expected, page_size = before.clone(), before.shape[1]
    for b, length in enumerate(lengths):
        for i in range(new.shape[1]):
            expected[table[b, (length + i) // page_size], (length + i) % page_size] = new[b, i].to(before.dtype)
    torch.testing.assert_close(after, expected, rtol=0, atol=0, equal_nan=True)


def decode_inputs(lengths, num_tokens, heads, kv_heads, dim, v_dim, page_size, dtype):
    batch = len(lengths)
    (k_cache, v_cache), table = paged(lengths, num_tokens, page_size, [(kv_heads, dim), (kv_heads, v_dim)], dtype)
    q = torch.randn(batch, num_tokens, heads, dim, dtype=dtype)
    k = torch.randn(batch, num_tokens, kv_heads, dim, dtype=dtype)
    v = torch.randn(batch, num_tokens, kv_heads, v_dim, dtype=dtype)
    return q, k, v, k_cache, v_cache, table, torch.tensor(lengths, dtype=torch.int32)


# ----------------------------------------------------------------------------------------------------------------------
# attention


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("window", [0, 1, 5], ids=lambda w: f"window{w}")
@pytest.mark.parametrize("softcap,with_sinks", [(0.0, False), (2.0, False), (0.0, True), (3.0, True)])
def test_attention(tree, window, softcap, with_sinks):
    lengths, num_tokens = [0, random.randrange(1, 7), 13], 6
    args = decode_inputs(lengths, num_tokens, 6, 2, 8, 5, 4, torch.float64)
    parents = [random_parents(num_tokens) if tree else chain_parents(num_tokens) for _ in lengths]
    sinks = torch.randn(6, dtype=torch.float64) if with_sinks else None
    q, k, v, k_cache, v_cache, table, cache_len = args
    scale = random.uniform(0.2, 1.0)
    before = k_cache.clone(), v_cache.clone()
    expected = naive_decode(q, k, v, *before, table, lengths, parents, scale, window, softcap, sinks)

    out = attention(*args, pack_tree(parents) if tree else None, scale, window, softcap, sinks)

    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    check_written(before[0], k_cache, k, table, lengths)
    check_written(before[1], v_cache, v, table, lengths)
    assert cache_len.tolist() == lengths


@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 40])
def test_tree_masks_of_several_words(num_tokens):
    lengths = [3, 9]
    args = decode_inputs(lengths, num_tokens, 2, 1, 4, 4, 16, torch.float64)
    # Row 0 is a chain, so that its last tokens use every bit, the sign bit included.
    parents = [chain_parents(num_tokens), random_parents(num_tokens)]
    expected = naive_decode(*args[:3], args[3].clone(), args[4].clone(), args[5], lengths, parents, 0.5, 0, 0.0, None)
    out = attention(*args, pack_tree(parents), 0.5, 0, 0.0, None)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_a_tree_that_is_a_chain_equals_no_tree():
    lengths = [2, 8]
    args = decode_inputs(lengths, 5, 4, 4, 8, 8, 4, torch.float32)
    chain = attention(*args, None, 0.3, 4, 0.0, None)
    tree = attention(*args, pack_tree([chain_parents(5)] * 2), 0.3, 4, 0.0, None)
    torch.testing.assert_close(chain, tree, rtol=0, atol=0)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_attention_in_lower_precision(dtype, tolerance):
    lengths = [4, 11]
    args = decode_inputs(lengths, 3, 4, 2, 16, 16, 8, dtype)
    parents = [chain_parents(3)] * 2
    expected = naive_decode(*args[:3], args[3].clone(), args[4].clone(), args[5], lengths, parents, 0.25, 0, 0.0, None)
    out = attention(*args, None, 0.25, 0, 0.0, None)
    assert out.dtype == dtype and out.is_contiguous()
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


def test_padding_rows_touch_only_page_zero():
    lengths = [5, 7]
    q, k, v, k_cache, v_cache, table, cache_len = decode_inputs(lengths, 3, 2, 2, 4, 4, 4, torch.float64)
    parents = [chain_parents(3)] * 2
    before = k_cache.clone(), v_cache.clone()
    expected = naive_decode(q, k, v, *before, table, lengths, parents, 0.5, 0, 0.0, None)

    def pad(x):
        return torch.cat([x, torch.full_like(x[:1], NAN).expand(2, *x.shape[1:])])

    table = torch.cat([table, torch.zeros(2, table.shape[1], dtype=torch.int32)])
    cache_len = torch.cat([cache_len, torch.zeros(2, dtype=torch.int32)])
    out = attention(pad(q), pad(k), pad(v), k_cache, v_cache, table, cache_len, None, 0.5, 0, 0.0, None)
    torch.testing.assert_close(out[:2], expected, rtol=1e-10, atol=1e-10)
    check_written(before[0][1:], k_cache[1:], k, table[:2] - 1, lengths)
    check_written(before[1][1:], v_cache[1:], v, table[:2] - 1, lengths)


def test_attention_takes_projections_that_are_not_contiguous():
    """q, k and v are views of one fused projection in several models."""
    lengths = [3, 6]
    args = decode_inputs(lengths, 4, 4, 2, 8, 8, 4, torch.float64)
    fused = torch.cat([x.flatten(2) for x in args[:3]], -1)  # [B, N, (Hq + 2 Hkv) * D]
    q, k, v = (x.unflatten(-1, (-1, 8)) for x in fused.split([32, 16, 16], -1))
    assert not q.is_contiguous()
    caches = args[3].clone(), args[4].clone()
    expected = attention(*args, None, 0.5, 0, 0.0, None)
    out = attention(q, k, v, *caches, *args[5:], None, 0.5, 0, 0.0, None)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(caches[0], args[3], rtol=0, atol=0, equal_nan=True)


# ----------------------------------------------------------------------------------------------------------------------
# mla_attention


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_mla_attention(tree):
    lengths, num_tokens, latent_dim, rope_dim = [0, 3, 10], 5, 6, 2
    (cache,), table = paged(lengths, num_tokens, 4, [(latent_dim + rope_dim,)], torch.float64)
    q = torch.randn(3, num_tokens, 4, latent_dim + rope_dim, dtype=torch.float64)
    kv = torch.randn(3, num_tokens, latent_dim + rope_dim, dtype=torch.float64)
    parents = [random_parents(num_tokens) if tree else chain_parents(num_tokens) for _ in lengths]
    before = cache.clone()
    as_keys, as_values = before[:, :, None], before[:, :, None, :latent_dim]
    k, v = kv[:, :, None], kv[:, :, None, :latent_dim]
    expected = naive_decode(q, k, v, as_keys, as_values, table, lengths, parents, 0.4, 0, 0.0, None)

    mask = pack_tree(parents) if tree else None
    out = mla_attention(q, kv, cache, table, torch.tensor(lengths, dtype=torch.int32), mask, 0.4, latent_dim)

    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    check_written(before, cache, kv, table, lengths)


# ----------------------------------------------------------------------------------------------------------------------
# prefill


def naive_prefill(q, k, v, starts, scale, window, softcap, sinks):
    group = q.shape[1] // k.shape[1]
    out = torch.zeros(*q.shape[:2], v.shape[2], dtype=torch.float64)
    for start, end in itertools.pairwise(starts):
        for i in range(start, end):
            first = max(start, i - window + 1) if window else start
            for h in range(q.shape[1]):
                keys, values = k[first : i + 1, h // group], v[first : i + 1, h // group]
                sink = float(sinks[h]) if sinks is not None else None
                out[i, h] = naive_query(q[i, h], keys, values, scale, softcap, sink)
    return out


def prompt_layout(prompt_lengths):
    starts = [0]
    for length in prompt_lengths:
        starts.append(starts[-1] + length)
    return starts, torch.tensor(starts, dtype=torch.int32)


@pytest.mark.parametrize("window,softcap,with_sinks", [(0, 0.0, False), (3, 0.0, False), (0, 2.0, True), (4, 2.0, True)])
def test_prefill_attention(window, softcap, with_sinks):
    prompts = [1, random.randrange(2, 9), 4, 11]
    starts, cu_seqlens = prompt_layout(prompts)
    total = starts[-1]
    (k_cache, v_cache), table = paged([0] * 4, 12, 4, [(2, 8), (2, 5)], torch.float64)
    q, k, v = (torch.randn(total, h, d, dtype=torch.float64) for h, d in [(6, 8), (2, 8), (2, 5)])
    sinks = torch.randn(6, dtype=torch.float64) if with_sinks else None
    expected_k, expected_v = k_cache.clone(), v_cache.clone()
    for b, (start, length) in enumerate(zip(starts, prompts, strict=False)):
        for s in range(max(0, length - window) if window else 0, length):
            expected_k[table[b, s // 4], s % 4] = k[start + s]
            expected_v[table[b, s // 4], s % 4] = v[start + s]

    out = prefill_attention(q, k, v, k_cache, v_cache, table, cu_seqlens, 0.35, window, softcap, sinks)

    expected = naive_prefill(q, k, v, starts, 0.35, window, softcap, sinks)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(k_cache[1:], expected_k[1:], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(v_cache[1:], expected_v[1:], rtol=0, atol=0, equal_nan=True)


def test_mla_prefill_attention():
    prompts = [3, 1, 7]
    starts, cu_seqlens = prompt_layout(prompts)
    (cache,), table = paged([0] * 3, 8, 4, [(6,)], torch.float64)
    q, kv = torch.randn(starts[-1], 4, 6, dtype=torch.float64), torch.randn(starts[-1], 6, dtype=torch.float64)
    expected_cache = cache.clone()
    for b, (start, length) in enumerate(zip(starts, prompts, strict=False)):
        for s in range(length):
            expected_cache[table[b, s // 4], s % 4] = kv[start + s]

    out = mla_prefill_attention(q, kv, cache, table, cu_seqlens, 0.35, 4)

    expected = naive_prefill(q, kv[:, None], kv[:, None, :4], starts, 0.35, 0, 0.0, None)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(cache, expected_cache, rtol=0, atol=0, equal_nan=True)


def test_prefill_then_decode_equals_one_long_prefill():
    """What prefill leaves in the cache is what decoding reads."""
    length, num_tokens = 9, 4
    q, k, v = (torch.randn(length + num_tokens, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    (k_cache, v_cache), table = paged([0], length + num_tokens, 4, [(2, 8), (2, 8)], torch.float64)
    layout = torch.tensor([0, length], dtype=torch.int32)
    prefill_attention(q[:length], k[:length], v[:length], k_cache, v_cache, table, layout, 0.5, 0, 0.0, None)
    window = [x[length:][None] for x in (q, k, v)]
    out = attention(*window, k_cache, v_cache, table, torch.tensor([length], dtype=torch.int32), None, 0.5, 0, 0.0, None)
    expected = naive_prefill(q, k, v, [0, length + num_tokens], 0.5, 0, 0.0, None)
    torch.testing.assert_close(out[0], expected[length:], rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------------------
# Registration: schema, fake strides, mutation, tracing


def test_opcheck():
    args = decode_inputs([2, 5], 3, 4, 2, 8, 6, 4, torch.float32)
    for cache in args[3:5]:
        cache.nan_to_num_(0.0)
    q, _, _, k_cache, _, table, cache_len = args
    sinks, tree = torch.randn(4), pack_tree([random_parents(3) for _ in range(2)])
    opcheck(attention, (*args, None, 0.5, 0, 0.0, None))
    opcheck(attention, (*args, tree, 0.5, 3, 2.0, sinks))
    latent_cache, latent = k_cache[:, :, 0].contiguous(), torch.randn(2, 3, 8)
    opcheck(mla_attention, (q, latent, latent_cache, table, cache_len, None, 0.5, 6))
    opcheck(mla_attention, (q, latent, latent_cache, table, cache_len, tree, 0.5, 6))
    packed = [x.flatten(0, 1) for x in args[:3]]
    layout = torch.tensor([0, 2, 6], dtype=torch.int32)
    opcheck(prefill_attention, (*packed, *args[3:5], table, layout, 0.5, 2, 2.0, sinks))
    opcheck(mla_prefill_attention, (packed[0], latent.flatten(0, 1), latent_cache, table, layout, 0.5, 6))
