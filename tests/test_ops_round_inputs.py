"""round_inputs and extend_inputs against plain Python, row by row."""

from __future__ import annotations

import pytest
import torch

from spec_compile.ops import round_inputs as ops

CAPACITY = 20


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """tokens, cache_len, end_len: ragged rows, one at its end, one padding row."""
    tokens = torch.randint(0, 1000, (4, CAPACITY))
    return tokens, torch.tensor([5, 0, 17, 0], dtype=torch.int32), torch.tensor([19, 3, 18, 0], dtype=torch.int32)


@pytest.mark.parametrize("num_tokens", [1, 6])
def test_round_inputs(num_tokens: int):
    tokens, cache_len, end_len = rows()
    root, position_ids, lens = ops.round_inputs(tokens, cache_len, end_len, num_tokens)
    for row in range(4):
        length, last = int(cache_len[row]), max(int(end_len[row]) - 1, 0)
        assert root[row].tolist() == [int(tokens[row, length])]
        assert position_ids[row].tolist() == [min(length + j, last) for j in range(num_tokens)]
        assert lens[:, row].tolist() == [length + j for j in range(num_tokens)]
    assert (root.dtype, position_ids.dtype, lens.dtype) == (torch.int64, torch.int64, torch.int32)
    cache_len += 3
    assert int(lens[0, 0]) == 5, "a copy: the commit advances cache_len in place"


@pytest.mark.parametrize("num_tokens", [1, 6, 32])
def test_extend_inputs(num_tokens: int):
    tokens, start, end_len = rows()
    count = torch.tensor([3, 1, 0, 0], dtype=torch.int32)
    input_ids, position_ids, newest = ops.extend_inputs(tokens, start, count, end_len, num_tokens)
    for row in range(4):
        first, last = int(start[row]), max(int(end_len[row]) - 1, 0)
        expected = [int(tokens[row, min(first + 1 + j, CAPACITY - 1)]) for j in range(num_tokens)]
        assert input_ids[row].tolist() == expected
        assert position_ids[row].tolist() == [min(first + j, last) for j in range(num_tokens)]
        assert newest[row].tolist() == [max(int(count[row]) - 1, 0)]
    assert (input_ids.dtype, position_ids.dtype, newest.dtype) == (torch.int64,) * 3


def test_opcheck():
    tokens, cache_len, end_len = rows()
    torch.library.opcheck(ops.round_inputs, (tokens, cache_len, end_len, 4))
    torch.library.opcheck(ops.extend_inputs, (tokens, cache_len, torch.ones_like(cache_len), end_len, 4))
