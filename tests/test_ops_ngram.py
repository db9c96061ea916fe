"""ngram_propose against string searching in a Python list."""

from __future__ import annotations

import random

import pytest
import torch
from torch.library import opcheck

from spec_compile.ops.ngram import ngram_propose

pytestmark = pytest.mark.usefixtures("fresh_seed")


def propose_by_hand(text, num_steps, min_ngram, max_ngram):
    """One row as a list: (draft, matched length)."""
    for n in range(max_ngram, min_ngram - 1, -1):
        for start in range(len(text) - n - 1, -1, -1):  # most recent first, the suffix itself excluded
            if n <= len(text) and text[start : start + n] == text[-n:]:
                draft, position = [], start + n
                for _ in range(num_steps):
                    draft.append((text + draft)[position])
                    position += 1
                return draft, n
    return [text[-1]] * num_steps, 0


def propose(texts, num_steps, min_ngram, max_ngram, capacity=None):
    """Rows of unlike lengths in one buffer; the unused slots hold tokens that would match."""
    capacity = capacity or max(len(text) for text in texts)
    tokens = torch.randint(0, 3, (len(texts), capacity))
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor(text)
    cache_len = torch.tensor([len(text) - 1 for text in texts], dtype=torch.int32)
    before = tokens.clone()
    draft, length = ngram_propose(tokens, cache_len, num_steps, min_ngram, max_ngram)
    assert draft.dtype == torch.int64 and length.dtype == torch.int32 and tokens.equal(before)
    return list(zip(draft.tolist(), length.tolist(), strict=True))


@pytest.mark.parametrize("vocab", [2, 3, 8, 40])
@pytest.mark.parametrize("min_ngram,max_ngram", [(1, 1), (1, 3), (2, 3), (3, 6)])
def test_against_a_loop(vocab, min_ngram, max_ngram):
    texts = [[random.randrange(vocab) for _ in range(random.randrange(1, 60))] for _ in range(300)]
    expected = [propose_by_hand(text, 5, min_ngram, max_ngram) for text in texts]
    assert propose(texts, 5, min_ngram, max_ngram, capacity=70) == expected
    if vocab == 8 and min_ngram == 1:
        assert {length for _, length in expected} == set(range(max_ngram + 1))  # the branches were met


def test_continues_the_match():
    assert propose([[9, 1, 2, 3, 4, 5, 1, 2]], 3, 1, 3) == [([3, 4, 5], 2)]


def test_the_longest_match_beats_a_more_recent_one():
    assert propose([[1, 2, 7, 9, 2, 8, 1, 2]], 1, 1, 3) == [([7], 2)]


def test_the_most_recent_of_equal_matches_wins():
    assert propose([[1, 2, 7, 1, 2, 8, 3, 1, 2]], 1, 1, 3) == [([8], 2)]


def test_matches_longer_than_max_ngram_count_as_max_ngram():
    assert propose([[5, 1, 2, 7, 6, 1, 2, 8, 5, 1, 2]], 1, 1, 2) == [([8], 2)]


def test_repeating_text_is_drafted_to_any_depth():
    assert propose([[4, 1, 2, 3, 1, 2, 3]], 8, 1, 3) == [([1, 2, 3, 1, 2, 3, 1, 2], 3)]
    assert propose([[4, 4, 4]], 5, 1, 3) == [([4] * 5, 2)]


def test_no_match_repeats_the_root():
    assert propose([[1, 2, 3, 4]], 3, 1, 3) == [([4, 4, 4], 0)]
    assert propose([[6]], 3, 1, 3) == [([6, 6, 6], 0)]


def test_too_short_a_match_does_not_count():
    assert propose([[1, 5, 2, 1]], 2, 2, 3) == [([1, 1], 0)]


def test_text_behind_the_known_tokens_is_not_read():
    tokens = torch.tensor([[1, 2, 3, 9, 9, 3, 8, 8]])
    draft, length = ngram_propose(tokens, torch.tensor([2], dtype=torch.int32), 2, 1, 3)
    assert draft.tolist() == [[3, 3]] and length.tolist() == [0]


def test_rows_do_not_depend_on_their_batch():
    texts = [[random.randrange(4) for _ in range(random.randrange(1, 300))] for _ in range(8)]
    together = propose(texts, 4, 1, 4, capacity=300)
    assert together == [propose([text], 4, 1, 4, capacity=300)[0] for text in texts]


def test_opcheck():
    tokens = torch.randint(4, (3, 30))
    opcheck(ngram_propose, (tokens, torch.tensor([0, 12, 29], dtype=torch.int32), 5, 1, 3))
