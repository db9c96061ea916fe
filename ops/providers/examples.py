"""Arguments to call a lowered attention op with before any real ones exist: for warming up."""

from __future__ import annotations

import torch
from torch import Tensor

from spec_compile.ops.providers import AttentionNode

PROMPT_TOKENS = 16


def example_arguments(node: AttentionNode, device: torch.device) -> tuple[Tensor | int | float | None, ...]:
    """Arguments of the generic op ``node.op`` whose rows are empty and lie in page 0, which is nobody's.

    Queries, keys and values are views of one projection, as in a model: kernels specialize on the divisibility of strides.
    """
    batch, tokens = node.batch or 1, node.num_tokens or PROMPT_TOKENS
    hq, hkv, d, dv = node.num_q_heads, node.num_kv_heads, node.head_dim, node.v_head_dim
    packed = node.op in ("prefill_attention", "mla_prefill_attention")
    lead = (batch * tokens,) if packed else (batch, tokens)
    table = torch.zeros(batch, -(-tokens // node.page_size) + 1, dtype=torch.int32, device=device)
    rows: tuple[Tensor | None, ...]
    if packed:
        rows = (table, torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens)
    else:
        mask = torch.ones(batch, tokens, -(-tokens // 32), dtype=torch.int32, device=device)
        rows = (table, torch.zeros(batch, dtype=torch.int32, device=device), mask if node.is_tree else None)
    if node.op in ("mla_attention", "mla_prefill_attention"):
        q = torch.zeros(*lead, hq, d, dtype=node.dtype, device=device)
        kv = torch.zeros(*lead, d, dtype=node.dtype, device=device)
        cache = torch.zeros(1, node.page_size, d, dtype=node.kv_dtype, device=device)
        return (q, kv, cache, *rows, d**-0.5, dv)
    fused = torch.zeros(*lead, (hq + hkv) * d + hkv * dv, dtype=node.dtype, device=device)
    q, k, v = fused.split([hq * d, hkv * d, hkv * dv], dim=-1)
    new = q.unflatten(-1, (hq, d)), k.unflatten(-1, (hkv, d)), v.unflatten(-1, (hkv, dv))
    caches = [torch.zeros(1, node.page_size, hkv, x, dtype=node.kv_dtype, device=device) for x in (d, dv)]
    sinks = torch.zeros(hq, dtype=node.dtype, device=device) if node.has_sinks else None
    return (*new, *caches, *rows, d**-0.5, node.window, node.softcap, sinks)
