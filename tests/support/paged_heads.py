"""Draft heads run op by op over real pages: what a captured program does, without compiling one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from spec_compile.hf_integration.attention_interface import capture_context
from spec_compile.hf_integration.capture_context import CaptureContext
from spec_compile.hf_integration.heads.draft_head import DraftHead

PAGE_SIZE = 4


@contextlib.contextmanager
def paged(head: DraftHead, batch: int, capacity: int) -> Iterator[CaptureContext]:
    """The capture context with real pages behind it, poisoned and shuffled; ``cache_len`` starts at 0 and is the caller's."""
    config = head.config
    pages = batch * capacity // PAGE_SIZE
    shape = (pages, PAGE_SIZE, config.num_key_value_heads, config.head_dim)
    with capture_context(head, batch) as context:
        order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
        context.positions = None  # no graph, so nothing reads windows off masks: they are the call's
        context.page_table = order.to(torch.int32).view(batch, -1)
        for layer in range(config.num_hidden_layers):
            for part in ("k", "v"):
                context.slots[layer, part] = torch.full(shape, torch.nan)
        yield context
