"""commit_tokens against a list that tokens are appended to: what is written, where it is cut, what stands still."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from spec_compile.ops.accept import FINISHED, GOING_ON, NO_DISTRIBUTION, commit_tokens

pytestmark = pytest.mark.usefixtures("fresh_seed")


def int32(values):
    return torch.tensor(values, dtype=torch.int32)


def commit_by_hand(text, finished, emitted, count, end, capacity, eos):
    """One row as a list: (text, finished, appended)."""
    if finished:
        return text, True, 0
    start, end = len(text), min(end, capacity)
    for token in emitted[:count]:
        if len(text) >= end:
            break
        text = [*text, token]
        if token in eos:
            finished = True
            break
    return text, finished or len(text) >= end, len(text) - start


def test_commit_against_a_loop():
    capacity, num_tokens, batch = 16, 5, 400
    cache_len = torch.randint(0, capacity, (batch,), dtype=torch.int32)
    finished = torch.rand(batch) < 0.2
    tokens = torch.randint(2, 12, (batch, capacity))
    emitted = torch.randint(0, 12, (batch, num_tokens))
    count = torch.randint(0, num_tokens + 1, (batch,), dtype=torch.int32)
    end_len = torch.randint(1, capacity + 8, (batch,), dtype=torch.int32)
    eos_ids = torch.tensor([3, -1, 7])
    before = tokens.clone(), cache_len.clone(), finished.clone()

    appended, status = commit_tokens(tokens, cache_len, finished, emitted, count, end_len, eos_ids)

    assert appended.dtype == status.dtype == torch.int32
    cuts = set()
    for b in range(batch):
        known = int(before[1][b]) + 1
        text, ended, length = commit_by_hand(
            before[0][b, :known].tolist(),
            bool(before[2][b]),
            emitted[b].tolist(),
            int(count[b]),
            int(end_len[b]),
            capacity,
            {3, 7},
        )
        assert int(appended[b]) == length and bool(finished[b]) == ended
        assert int(status[b]) == (FINISHED if ended else GOING_ON)
        assert int(cache_len[b]) == len(text) - 1
        assert tokens[b, : len(text)].tolist() == text
        assert tokens[b, len(text) :].equal(before[0][b, len(text) :])
        cuts.add((length, int(count[b]), ended))
    assert len(cuts) > 20  # the random rows did cover the branches


def commit_one(tokens, cache_len, emitted, count, end_len, eos, finished=False):
    tokens, cache_len, finished = torch.tensor([tokens]), int32([cache_len]), torch.tensor([finished])
    appended, _ = commit_tokens(
        tokens, cache_len, finished, torch.tensor([emitted]), int32([count]), int32([end_len]), torch.tensor(eos)
    )
    return tokens[0].tolist(), int(cache_len), bool(finished), int(appended)


def test_commit_appends_behind_the_root():
    result = commit_one([1, 2, 0, 0, 0, 0], 1, [5, 6, 7], 2, 6, [9])
    assert result == ([1, 2, 5, 6, 0, 0], 3, False, 2)


def test_commit_cuts_behind_the_first_eos():
    result = commit_one([1, 0, 0, 0, 0, 0], 0, [5, 9, 9, 7], 4, 6, [9, -1])
    assert result == ([1, 5, 9, 0, 0, 0], 2, True, 2)


def test_an_eos_behind_the_accepted_tokens_does_not_count():
    assert commit_one([1, 0, 0, 0, 0, 0], 0, [5, 6, 9], 2, 6, [9]) == ([1, 5, 6, 0, 0, 0], 2, False, 2)


def test_commit_stops_at_end_len():
    assert commit_one([1, 2, 0, 0, 0, 0], 1, [5, 6, 7], 3, 4, [9]) == ([1, 2, 5, 6, 0, 0], 3, True, 2)
    assert commit_one([1, 2, 0, 0, 0, 0], 1, [5, 6, 7], 3, 5, [9]) == ([1, 2, 5, 6, 7, 0], 4, True, 3)
    assert commit_one([1, 2, 0, 0, 0, 0], 1, [5, 6, 7], 3, 6, [9]) == ([1, 2, 5, 6, 7, 0], 4, False, 3)
    assert commit_one([1, 2, 0, 0, 0, 0], 1, [5, 6, 7], 3, 2, [9]) == ([1, 2, 0, 0, 0, 0], 1, True, 0)


def test_commit_never_leaves_the_buffer():
    assert commit_one([1, 2, 3, 0], 2, [5, 6, 7], 3, 99, [9]) == ([1, 2, 3, 5], 3, True, 1)
    assert commit_one([1, 2, 3, 4], 3, [5, 6, 7], 3, 99, [9]) == ([1, 2, 3, 4], 3, True, 0)


def test_a_finished_row_is_frozen():
    assert commit_one([1, 2, 0, 0], 1, [5, 6], 2, 4, [9], finished=True) == ([1, 2, 0, 0], 1, True, 0)


def test_padding_ids_match_no_token():
    """A draft may mark what it does not know with -1; that is no end of the text."""
    assert commit_one([1, 0, 0], 0, [-1, 6], 2, 3, [-1, -1])[3] == 2


@pytest.mark.parametrize("tree", [False, True])
def test_a_row_stops_before_a_token_without_a_distribution(tree):
    """Unless it ended before, by a token or its length, or the place lies behind what counts."""
    slot_probs = torch.rand(7, 5)
    slot_probs[:, 1], slot_probs[1, 0] = float("nan"), float("nan")
    path = None
    if tree:  # slot j of the path lies elsewhere in the window
        path = int32([[0, 3, 1]] * 7)
        slot_probs = slot_probs[:, [0, 2, 4, 1, 3]]
    tokens, emitted = torch.zeros(7, 8, dtype=torch.int64), torch.tensor([[5, 7, 6]] * 7)
    emitted[2, 0] = 9
    finished = torch.tensor([False] * 6 + [True])
    cache_len, length, end_len = int32([0] * 7), int32([3, 3, 3, 1, 3, 2, 3]), int32([8, 8, 8, 8, 2, 8, 8])
    args = tokens, cache_len, finished, emitted, length, end_len, torch.tensor([9, -1]), slot_probs, path
    opcheck(commit_tokens, [x.clone() if isinstance(x, torch.Tensor) else x for x in args])
    count, status = commit_tokens(*args)
    assert count.tolist() == [1, 0, 1, 1, 1, 1, 0] == cache_len.tolist()
    assert status.tolist() == [NO_DISTRIBUTION, NO_DISTRIBUTION, FINISHED, GOING_ON, FINISHED, NO_DISTRIBUTION, FINISHED]
    assert finished.tolist() == [True, True, True, False, True, True, True]
    assert tokens[:, :2].tolist() == [[0, 5], [0, 0], [0, 9], [0, 5], [0, 5], [0, 5], [0, 0]] and not tokens[:, 2:].any()


def test_opcheck():
    state = torch.randint(9, (3, 20)), int32([3, 18, 19]), torch.tensor([False, False, True])
    emitted = torch.randint(11, (3, 4))
    opcheck(commit_tokens, (*state, emitted, int32([4, 4, 4]), int32([20] * 3), torch.tensor([2, -1])))
