"""Arguments to call a lowered delta rule op with before any real ones exist: for warming up and for timing."""

from __future__ import annotations

import torch
from torch import Tensor

from spec_compile.ops.providers.contract import DeltaNode
from spec_compile.ops.providers.examples import chain_mask

STATE_PLACES = {"gdn_verify": (7, 8, 9), "gdn_prefill": (7,)}  # of what a layer has for itself: states and windows


def example_arguments(
    node: DeltaNode, device: torch.device, *, num_tokens: int | None = None, live: bool = False
) -> tuple[Tensor | float | None, ...]:
    """Arguments of the generic op ``node.op`` in the shapes ``node`` describes, with what a layer has for
    itself at ``STATE_PLACES[node.op]``.

    Queries, keys and values are views of one tensor, as behind the convolution of a model.

    Args:
        num_tokens: tokens of the one prompt of a prefill node.
        live: rows have slots of their own and everything is random; otherwise all rows have the null slot and all is zero.
    """
    batch, tokens = node.batch or 1, node.num_tokens or num_tokens or 16
    hk, hv, d, dv = node.num_k_heads, node.num_v_heads, node.head_dim, node.v_head_dim
    lead = (tokens,) if node.op == "gdn_prefill" else (batch, tokens)
    generator = torch.Generator(device).manual_seed(0)  # the caller's own random numbers stay what they were
    slots = batch + 1 if live else 1

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator) if live else torch.zeros(*shape, device=device)

    mixed = make(*lead, 2 * hk * d + hv * dv).to(node.dtype)
    q, k, v = mixed.split([hk * d, hk * d, hv * dv], -1)
    gates = [make(*lead, hv).to(node.dtype) for _ in range(2)]
    weights = [make(hv).to(node.weight_dtype or node.dtype) for _ in range(2)]
    state = make(slots, hv, dv, d).to(node.state_dtype)
    rows = torch.arange(1, batch + 1, device=device) if live else torch.zeros(batch, device=device)
    new = q.unflatten(-1, (hk, d)), k.unflatten(-1, (hk, d)), v.unflatten(-1, (hv, dv)), *gates, *weights, state
    if node.op == "gdn_prefill":
        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        return (*new, rows[:1].to(torch.int32), cu_seqlens, d**-0.5)
    windows = (
        torch.zeros(slots, tokens, hk * d + hv * dv, dtype=node.dtype, device=device),
        torch.zeros(slots, tokens, 2 * hv, device=device),
    )
    mask = chain_mask(batch, tokens, device) if node.is_tree else None
    return (*new, *windows, rows.to(torch.int32), mask, d**-0.5)
