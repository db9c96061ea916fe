"""A provider outside the library, added as ``docs/adding-a-provider.md`` says: windows of plain layers, in plain torch.

It plans: one gather index for all layers, padded with the last slot of the cache, and lengths that include the window. The
attention op believes its plan alone. ``CALLS`` counts what ran.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from spec_compile.hardware import Hardware
from spec_compile.ops import attention as generic
from spec_compile.ops.attention import append_window, cache_slots, masked_softmax_attend, window_visibility
from spec_compile.ops.providers import AttentionNode, Availability, Lowered, lowered_op

NAME = "toy"
CALLS: Counter[str] = Counter()


def probe() -> Availability:
    return Availability("0.1")


def supports(node: AttentionNode, hardware: Hardware) -> str | None:
    if node.op != "attention":
        return f"the toy has no {node.op}"
    if node.window or node.softcap or node.has_sinks:
        return "the toy attends to everything, plainly"
    return None


def lower(node: AttentionNode) -> Lowered:
    op, plan = torch.ops.spec_compile.attention_toy.default, torch.ops.spec_compile_tests.toy_plan.default
    return Lowered(op, plan, (node.num_tokens, node.page_size))


def warm_up(node: AttentionNode, device: torch.device) -> None:
    CALLS[f"warm_up {node.stage}"] += 1


@torch.library.custom_op("spec_compile_tests::toy_plan", mutates_args=())
def toy_plan(
    page_table: Tensor, cache_len: Tensor, tree_mask: Tensor | None, num_tokens: int, page_size: int
) -> tuple[Tensor, Tensor]:
    """(slots int64 [B, S], -1 behind a row's end; lengths int32 [B], the window included)."""
    CALLS["plan"] += 1
    slots = cache_slots(page_table, page_size)
    total = cache_len + num_tokens
    live = torch.arange(slots.shape[1], device=slots.device) < total[:, None]
    return torch.where(live, slots, -1), total


@toy_plan.register_fake
def _(page_table, cache_len, tree_mask, num_tokens, page_size):
    return page_table.new_empty(page_table.shape[0], page_table.shape[1] * page_size, dtype=torch.int64), torch.empty_like(
        cache_len
    )


def attend(q, k, v, k_cache, v_cache, page_table, cache_len, tree_mask, scale, window, softcap, sinks, slots, total):
    CALLS["attention"] += 1
    append_window(k, k_cache, page_table, cache_len)
    append_window(v, v_cache, page_table, cache_len)
    batch, num_tokens = q.shape[:2]
    keys, values = k_cache.flatten(0, 1)[slots], v_cache.flatten(0, 1)[slots]  # [B, S, Hkv, D]; -1 reads the last slot
    place = torch.arange(slots.shape[1], device=q.device) - (total - num_tokens)[:, None]  # [B, S]: index into the window
    tree = window_visibility(tree_mask, batch, num_tokens, q.device)
    in_window = tree.gather(2, place.clamp(0, num_tokens - 1)[:, None].expand(-1, num_tokens, -1))
    visible = torch.where((place < 0)[:, None], slots[:, None] >= 0, in_window & (slots >= 0)[:, None])
    return masked_softmax_attend(q, keys, values, visible, scale, 0.0, None).contiguous()


lowered_op(generic.attention, "toy", attend, extra=("slots", "total"))
