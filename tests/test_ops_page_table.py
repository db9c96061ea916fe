"""Rings of pages for sliding-window layers: which pages a row's positions lie in, and that attention over a ring is attention
over the whole text, whatever rounds wrote and refused on the way."""

from __future__ import annotations

import random

import pytest
import torch
from torch.library import opcheck

from spec_compile.ops.attention import append_window, attention, prefill_attention
from spec_compile.ops.kv_cache import kv_commit
from spec_compile.ops.page_table import MOST_AHEAD, ring_page_table, ring_pages


def pool_table(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(1, rows * columns + 1, dtype=torch.int32).view(rows, columns)


def test_columns_go_round_a_rows_pages() -> None:
    table = pool_table(4, 7)[[2, 0, 3]]
    table[1] = 0  # a padding row
    assert ring_page_table(table, 3).tolist() == [
        [7, 8, 9, 7, 8, 9, 7],
        [0, 0, 0, 0, 0, 0, 0],
        [10, 11, 12, 10, 11, 12, 10],
    ]
    assert torch.equal(ring_page_table(table, 7), table)
    assert torch.equal(ring_page_table(pool_table(9, 7)[:, ::1], 7), pool_table(9, 7))


def test_opcheck() -> None:
    opcheck(ring_page_table, (pool_table(3, 5), 2))


@pytest.mark.parametrize(("window", "page_size"), [(1, 16), (128, 64), (1024, 64), (4096, 256)])
def test_a_ring_holds_the_window_and_all_that_a_round_may_write(window: int, page_size: int) -> None:
    pages = ring_pages(window, page_size, 10_000)
    assert pages * page_size >= window + MOST_AHEAD > (pages - 1) * page_size
    assert ring_pages(window, page_size, 1) == 1 and ring_pages(0, page_size, 77) == 77


@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_attention_over_a_ring_is_attention_over_the_whole_text(tree: bool) -> None:
    """Prompts longer than the ring, then rounds that keep a random part of what they wrote, several times round it; it
    holds the window and one round, no more."""
    window, page_size, num_tokens, columns = 9, 4, 6, 40
    ring = -(-(window + num_tokens) // page_size)
    whole, lengths = pool_table(2, columns), [37, 3]
    round_table = ring_page_table(whole, ring)
    shape = (page_size, 1, 8)
    big = [torch.zeros(2 * columns + 1, *shape, dtype=torch.float64) for _ in range(2)]
    small = [torch.zeros(2 * ring + 1, *shape, dtype=torch.float64) for _ in range(2)]

    def new(*lead: int) -> list[torch.Tensor]:
        return [torch.randn(*lead, heads, 8, dtype=torch.float64) for heads in (2, 1, 1)]

    bounds = torch.tensor([0, 37, 40], dtype=torch.int32)
    prompt = new(40)
    tail = (0.35, window, 0.0, None)
    assert torch.equal(
        prefill_attention(*prompt, *big, whole, bounds, *tail), prefill_attention(*prompt, *small, round_table, bounds, *tail)
    )
    for _ in range(25):
        cache_len = torch.tensor(lengths, dtype=torch.int32)
        mask = None
        path = torch.arange(num_tokens, dtype=torch.int32).repeat(2, 1)
        keep = [random.randrange(1, num_tokens + 1) for _ in range(2)]
        if tree:  # two branches behind the root: the odd tokens and the even ones
            bits = [1, 0b11, 0b101, 0b1011, 0b10101, 0b101011]
            mask = torch.tensor(bits, dtype=torch.int32).view(1, -1, 1).expand(2, -1, -1).contiguous()
            keep = [random.randrange(1, 4) for _ in range(2)]
            path = torch.tensor([[0, 2, 4, -1, -1, -1], [0, 1, 3, -1, -1, -1]], dtype=torch.int32)
        step = new(2, num_tokens)
        expected = attention(*step, *big, whole, cache_len, mask, *tail)
        assert torch.equal(attention(*step, *small, round_table, cache_len, mask, *tail), expected)
        kv_commit(big, whole, cache_len, path)
        kv_commit(small, round_table, cache_len, path)
        lengths = [length + count for length, count in zip(lengths, keep, strict=True)]
        if max(lengths) > columns * page_size - num_tokens:
            break


def test_a_ring_too_small_for_a_round_is_found() -> None:
    """The control: one page less than the window and the round need, and a refused draft lies where the window looks."""
    window, page_size, num_tokens = 9, 4, 6
    whole, cache_len = pool_table(1, 10), torch.tensor([20], dtype=torch.int32)
    cache = {ring: torch.zeros(ring + 1, page_size, 1, 1) for ring in (3, 4)}
    for ring, pages in cache.items():
        table = ring_page_table(whole, ring)
        append_window(torch.arange(20.0).view(1, 20, 1, 1)[:, 20 - window :], pages, table, cache_len - window)
        append_window(-torch.ones(1, num_tokens, 1, 1), pages, table, cache_len)
        slots = torch.arange(20 - window + 1, 20)
        held = pages[table[0, slots // page_size].long(), slots % page_size].flatten()
        assert torch.equal(held, slots.float()) == (ring == 4)
