"""The generic attention ops: what capture emits, what the selection pass replaces, and the reference they are tested against.

Shapes: B rows, N window tokens (the root token plus drafts), T packed prompt tokens, Hq/Hkv query and key/value heads,
D head dim (Dv of values), P pages of ``page_size`` slots, M pages a row can hold, W = ceil(N / 32) mask words.
Strides: q, k and v need only a contiguous last dim; outputs are contiguous.

A row's key/value slot ``s`` lives in page ``page_table[row, s // page_size]`` at offset ``s % page_size``. Slots below
``cache_len[row]`` are committed; the window is written right behind them. Rolling back is not advancing ``cache_len``.

Page 0 is the null page: it belongs to no row; padding rows point at it and may write it.

A cache may be of a narrower type than the queries. What it holds is what everyone sees: the tokens of the call itself are
attended to as the cache holds them, so that a window of N tokens and N single tokens read the same numbers.

The reference implementations run on any device without a host sync, in float32 (float64 for float64 inputs). They read
every page a row *could* hold, which makes them slow: they define the result, providers make it fast.
"""

from __future__ import annotations

import torch
from torch import Tensor

# ----------------------------------------------------------------------------------------------------------------------
# Pieces the references share


def window_visibility(tree_mask: Tensor | None, batch: int, num_tokens: int, device: torch.device) -> Tensor:
    """Which window token sees which: bool [B, N, N]; row i sees column j. A chain (no mask) is causal.

    Args:
        tree_mask: int32 [B, N, W]; bit ``j % 32`` of word ``j // 32`` in row ``i`` is set when j is i or an ancestor of i.
    """
    index = torch.arange(num_tokens, device=device)
    if tree_mask is None:
        return (index[None, :] <= index[:, None]).expand(batch, -1, -1)
    words = tree_mask[:, :, index // 32]  # [B, N, N]
    return ((words >> (index % 32).to(torch.int32)) & 1).bool()


def cache_slots(page_table: Tensor, page_size: int) -> Tensor:
    """Flat slot of every position a row can hold: int64 [B, M * page_size]."""
    offsets = torch.arange(page_size, device=page_table.device)
    return (page_table.long()[:, :, None] * page_size + offsets).flatten(1)


def to_cache(new: Tensor, dtype: torch.dtype) -> Tensor:
    """``new`` as a cache of type ``dtype`` holds it, scale 1. What is too large saturates: float8_e4m3fn ends at 448, and a
    plain conversion makes NaN of what lies beyond."""
    if dtype == new.dtype:
        return new
    largest = torch.finfo(dtype).max
    if largest < torch.finfo(new.dtype).max:
        new = new.clamp(-largest, largest)
    return new.to(dtype)


def as_cached(new: Tensor, dtype: torch.dtype) -> Tensor:
    """``new``, in its own type, as it reads when it comes back from a cache of type ``dtype``."""
    return to_cache(new, dtype).to(new.dtype)


def hide_broken(k: Tensor, v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values of which those that are masked cannot be felt, not even where they are no numbers.

    Masks are applied to scores, and a weight of 0 times a NaN is NaN: a refused draft whose values overflow would spoil the
    tokens before it. So where a head's values are not finite, its keys become NaN and its values 0: whoever sees that token
    gets NaN as ever, by its score, and no other row notices.

    Args:
        k: [..., Hkv, D]; v: [..., Hkv, Dv].
        dtype: of the cache, which may make numbers of infinities (``to_cache``).
    """
    broken = ~as_cached(v, dtype).isfinite().all(-1, keepdim=True)
    return k.masked_fill(broken, float("nan")), v.masked_fill(broken, 0.0)


def hide_broken_latent(kv: Tensor, v_dim: int, dtype: torch.dtype) -> Tensor:
    """``hide_broken`` of latent entries [..., C + R], whose values are a part of their keys: the rotary part becomes NaN."""
    rotary, latent = hide_broken(kv[..., v_dim:], kv[..., :v_dim], dtype)
    return torch.cat([latent, rotary], -1)


def cache_places(page_table: Tensor, row: Tensor, position: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """(page, offset) of positions of rows: two int64 tensors of the shape that ``row`` and ``position`` broadcast to.

    What a row cannot hold goes to the null page.

    Args:
        page_table: int32 [B, M].
        row, position: int64; 0 <= row < B, 0 <= position.
    """
    column = position // page_size
    page = page_table.long()[row, column.clamp(max=page_table.shape[1] - 1)]
    return page.masked_fill(column >= page_table.shape[1], 0), position % page_size


def window_places(page_table: Tensor, cache_len: Tensor, slot: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """``cache_places`` of window slots: ``slot`` int64 [B or 1, N], counted from ``cache_len`` [B] -> two int64 [B, N]."""
    row = torch.arange(cache_len.shape[0], device=cache_len.device)[:, None]  # [B, 1]
    return cache_places(page_table, row, cache_len.long()[:, None] + slot, page_size)


def append_window(new: Tensor, cache: Tensor, page_table: Tensor, cache_len: Tensor) -> None:
    """Write ``new`` [B, N, ...] into the paged ``cache`` [P, page_size, ...] behind each row's ``cache_len``."""
    slot = torch.arange(new.shape[1], device=new.device)[None]  # [1, N]
    cache[window_places(page_table, cache_len, slot, cache.shape[1])] = to_cache(new, cache.dtype)


def masked_softmax_attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Attention of q [B, N, Hq, D] over k [B, S, Hkv, D], v [B, S, Hkv, Dv] where ``visible`` [B, N, S]; [B, N, Hq, Dv].

    A query that sees nothing gets zeros. Invisible keys may hold NaN, and so may values that nobody sees (those that somebody
    sees have been through ``hide_broken``).
    """
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    seen = visible.any(1)[:, :, None, None]  # [B, S, 1, 1]: 0 * NaN is NaN, so unseen slots are cleared, not only masked
    k, v = k.to(compute).masked_fill(~seen, 0.0), v.to(compute).masked_fill(~seen, 0.0)
    grouped = q.to(compute).unflatten(2, (num_kv_heads, num_heads // num_kv_heads))  # [B, N, Hkv, G, D]
    scores = torch.einsum("bnhgd,bshd->bhgns", grouped, k) * scale
    if softcap > 0:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    peak = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sink = sinks.to(compute).view(1, num_kv_heads, -1, 1, 1)
        peak = torch.maximum(peak, sink)
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sink - peak)
    weights = weights / total.masked_fill(total == 0, 1.0)
    return torch.einsum("bhgns,bshd->bnhgd", weights, v).flatten(2, 3).to(q.dtype)


def _window_and_prefix_visibility(
    tree_mask: Tensor | None, cache_len: Tensor, num_tokens: int, capacity: int, window: int
) -> Tensor:
    """bool [B, N, capacity]: the prefix, then the window by its tree, both clipped by the sliding window."""
    batch, device = cache_len.shape[0], cache_len.device
    tree = window_visibility(tree_mask, batch, num_tokens, device)
    depth = tree.sum(-1) - 1  # [B, N]: number of ancestors; a token's position is cache_len + depth
    slot = torch.arange(capacity, device=device)  # [S]
    in_window = slot[None] - cache_len.long()[:, None]  # [B, S]: index into the window, negative in the prefix
    is_window = (in_window >= 0) & (in_window < num_tokens)
    clipped = in_window.clamp(0, num_tokens - 1)
    tree_part = tree.gather(2, clipped[:, None].expand(-1, num_tokens, -1))  # [B, N, S]
    visible = torch.where(is_window[:, None], tree_part, (in_window < 0)[:, None])
    if window > 0:
        key_position = torch.where(is_window, cache_len.long()[:, None] + depth.gather(1, clipped), slot[None])
        query_position = cache_len.long()[:, None] + depth
        visible = visible & (query_position[:, :, None] - key_position[:, None, :] < window)
    return visible


# ----------------------------------------------------------------------------------------------------------------------
# attention: append the window, attend to the prefix and to the window


@torch.library.custom_op("spec_compile::attention", mutates_args=("k_cache", "v_cache"))
def attention(
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
) -> Tensor:
    """Append the window's keys and values to the paged cache, then attend to the prefix and to the window.

    What a token of the window does not see, it does not feel: not even keys and values that are NaN or infinite. A token that
    sees such gets NaN in the head. The cache may hold them as they are or as ``hide_broken`` makes them.

    Args:
        q: [B, N, Hq, D].
        k: [B, N, Hkv, D]; rotated, as it goes into the cache.
        v: [B, N, Hkv, Dv].
        k_cache: [P, page_size, Hkv, D], written; q's type or a narrower one (see ``to_cache``).
        v_cache: [P, page_size, Hkv, Dv], written; of k_cache's type.
        page_table: int32 [B, M].
        cache_len: int32 [B], tokens committed before this call.
        tree_mask: int32 [B, N, W] packed ancestor bits (self included), or None for a chain.
        scale: multiplies q·k.
        window: sliding window in tokens, self included; 0 means unlimited.
        softcap: logit soft-capping; 0 means none.
        sinks: [Hq] attention-sink logits, or None.

    Returns:
        [B, N, Hq, Dv], contiguous, in q's dtype.
    """
    k, v = hide_broken(k, v, v_cache.dtype)
    append_window(k, k_cache, page_table, cache_len)
    append_window(v, v_cache, page_table, cache_len)
    slots = cache_slots(page_table, k_cache.shape[1])
    visible = _window_and_prefix_visibility(tree_mask, cache_len, q.shape[1], slots.shape[1], window)
    keys, values = k_cache.flatten(0, 1)[slots], v_cache.flatten(0, 1)[slots]  # [B, S, Hkv, D]
    return masked_softmax_attend(q, keys, values, visible, scale, softcap, sinks).contiguous()


@attention.register_fake
def attention_fake(q, k, v, k_cache, v_cache, page_table, cache_len, tree_mask, scale, window, softcap, sinks) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v.shape[3])


# ----------------------------------------------------------------------------------------------------------------------
# mla_attention: the same over one latent cache (DeepSeek's multi-head latent attention, absorbed)


@torch.library.custom_op("spec_compile::mla_attention", mutates_args=("kv_cache",))
def mla_attention(
    q: Tensor,
    kv: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    cache_len: Tensor,
    tree_mask: Tensor | None,
    scale: float,
    v_dim: int,
) -> Tensor:
    """``attention`` in latent space: all query heads read one key/value head whose values are its first ``v_dim`` dims.

    Args:
        q: [B, N, Hq, C + R]; absorbed latent query, then its rotary part.
        kv: [B, N, C + R]; latent, then the shared rotary key.
        kv_cache: [P, page_size, C + R], written.
        page_table, cache_len, tree_mask, scale: as in ``attention``.
        v_dim: C.

    Returns:
        [B, N, Hq, C], contiguous.
    """
    append_window(hide_broken_latent(kv, v_dim, kv_cache.dtype), kv_cache, page_table, cache_len)
    slots = cache_slots(page_table, kv_cache.shape[1])
    visible = _window_and_prefix_visibility(tree_mask, cache_len, q.shape[1], slots.shape[1], 0)
    latent = kv_cache.flatten(0, 1)[slots][:, :, None]  # [B, S, 1, C + R]
    return masked_softmax_attend(q, latent, latent[..., :v_dim], visible, scale, 0.0, None).contiguous()


@mla_attention.register_fake
def mla_attention_fake(q, kv, kv_cache, page_table, cache_len, tree_mask, scale, v_dim) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], q.shape[2], v_dim)


# ----------------------------------------------------------------------------------------------------------------------
# prefill_attention: packed causal prompts


def packed_rows(cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """(row, position in the row) of every packed token: two int64 [T]. Tokens past the last prompt belong to the last row."""
    token = torch.arange(num_tokens, device=cu_seqlens.device)
    row = torch.searchsorted(cu_seqlens[1:].contiguous(), token.to(cu_seqlens.dtype), right=True)
    row = row.clamp(max=cu_seqlens.shape[0] - 2)
    return row, token - cu_seqlens.long()[row]


def write_packed(new: Tensor, cache: Tensor, page_table: Tensor, cu_seqlens: Tensor, window: int = 0) -> None:
    """Write packed ``new`` [T, ...] into the paged ``cache``, each prompt from its row's slot 0; see ``kept_in_window``."""
    row, position = packed_rows(cu_seqlens, new.shape[0])
    page, offset = cache_places(page_table, row, position, cache.shape[1])
    page = page.masked_fill(~kept_in_window(cu_seqlens, row, position, window), 0)
    cache[page, offset] = to_cache(new, cache.dtype)


def kept_in_window(cu_seqlens: Tensor, row: Tensor, position: Tensor, window: int) -> Tensor:
    """Which packed tokens a cache keeps: bool [T]. Behind a sliding window only the last ``window`` of each prompt are: no
    later token sees further back, nor does the last one when a draft runs it once more; and where a window layer has few
    pages (``ops.page_table``), older tokens would be written into the slots of newer ones."""
    return position >= cu_seqlens.long()[row + 1] - cu_seqlens.long()[row] - window if window > 0 else position >= 0


@torch.library.custom_op("spec_compile::prefill_attention", mutates_args=("k_cache", "v_cache"))
def prefill_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention of prompts packed without padding; their keys and values fill the cache from slot 0, behind a sliding
    window those of each prompt's last ``window`` tokens (``kept_in_window``).

    Args:
        q: [T, Hq, D]; k: [T, Hkv, D]; v: [T, Hkv, Dv].
        k_cache, v_cache, page_table, scale, window, softcap, sinks: as in ``attention``; row b is prompt b.
        cu_seqlens: int32 [B + 1], prompt boundaries; ``cu_seqlens[-1] == T``.

    Returns:
        [T, Hq, Dv], contiguous, in q's dtype.
    """
    write_packed(k, k_cache, page_table, cu_seqlens, window)
    write_packed(v, v_cache, page_table, cu_seqlens, window)
    k, v = hide_broken(as_cached(k, k_cache.dtype), as_cached(v, v_cache.dtype), v_cache.dtype)
    visible = _packed_visibility(cu_seqlens, q.shape[0], window)
    return masked_softmax_attend(q[None], k[None], v[None], visible[None], scale, softcap, sinks)[0].contiguous()


def _packed_visibility(cu_seqlens: Tensor, num_tokens: int, window: int) -> Tensor:
    row, position = packed_rows(cu_seqlens, num_tokens)
    distance = position[:, None] - position[None, :]
    visible = (row[:, None] == row[None, :]) & (distance >= 0)
    return visible & (distance < window) if window > 0 else visible


@prefill_attention.register_fake
def prefill_attention_fake(q, k, v, k_cache, v_cache, page_table, cu_seqlens, scale, window, softcap, sinks) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


@torch.library.custom_op("spec_compile::mla_prefill_attention", mutates_args=("kv_cache",))
def mla_prefill_attention(
    q: Tensor, kv: Tensor, kv_cache: Tensor, page_table: Tensor, cu_seqlens: Tensor, scale: float, v_dim: int
) -> Tensor:
    """``prefill_attention`` in latent space, q [T, Hq, C + R], kv [T, C + R] -> [T, Hq, C]"""
    write_packed(kv, kv_cache, page_table, cu_seqlens)
    visible = _packed_visibility(cu_seqlens, q.shape[0], 0)
    latent = hide_broken_latent(as_cached(kv, kv_cache.dtype), v_dim, kv_cache.dtype)[None, :, None]
    return masked_softmax_attend(q[None], latent, latent[..., :v_dim], visible[None], scale, 0.0, None)[0].contiguous()


@mla_prefill_attention.register_fake
def mla_prefill_attention_fake(q, kv, kv_cache, page_table, cu_seqlens, scale, v_dim) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[1], v_dim)
