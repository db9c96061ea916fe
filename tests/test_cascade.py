"""Cascade attention: which slots the folds hold, by brute force, and that the parts merge to plain attention."""

from __future__ import annotations

import random

import pytest
import torch
from attention_contract import random_trees
from fa4_in_torch import flash_attn_fwd
from torch import Tensor

from spec_compile.ops import attention as generic
from spec_compile.ops import cascade

pytestmark = pytest.mark.usefixtures("fresh_seed")


def int32(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ----------------------------------------------------------------------------------------------------------------------
# Folding


def folded_slots(table: Tensor, lengths: Tensor, page_size: int) -> list[set[int]]:
    """Cache slots (page * page_size + offset) of each pseudo row."""
    rows = []
    for pages, length in zip(table.tolist(), lengths.tolist(), strict=True):
        assert all(page == 0 for page in pages[-(-length // page_size) :]), "columns behind the last page name the null page"
        rows.append({pages[i // page_size] * page_size + i % page_size for i in range(length)})
        assert len(rows[-1]) == length
    return rows


@pytest.mark.parametrize("window", [0, 1, 7, 16, 40])
@pytest.mark.parametrize("folds", [1, 2, 3, 8])
def test_folds_hold_exactly_the_slots_that_every_token_sees(folds: int, window: int):
    page_size, columns, num_tokens = random.choice([1, 4, 8]), 12, random.randrange(1, 6)
    lengths = [0, 1, *(random.randrange(page_size * columns - num_tokens) for _ in range(6))]
    page_table = (torch.randperm(len(lengths) * columns) + 1).view(-1, columns).to(torch.int32)

    table, folded = cascade.fold_prefix(page_table, int32(lengths), folds, num_tokens, page_size, window)

    assert table.dtype == folded.dtype == torch.int32 and table.is_contiguous()
    assert table.shape == (len(lengths) * folds, cascade.folded_columns(columns, folds, page_size, window))
    rows = folded_slots(table, folded, page_size)
    for b, length in enumerate(lengths):
        own = rows[b * folds : (b + 1) * folds]
        held = set().union(*own)
        assert sum(map(len, own)) == len(held), "no slot twice"
        slots = generic.cache_slots(page_table[b : b + 1], page_size)[0].tolist()
        last_token = length + num_tokens - 1  # the deepest a token of the window can stand
        seen = [slot for slot in range(length) if window == 0 or last_token - slot < window]
        must = {slots[s] for s in seen}
        assert held <= must
        # What is left out is less than a page, at the front of a sliding window.
        pages = {s // page_size for s in seen if slots[s] not in held}
        assert pages <= ({seen[0] // page_size} if window and seen else set())
        sizes = sorted(len(row) for row in own)
        assert sizes[-1] - sizes[0] <= page_size, "pages are dealt out in turns"


def test_folding_does_not_look_behind_the_table():
    """A finished row stands at its limit; its window hangs over, its prefix does not."""
    table, length = cascade.fold_prefix(int32([[3, 5]]), int32([8]), 2, 4, 4, 0)
    assert table.tolist() == [[3], [5]] and length.tolist() == [4, 4]


# ----------------------------------------------------------------------------------------------------------------------
# The parts together


def attend_with_lse_by_hand(q, k, v, visible, scale, softcap):
    out, lse = torch.zeros(*q.shape[:3], v.shape[3]), torch.full(q.shape[:3], float("-inf"))
    group = q.shape[2] // k.shape[2]
    for b, n, h in torch.cartesian_prod(*[torch.arange(size) for size in q.shape[:3]]).tolist():
        seen = visible[b, n].nonzero()[:, 0]
        scores = k[b, seen, h // group] @ q[b, n, h] * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        if len(seen):
            out[b, n, h] = torch.softmax(scores, 0) @ v[b, seen, h // group]
            lse[b, n, h] = scores.exp().sum().log()
    return out, lse


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_attend_with_lse(softcap: float):
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 6)
    visible = torch.rand(2, 3, 9) < 0.5
    visible[0, 1], visible[:, :, 4] = False, False
    k[:, 4], v[:, 4] = float("nan"), float("nan")
    out, lse = cascade.attend_with_lse(q, k, v, visible, 0.4, softcap)
    expected, expected_lse = attend_with_lse_by_hand(q, k, v, visible, 0.4, softcap)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("tree", [False, True])
@pytest.mark.parametrize("window,softcap,sinks", [(0, 0.0, False), (0, 3.0, True), (9, 0.0, True), (33, 0.0, False)])
@pytest.mark.parametrize("folds", [1, 3])
def test_folds_and_the_rest_make_plain_attention(folds, window, softcap, sinks, tree):
    page_size, columns, num_tokens, lengths = 8, 9, 5, [random.randrange(64), 0, 8, random.randrange(16, 64)]
    batch = len(lengths)
    page_table = (torch.randperm(batch * columns) + 1).view(batch, columns).to(torch.int32)
    caches = [torch.full((batch * columns + 1, page_size, 2, dim), float("nan"), dtype=torch.float64) for dim in (8, 6)]
    for row, length in enumerate(lengths):
        slots = generic.cache_slots(page_table[row : row + 1], page_size)[0, :length]
        for cache in caches:
            cache.flatten(0, 1)[slots] = torch.randn(length, *cache.shape[2:], dtype=torch.float64)
    new = [torch.randn(batch, num_tokens, heads, dim, dtype=torch.float64) for heads, dim in ((4, 8), (2, 8), (2, 6))]
    rows = (page_table, int32(lengths), random_trees(batch, num_tokens, "cpu") if tree else None)
    tail = (0.4, window, softcap, torch.randn(4, dtype=torch.float64) if sinks else None)
    expected_caches = [cache.clone() for cache in caches]
    expected = generic.attention(*new, *expected_caches, *rows, *tail)

    table, folded = cascade.fold_prefix(page_table, rows[1], folds, num_tokens, page_size, window)
    q = new[0].repeat_interleave(folds, 0)
    partial, lse = torch.empty(*q.shape[:3], 6, dtype=torch.float64), torch.empty(batch * folds, 4, num_tokens)
    flash_attn_fwd(q, *caches, seqused_k=folded, page_table=table, softmax_scale=0.4, softcap=softcap, out=partial, lse=lse)
    out = cascade.cascade_merge(*new, *caches, *rows, *tail, partial, lse)

    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # log-sum-exps are float32
    for cache, wanted in zip(caches, expected_caches, strict=True):
        torch.testing.assert_close(cache, wanted, rtol=0, atol=0, equal_nan=True)


def test_a_sink_counts_once_however_many_folds():
    """A row without keys but its own token: out = v * exp(s) / (exp(s) + exp(sink)), with one exp(sink)."""
    q, k, v = torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4), torch.full((1, 1, 1, 4), 3.0)
    caches = [torch.zeros(2, 4, 1, 4) for _ in range(2)]
    partial, lse = torch.full((4, 1, 1, 4), float("nan")), torch.full((4, 1, 1), float("-inf"))
    rows, tail = (int32([[1]]), int32([0]), None), (0.5, 0, 0.0, torch.tensor([1.0]))
    out = cascade.cascade_merge(q, k, v, *caches, *rows, *tail, partial, lse)
    weight = torch.tensor(2.0).exp() / (torch.tensor(2.0).exp() + torch.tensor(1.0).exp())
    torch.testing.assert_close(out, v * weight)
