"""How cascade attention cuts a row's prefix: which slots its bulk has, and how many pages a fold of it can hold.

Apart from ``ops/cascade.py``, because its kernels need it too.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bulk_range(cache_len: Tensor, num_tokens: int, page_size: int, window: int) -> tuple[Tensor, Tensor]:
    """(first slot, end) of the slots of each row that every window token sees: two int64 [B]; pages are cut at the end only.

    No token stands more than ``num_tokens - 1`` positions behind the first, so a sliding window shows every token what
    lies less than ``window - num_tokens + 1`` slots before the first.
    """
    end = cache_len.long()
    if window == 0:
        return torch.zeros_like(end), end
    first = (end + num_tokens - window).clamp(min=0)
    return torch.minimum((first + page_size - 1) // page_size * page_size, end), end


def folded_columns(columns: int, folds: int, page_size: int, window: int) -> int:
    """Columns of a folded page table: the most pages one fold can hold."""
    pages = columns if window == 0 else min(columns, window // page_size + 2)
    return -(-pages // folds)
