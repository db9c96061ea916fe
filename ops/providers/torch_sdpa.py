"""The ``torch`` provider: plain PyTorch, for CPUs and as the answer to any node no kernel takes.

On a CPU each row reads just its own live keys and values, as a view of the cache when a row has one page (the pool gives
CPU rows one page each), grouped by key/value head instead of repeated. On a GPU it is the reference: no host sync, but it
reads every page a row could hold, so ``explain()`` names that cost.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from spec_compile.hardware import Hardware
from spec_compile.ops import attention as generic
from spec_compile.ops.providers.contract import AttentionNode, Availability
from spec_compile.ops.providers.lowered import lowered_op
from spec_compile.ops.torch_private import OpOverload, python_of

NAME = "torch"


def probe() -> Availability:
    return Availability(version=torch.__version__)


def supports(node: AttentionNode, hardware: Hardware) -> str | None:
    return None


def lower(node: AttentionNode) -> OpOverload:
    return getattr(torch.ops.spec_compile, f"{node.op}_torch").default


def warm_up(node: AttentionNode, device: torch.device) -> None:
    pass


# ----------------------------------------------------------------------------------------------------------------------
# On a CPU: row by row, or rows that are alike together


def _live(cache: Tensor, pages: list[int], start: int, end: int) -> Tensor:
    """Slots start..end of one row: [end - start, ...]; a view when they lie in one page."""
    page_size = cache.shape[1]
    first, last = start // page_size, (end - 1) // page_size
    if first == last:
        return cache[pages[first], start - first * page_size : end - first * page_size]
    rows = torch.cat([cache[page] for page in pages[first : last + 1]])
    return rows[start - first * page_size : end - first * page_size]


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    finite: bool = True,
) -> Tensor:
    """q [B, N, Hq, D] over k [B, S, Hkv, D], v [B, S, Hkv, Dv]; visible [B, N, S] or None for all; [B, N, Hq, Dv].

    Args:
        finite: False where a masked key may be NaN: SDPA adds its mask to scores, and NaN stays NaN.
    """
    if softcap > 0 or sinks is not None or not finite:
        if visible is None:
            visible = q.new_ones(*q.shape[:2], k.shape[1], dtype=torch.bool)
        return generic.masked_softmax_attend(q, k, v, visible, scale, softcap, sinks)
    num_tokens, num_kv_heads = q.shape[1], k.shape[2]
    group = q.shape[2] // num_kv_heads
    # Query heads of one key/value head become more query rows, so that no key or value is repeated.
    grouped = q.unflatten(2, (num_kv_heads, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [B, Hkv, G * N, D]
    mask = None if visible is None else visible.repeat(1, group, 1)[:, None]  # [B, 1, G * N, S]
    out = F.scaled_dot_product_attention(grouped, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, scale=scale)
    return out.unflatten(2, (group, num_tokens)).permute(0, 3, 1, 2, 4).flatten(2, 3)  # [B, N, Hq, Dv]


def _row_visibility(tree: Tensor | None, length: int, start: int, num_tokens: int, window: int) -> Tensor | None:
    """bool [N, S] over slots start..length + N, or None when one token sees them all."""
    if num_tokens == 1:
        return None  # ``start`` already clipped the window
    if tree is None:
        tree = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    prefix = torch.ones(num_tokens, length - start, dtype=torch.bool)
    visible = torch.cat([prefix, tree], 1)
    if window > 0:
        depth = tree.sum(1) - 1  # [N]
        position = torch.cat([torch.arange(start, length), length + depth])
        visible &= (length + depth)[:, None] - position[None] < window
    return visible


def _attend_rows(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cache_len: Tensor,
    tree_mask: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    finite: bool,
) -> Tensor:
    batch, num_tokens, num_heads, _ = q.shape
    lengths, tables = cache_len.tolist(), page_table.tolist()
    if _alike(lengths, num_tokens, tables):
        k, v, visible = _copy_of_rows(k_cache, v_cache, page_table, cache_len, tree_mask, num_tokens, window)
        return _attend(q, k.to(q.dtype), v.to(q.dtype), visible, scale, softcap, sinks, finite).contiguous()
    out = q.new_empty(batch, num_tokens, num_heads, v_cache.shape[-1])
    trees = None if tree_mask is None else generic.window_visibility(tree_mask, batch, num_tokens, q.device)
    for row, (length, pages) in enumerate(zip(lengths, tables, strict=True)):
        start = max(0, length - window + 1) if window > 0 else 0
        k, v = (_live(cache, pages, start, length + num_tokens) for cache in (k_cache, v_cache))
        tree = None if trees is None else trees[row]
        visible = _row_visibility(tree, length, start, num_tokens, window)
        if visible is not None:
            visible = visible[None]
        k, v = k[None].to(q.dtype), v[None].to(q.dtype)
        out[row] = _attend(q[row : row + 1], k, v, visible, scale, softcap, sinks, finite)[0]
    return out


# Rows that are attended to together read up to the longest of them, from a copy. A row by itself costs a CPU about 50 us
# whatever its length, so that pays for many short rows; with more slots the copies cost more than they save.
_MOST_SLOTS_TOGETHER = 512


def _alike(lengths: list[int], num_tokens: int, tables: list[list[int]]) -> bool:
    """Whether rows are many, short and of one page each, and not mostly padding."""
    longest = max(lengths) + num_tokens
    few = len(lengths) < 4 or len(tables[0]) > 1 or longest > _MOST_SLOTS_TOGETHER
    return not few and longest * len(lengths) <= 4 * (sum(lengths) + num_tokens * len(lengths))


def _copy_of_rows(
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cache_len: Tensor,
    tree_mask: Tensor | None,
    num_tokens: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(keys [B, S, Hkv, D], values [B, S, Hkv, Dv], visible bool [B, N, S]) of rows of one page, S that of the longest."""
    longest = int(cache_len.max()) + num_tokens
    visible = generic._window_and_prefix_visibility(tree_mask, cache_len, num_tokens, longest, window)
    # Slots that nobody sees may hold NaN, which no mask removes: the row's newest token, which somebody does see, stands in.
    slot = torch.where(visible.any(1), torch.arange(longest), cache_len.long()[:, None])  # [B, S]
    place = (slot + page_table[:, :1].long() * k_cache.shape[1]).flatten()  # [B * S], over the slots of all pages
    k, v = (cache.view(-1, *cache.shape[2:]).index_select(0, place).unflatten(0, slot.shape) for cache in (k_cache, v_cache))
    return k, v, visible


def _all_finite(*tensors: Tensor) -> bool:
    """Whether no number is NaN or infinite; False also where their sum leaves float32. Reads the result on the host."""
    return math.isfinite(sum(float(x.sum(dtype=torch.float32)) for x in tensors))


# ----------------------------------------------------------------------------------------------------------------------
# The lowered ops


def _attention(q, k, v, k_cache, v_cache, page_table, cache_len, tree_mask, scale, window, softcap, sinks) -> Tensor:
    """``attention`` in plain PyTorch."""
    if q.device.type != "cpu":
        reference = python_of(generic.attention)
        return reference(q, k, v, k_cache, v_cache, page_table, cache_len, tree_mask, scale, window, softcap, sinks)
    finite = _all_finite(k, v)
    if not finite:
        k, v = generic.hide_broken(k, v, v_cache.dtype)
    generic.append_window(k, k_cache, page_table, cache_len)
    generic.append_window(v, v_cache, page_table, cache_len)
    return _attend_rows(q, k_cache, v_cache, page_table, cache_len, tree_mask, scale, window, softcap, sinks, finite)


attention_torch = lowered_op(generic.attention, "torch", _attention)


def _mla_attention(q, kv, kv_cache, page_table, cache_len, tree_mask, scale, v_dim) -> Tensor:
    """``mla_attention`` in plain PyTorch."""
    if q.device.type != "cpu":
        return python_of(generic.mla_attention)(q, kv, kv_cache, page_table, cache_len, tree_mask, scale, v_dim)
    finite = _all_finite(kv)
    if not finite:
        kv = generic.hide_broken_latent(kv, v_dim, kv_cache.dtype)
    generic.append_window(kv, kv_cache, page_table, cache_len)
    latent = kv_cache[:, :, None]  # [P, page_size, 1, C + R]
    values = latent[..., :v_dim]
    return _attend_rows(q, latent, values, page_table, cache_len, tree_mask, scale, 0, 0.0, None, finite).contiguous()


mla_attention_torch = lowered_op(generic.mla_attention, "torch", _mla_attention)


def _short_prompts(bounds: list[int], window: int) -> bool:
    """Whether prompts are many, short, not mostly padding, and see all of themselves."""
    lengths = [end - begin for begin, end in itertools.pairwise(bounds)]
    longest = max(lengths)
    if len(lengths) < 4 or not 0 < longest <= _MOST_SLOTS_TOGETHER or 0 < window < longest:
        return False
    return longest * len(lengths) <= 4 * bounds[-1]


def _attend_prompts_together(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv] -> [T, Hq, Dv], all prompts in one SDPA call: they are padded at their ends,
    where no token of theirs looks."""
    lengths = cu_seqlens.diff()  # [B]
    position = torch.arange(int(lengths.max()))
    inside = position < lengths[:, None]  # [B, S]
    group = q.shape[1] // k.shape[1]

    def padded(packed: Tensor) -> Tensor:
        """[T, H, D] -> [B, H, S, D], zeros behind each prompt."""
        out = packed.new_zeros(*inside.shape, *packed.shape[1:])
        out[inside] = packed
        return out.transpose(1, 2)

    keys, values = (padded(x).repeat_interleave(group, 1) for x in (k, v))
    return F.scaled_dot_product_attention(padded(q), keys, values, is_causal=True, scale=scale).transpose(1, 2)[inside]


def _attend_prompts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """q [T, Hq, D], k [T, Hkv, D], v [T, Hkv, Dv] -> [T, Hq, Dv], prompt by prompt."""
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[-1])
    bounds = cu_seqlens.tolist()
    group = q.shape[1] // k.shape[1]
    finite = _all_finite(k, v)
    if q.device.type == "cpu" and finite and softcap == 0 and sinks is None and _short_prompts(bounds, window):
        return _attend_prompts_together(q, k, v, cu_seqlens, scale)
    for begin, end in itertools.pairwise(bounds):
        if begin == end:
            continue
        qs, ks, vs = q[begin:end], k[begin:end], v[begin:end]
        size = end - begin
        if softcap > 0 or sinks is not None or 0 < window < size or not finite:
            position = torch.arange(size, device=q.device)
            distance = position[:, None] - position[None]
            visible = (distance >= 0) & (distance < window if window > 0 else True)
            out[begin:end] = _attend(qs[None], ks[None], vs[None], visible[None], scale, softcap, sinks, finite)[0]
            continue
        # The group becomes a batch over which keys and values are broadcast, not copied.
        grouped = qs.unflatten(1, (-1, group)).permute(2, 1, 0, 3)  # [G, Hkv, S, D]
        keys, values = (x.transpose(0, 1).expand(group, -1, -1, -1) for x in (ks, vs))
        result = F.scaled_dot_product_attention(grouped, keys, values, is_causal=True, scale=scale)
        out[begin:end] = result.permute(2, 1, 0, 3).flatten(1, 2)
    return out


def _prefill_attention(q, k, v, k_cache, v_cache, page_table, cu_seqlens, scale, window, softcap, sinks) -> Tensor:
    """``prefill_attention`` in plain PyTorch; prompt by prompt on any device (reads ``cu_seqlens`` on the host)."""
    generic.write_packed(k, k_cache, page_table, cu_seqlens, window)
    generic.write_packed(v, v_cache, page_table, cu_seqlens, window)
    k, v = generic.hide_broken(generic.as_cached(k, k_cache.dtype), generic.as_cached(v, v_cache.dtype), v_cache.dtype)
    if q.device.type != "cpu" and (softcap > 0 or sinks is not None or window > 0):
        visible = generic._packed_visibility(cu_seqlens, q.shape[0], window)
        return generic.masked_softmax_attend(q[None], k[None], v[None], visible[None], scale, softcap, sinks)[0]
    return _attend_prompts(q, k, v, cu_seqlens, scale, window, softcap, sinks)


prefill_attention_torch = lowered_op(generic.prefill_attention, "torch", _prefill_attention)


def _mla_prefill_attention(q, kv, kv_cache, page_table, cu_seqlens, scale, v_dim) -> Tensor:
    """``mla_prefill_attention`` in plain PyTorch; prompt by prompt."""
    generic.write_packed(kv, kv_cache, page_table, cu_seqlens)
    latent = generic.hide_broken_latent(generic.as_cached(kv, kv_cache.dtype), v_dim, kv_cache.dtype)[:, None]  # [T, 1, C + R]
    return _attend_prompts(q, latent, latent[..., :v_dim], cu_seqlens, scale, 0, 0.0, None)


mla_prefill_attention_torch = lowered_op(generic.mla_prefill_attention, "torch", _mla_prefill_attention)
