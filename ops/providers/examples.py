"""Arguments to call a lowered attention op with before any real ones exist: for warming up and for timing."""

from __future__ import annotations

import torch
from torch import Tensor

from spec_compile.ops.providers.contract import AttentionNode

PROMPT_TOKENS = 16
CACHE_PLACES = {"attention": (3, 4), "prefill_attention": (3, 4), "mla_attention": (2,), "mla_prefill_attention": (2,)}


def example_arguments(
    node: AttentionNode, device: torch.device, *, num_tokens: int | None = None, context: int | None = None
) -> tuple[Tensor | int | float | None, ...]:
    """Arguments of the generic op ``node.op`` in the shapes ``node`` describes, with caches at ``CACHE_PLACES[node.op]``.

    Queries, keys and values are views of one projection, as in a model: kernels specialize on the divisibility of strides.

    Args:
        num_tokens: tokens of the one prompt of a prefill node.
        context: committed tokens of each row. Rows then have shuffled pages of their own and everything is random. None is
            the cheapest call there is: rows are empty and lie in the null page (page 0), and everything is zero.
    """
    batch, tokens = node.batch or 1, node.num_tokens or num_tokens or PROMPT_TOKENS
    hq, hkv, d, dv = node.num_q_heads, node.num_kv_heads, node.head_dim, node.v_head_dim
    packed = node.op in ("prefill_attention", "mla_prefill_attention")
    lead = (batch * tokens,) if packed else (batch, tokens)
    columns = -(-((context or 0) + tokens) // node.page_size) + 1
    pages = 1 if context is None else batch * columns + 1

    generator = torch.Generator(device).manual_seed(0)  # the caller's own random numbers stay what they were

    def values(*shape: int) -> Tensor:
        if context is None:
            return torch.zeros(*shape, dtype=node.dtype, device=device)
        return torch.randn(*shape, device=device, generator=generator).to(node.dtype)

    def cache(*shape: int) -> Tensor:
        page = values(1, node.page_size, *shape).to(node.kv_dtype)
        return page.expand(pages, *page.shape[1:]).contiguous()

    if context is None:
        table = torch.zeros(batch, columns, dtype=torch.int32, device=device)
    else:
        table = 1 + torch.randperm(batch * columns, device=device, generator=generator).to(torch.int32).view(batch, columns)
    rows: tuple[Tensor | None, ...]
    if packed:
        rows = (table, torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens)
    else:
        lengths = torch.full((batch,), context or 0, dtype=torch.int32, device=device)
        rows = (table, lengths, chain_mask(batch, tokens, device) if node.is_tree else None)
    if node.op in ("mla_attention", "mla_prefill_attention"):
        return (values(*lead, hq, d), values(*lead, d), cache(d), *rows, d**-0.5, dv)
    q, k, v = values(*lead, (hq + hkv) * d + hkv * dv).split([hq * d, hkv * d, hkv * dv], dim=-1)
    new = q.unflatten(-1, (hq, d)), k.unflatten(-1, (hkv, d)), v.unflatten(-1, (hkv, dv))
    sinks = torch.zeros(hq, dtype=node.dtype, device=device) if node.has_sinks else None
    return (*new, cache(hkv, d), cache(hkv, dv), *rows, d**-0.5, node.window, node.softcap, sinks)


def chain_mask(batch: int, num_tokens: int, device: torch.device) -> Tensor:
    """A chain written as a tree: int32 [B, N, ceil(N / 32)], token i sees tokens 0 to i."""
    words = -(-num_tokens // 32)
    seen = torch.arange(words * 32) <= torch.arange(num_tokens)[:, None]  # [N, words * 32]
    bits = (seen.unflatten(1, (words, 32)).long() << torch.arange(32)).sum(-1)
    signed = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32)
    return signed.to(device).expand(batch, -1, -1).contiguous()
