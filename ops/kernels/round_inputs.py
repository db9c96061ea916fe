"""One program a row: what ``ops.round_inputs`` computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _round_inputs(
    tokens, cache_len, end_len, root, position_ids, lens, num_tokens, num_rows, stride_tokens, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    length = tl.load(cache_len + row)
    last = tl.maximum(tl.load(end_len + row) - 1, 0)
    tl.store(root + row, tl.load(tokens + row.to(tl.int64) * stride_tokens + length))
    slot = tl.arange(0, BLOCK)
    inside = slot < num_tokens
    tl.store(position_ids + row * num_tokens + slot, tl.minimum(length + slot, last).to(tl.int64), mask=inside)
    tl.store(lens + slot * num_rows + row, length + slot, mask=inside)


def round_inputs(tokens: Tensor, cache_len: Tensor, end_len: Tensor, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = tokens.shape[0]
    root = tokens.new_empty(batch, 1)
    position_ids = tokens.new_empty(batch, num_tokens)
    lens = cache_len.new_empty(num_tokens, batch)
    with torch.cuda.device_of(tokens):
        _round_inputs[(batch,)](
            tokens, cache_len.contiguous(), end_len.contiguous(), root, position_ids, lens, num_tokens, batch, tokens.stride(0),
            BLOCK=triton.next_power_of_2(num_tokens), num_warps=1,
        )  # fmt: skip
    return root, position_ids, lens


@triton.jit
def _extend_inputs(
    tokens, start, count, end_len, input_ids, position_ids, newest, num_tokens, capacity, stride_tokens, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    first = tl.load(start + row)
    last = tl.maximum(tl.load(end_len + row) - 1, 0)
    slot = tl.arange(0, BLOCK)
    inside = slot < num_tokens
    at = tl.minimum(first + slot + 1, capacity - 1)
    ids = tl.load(tokens + row.to(tl.int64) * stride_tokens + at, mask=inside, other=0)
    tl.store(input_ids + row * num_tokens + slot, ids, mask=inside)
    tl.store(position_ids + row * num_tokens + slot, tl.minimum(first + slot, last).to(tl.int64), mask=inside)
    tl.store(newest + row, tl.maximum(tl.load(count + row) - 1, 0).to(tl.int64))


def extend_inputs(
    tokens: Tensor, start: Tensor, count: Tensor, end_len: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    batch, capacity = tokens.shape
    input_ids, position_ids = tokens.new_empty(batch, num_tokens), tokens.new_empty(batch, num_tokens)
    newest = tokens.new_empty(batch, 1)
    with torch.cuda.device_of(tokens):
        _extend_inputs[(batch,)](
            tokens, start.contiguous(), count.contiguous(), end_len.contiguous(), input_ids, position_ids, newest, num_tokens,
            capacity, tokens.stride(0), BLOCK=triton.next_power_of_2(num_tokens), num_warps=1,
        )  # fmt: skip
    return input_ids, position_ids, newest
