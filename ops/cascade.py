"""Cascade attention: any attention kernel that returns its log-sum-exp does the bulk of the prefix, one kernel does the rest.

The bulk is the run of slots that every token of a row's window sees; it needs no mask. It is cut into F *folds*, each a
batch row of its own with a page table of its own, so that a kernel without split-KV still fills the device: fold f of row b
is pseudo row ``b * F + f`` and holds every F-th page of the run. The rest, in ``cascade_merge``, is what a mask decides or
what belongs to a row once: the window itself (appended to the cache on the way), the *edge* in front of the run that only
some tokens see through a sliding window, the sinks, and the merge of all parts by their log-sum-exps.

Method: cascade inference (FlashInfer, Ye et al. 2024), split-KV merging (FlashDecoding, Dao et al. 2023); folding the splits
into batch rows is how a kernel that only knows batches is made to split.

Shapes as in ``ops/attention.py``. Each function has a plain PyTorch form, which defines the result and runs on a CPU, and a
Triton form, which runs on CUDA tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spec_compile.ops import attention as generic
from spec_compile.ops.folds import bulk_range, folded_columns


def fold_prefix(
    page_table: Tensor, cache_len: Tensor, folds: int, num_tokens: int, page_size: int, window: int
) -> tuple[Tensor, Tensor]:
    """Cut each row's bulk into ``folds`` pseudo rows: fold f takes its pages f, f + folds, f + 2 * folds, …

    Taking pages in turns spreads any length evenly, so nothing but shapes depends on what a row could hold.

    Args:
        page_table: int32 [B, M].
        cache_len: int32 [B].
        num_tokens, window: the window op's N and sliding window.

    Returns:
        int32 [B * folds, ``folded_columns``] page tables, 0 behind the last page, and int32 [B * folds] lengths.
    """
    if page_table.device.type != "cpu":
        from spec_compile.ops.kernels import cascade

        return cascade.fold_prefix(page_table, cache_len, folds, num_tokens, page_size, window)
    first, end = bulk_range(cache_len, num_tokens, page_size, window)
    pages = (end - first + page_size - 1) // page_size  # [B]
    fold = torch.arange(folds, device=page_table.device)
    turn = torch.arange(folded_columns(page_table.shape[1], folds, page_size, window), device=page_table.device)
    index = turn[None, :] * folds + fold[:, None]  # [F, columns]: page of the run
    column = (first // page_size)[:, None, None] + index  # [B, F, columns]
    inside = index < pages[:, None, None]
    rows = page_table[:, None].expand(-1, folds, -1)
    table = rows.gather(2, column.clamp(max=page_table.shape[1] - 1)).masked_fill(~inside, 0)
    held = inside.sum(2)  # [B, F]
    has_last = (held > 0) & ((pages - 1)[:, None] % folds == fold)
    length = held * page_size - torch.where(has_last, (pages * page_size - (end - first))[:, None], 0)
    return table.flatten(0, 1).contiguous(), length.flatten().to(torch.int32)


def cascade_merge(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cache_len: Tensor,
    tree_mask: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    partial: Tensor,
    partial_lse: Tensor,
) -> Tensor:
    """``spec_compile::attention`` given the attention over the folds of ``fold_prefix``.

    Appends the window to the cache, attends to it and to the edge, and merges with the folds.

    Args:
        q, k, v, k_cache, v_cache, page_table, cache_len, tree_mask, scale, window, softcap, sinks: the generic op's.
        partial: [B * folds, N, Hq, Dv], each fold's attention, normalised over its own keys. Anything where a fold is empty.
        partial_lse: float32 [B * folds, Hq, N], natural log of each fold's sum of exponentials; -inf where it is empty.

    Returns:
        [B, N, Hq, Dv], contiguous, in q's dtype.
    """
    if q.device.type != "cpu":
        from spec_compile.ops.kernels import cascade

        return cascade.cascade_merge(
            q, k, v, k_cache, v_cache, page_table, cache_len, tree_mask, scale, window, softcap, sinks,
            partial, partial_lse,
        )  # fmt: skip
    k, v = generic.hide_broken(k, v, v_cache.dtype)
    generic.append_window(k, k_cache, page_table, cache_len)
    generic.append_window(v, v_cache, page_table, cache_len)
    num_tokens, page_size = q.shape[1], k_cache.shape[1]
    slots = generic.cache_slots(page_table, page_size)  # [B, S]
    visible = generic._window_and_prefix_visibility(tree_mask, cache_len, num_tokens, slots.shape[1], window)
    first, end = bulk_range(cache_len, num_tokens, page_size, window)
    slot = torch.arange(slots.shape[1], device=q.device)
    in_bulk = (slot >= first[:, None]) & (slot < end[:, None])  # [B, S]
    keys, values = k_cache.flatten(0, 1)[slots], v_cache.flatten(0, 1)[slots]
    rest, rest_lse = attend_with_lse(q, keys, values, visible & ~in_bulk[:, None], scale, softcap)
    folds = partial.unflatten(0, (q.shape[0], -1)).to(rest.dtype)  # [B, F, N, Hq, Dv]
    folds_lse = partial_lse.unflatten(0, (q.shape[0], -1)).transpose(2, 3).to(rest.dtype)  # [B, F, N, Hq]
    lse = torch.cat([folds_lse, rest_lse[:, None]], 1)
    parts = torch.cat([folds, rest[:, None]], 1)
    if sinks is not None:  # a part that takes weight and gives nothing
        lse = torch.cat([lse, sinks.to(lse).expand_as(rest_lse)[:, None]], 1)
        parts = torch.cat([parts, torch.zeros_like(rest)[:, None]], 1)
    peak = lse.amax(1, keepdim=True)
    weight = torch.exp(lse - peak.masked_fill(peak == float("-inf"), 0.0))
    weight = weight / weight.sum(1, keepdim=True).masked_fill(peak == float("-inf"), 1.0)
    parts = parts.masked_fill((lse == float("-inf"))[..., None], 0.0)
    return (parts * weight[..., None]).sum(1).to(q.dtype)


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """Attention where ``visible``, and the natural log of its sum of exponentials. Invisible keys may hold NaN.

    Args:
        q: [B, N, Hq, D]; k: [B, S, Hkv, D]; v: [B, S, Hkv, Dv]; visible: bool [B, N, S].

    Returns:
        [B, N, Hq, Dv] and [B, N, Hq], both float32, or float64 for float64 inputs; 0 and -inf where nothing is seen.
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    unseen = ~visible.any(1)[:, :, None, None]  # [B, S, 1, 1]; 0 * NaN is NaN, so what nobody sees is cleared
    k, v = k.to(compute).masked_fill(unseen, 0.0), v.to(compute).masked_fill(unseen, 0.0)
    grouped = q.to(compute).unflatten(2, (k.shape[2], -1))  # [B, N, Hkv, G, D]
    scores = torch.einsum("bnhgd,bshd->bnhgs", grouped, k) * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible[:, :, None, None], float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0))
    return torch.einsum("bnhgs,bshd->bnhgd", weights, v).flatten(2, 3), lse[..., 0].flatten(2)
