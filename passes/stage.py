"""Pass 1: turn the captured forward into its stage's graph.

Needs: a captured graph whose attention nodes are the generic ``attention`` / ``mla_attention``; it may also write caches by
``kv_write``. Leaves true: prefill graphs hold only packed ops and take ``cu_seqlens``; window graphs (verify, draft) keep the
append-and-attend ops, as trees (``tree_mask`` becomes a runtime input) or as chains.
"""

from __future__ import annotations

import torch

from spec_compile.ops import attention as attention_ops  # registers the ops that are staged
from spec_compile.ops import kv_cache as kv_cache_ops
from spec_compile.passes.graph import StageGraph, add_runtime_input, fake, finish, placeholders

__all__ = ["attention_ops", "kv_cache_ops", "stage"]

_ATTENTION = torch.ops.spec_compile.attention
_MLA = torch.ops.spec_compile.mla_attention
_WRITE = torch.ops.spec_compile.kv_write
_PACKED = {
    _ATTENTION: torch.ops.spec_compile.prefill_attention,
    _MLA: torch.ops.spec_compile.mla_prefill_attention,
    _WRITE: torch.ops.spec_compile.kv_write_packed,
}


def stage(graph: StageGraph, *, tree: bool = False) -> StageGraph:
    """Specialise ``graph`` for ``graph.stage``.

    Args:
        tree: verify a tree of drafts: every attention node reads the runtime input ``tree_mask`` int32 [B, N, W].
    """
    nodes = [n for n in graph.gm.graph.nodes if n.op == "call_function" and n.target in (_ATTENTION, _MLA)]
    if graph.stage == "prefill":
        _pack(graph, [n for n in graph.gm.graph.nodes if n.op == "call_function" and n.target in _PACKED])
    elif tree:
        _attach_tree_mask(graph, nodes)
    shape = "packed prompts" if graph.stage == "prefill" else "a tree" if tree else "a chain"
    graph.note(f"stage: {len(nodes)} attention nodes over {shape}")
    return finish(graph)


def _pack(graph: StageGraph, nodes: list[torch.fx.Node]) -> None:
    """attention(q [1, T, H, D], …, cache_len, tree_mask, …) -> prefill_attention(q [T, H, D], …, cu_seqlens, …)[None]."""
    any_input = next(n for n in placeholders(graph.gm) if fake(n) is not None and isinstance(fake(n), torch.Tensor))
    cu_seqlens = add_runtime_input(graph, "cu_seqlens", fake(any_input).new_empty(2, dtype=torch.int32))
    for node in nodes:
        num_new = 3 if node.target is _ATTENTION else 2  # q, k, v or q, kv or k, v
        caches = 1 if node.target is _MLA else 2
        new, (cache_args, rest) = (
            node.args[:num_new],
            (node.args[num_new : num_new + caches + 1], node.args[num_new + caches + 3 :]),
        )
        with graph.gm.graph.inserting_before(node):
            packed = []
            for value in new:
                squeezed = graph.gm.graph.call_method("squeeze", (value, 0))
                squeezed.meta["example_value"] = fake(value).squeeze(0)
                packed.append(squeezed)
            op = graph.gm.graph.call_function(_PACKED[node.target], (*packed, *cache_args, cu_seqlens, *rest))
            if fake(node) is not None:  # writes have no value
                op.meta["example_value"] = fake(node).squeeze(0)
                restored = graph.gm.graph.call_method("unsqueeze", (op, 0))
                restored.meta["example_value"] = fake(node)
                node.replace_all_uses_with(restored)
        graph.gm.graph.erase_node(node)


def _attach_tree_mask(graph: StageGraph, nodes: list[torch.fx.Node]) -> None:
    query = fake(nodes[0].args[0])  # [B, N, H, D]
    words = (query.shape[1] + 31) // 32
    tree_mask = add_runtime_input(graph, "tree_mask", query.new_empty(query.shape[0], query.shape[1], words, dtype=torch.int32))
    for node in nodes:
        position = 5 if node.target is _MLA else 7
        node.update_arg(position, tree_mask)
