"""The nodes of a graph that kernels are chosen for, and what a provider may know of each: shapes and constants, never data."""

from __future__ import annotations

import torch
from torch import fx

from spec_compile.ops.providers import AttentionNode, DeltaNode, Node
from spec_compile.ops.torch_private import OpOverload
from spec_compile.passes.graph import CacheSlot, StageGraph, fake


def provided_nodes(graph: StageGraph) -> list[fx.Node]:
    """The generic attention and delta rule nodes in layer order."""
    return [n for n in graph.gm.graph.nodes if needs_provider(n)]


def needs_provider(node: fx.Node) -> bool:
    """Whether ``node`` calls a generic attention or delta rule op."""
    packets = {getattr(torch.ops.spec_compile, name) for name in (*AttentionNode.OPS, *DeltaNode.OPS)}
    return node.op == "call_function" and _packet(node) in packets


def layer_of(node: fx.Node) -> int:
    """The layer whose cache or states a node reads."""
    bindings = (arg.meta.get("binding") for arg in node.args if isinstance(arg, fx.Node))
    return next(binding.layer for binding in bindings if isinstance(binding, CacheSlot))


def _packet(node: fx.Node) -> object:
    """What a node calls: Dynamo writes an op's packet, providers name an overload."""
    return node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target


def describe(
    node: fx.Node,
    stage: str,
    page_size: int,
    kv_dtype: torch.dtype | None = None,
    max_context: int | None = None,
) -> Node:
    """What a provider may know of a node, read from its fakes and constant arguments."""
    op = _packet(node).__name__
    if op in DeltaNode.OPS:
        return _describe_delta(node, op, stage)
    packed = op in ("prefill_attention", "mla_prefill_attention")
    query = fake(node.args[0])
    if op in ("mla_attention", "mla_prefill_attention"):
        num_kv_heads, v_head_dim, window, softcap, sinks = 1, node.args[-1], 0, 0.0, None
        tree_mask = None if packed else node.args[5]
    else:
        num_kv_heads, v_head_dim = fake(node.args[1]).shape[-2], fake(node.args[2]).shape[-1]
        window, softcap, sinks = node.args[-3:]
        tree_mask = None if packed else node.args[7]
    return AttentionNode(
        op=op,
        stage=stage,
        batch=None if packed else int(query.shape[0]),
        num_tokens=None if packed else int(query.shape[1]),
        num_q_heads=int(query.shape[-2]),
        num_kv_heads=int(num_kv_heads),
        head_dim=int(query.shape[-1]),
        v_head_dim=int(v_head_dim),
        page_size=page_size,
        window=window,
        softcap=softcap,
        has_sinks=sinks is not None,
        is_tree=tree_mask is not None,
        dtype=query.dtype,
        kv_dtype=kv_dtype or query.dtype,
        max_context=max_context,
    )


def _describe_delta(node: fx.Node, op: str, stage: str) -> DeltaNode:
    query, value = fake(node.args[0]), fake(node.args[2])
    window = op == "gdn_verify"
    return DeltaNode(
        op=op,
        stage=stage,
        batch=int(query.shape[0]) if window else None,
        num_tokens=int(query.shape[1]) if window else None,
        num_k_heads=int(query.shape[-2]),
        num_v_heads=int(value.shape[-2]),
        head_dim=int(query.shape[-1]),
        v_head_dim=int(value.shape[-1]),
        is_tree=window and node.args[11] is not None,
        dtype=query.dtype,
        weight_dtype=fake(node.args[5]).dtype,
    )
