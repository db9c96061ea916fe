"""Pass 2: turn the captured forward into its stage's graph.

Needs: a captured graph whose attention nodes are the generic ``attention`` / ``mla_attention``, whose recurrent layers are
``conv_verify`` and ``gdn_verify``; it may also write caches by ``kv_write``. Leaves true: prefill graphs hold only packed ops
and take ``cu_seqlens``; window graphs (verify, draft) keep the ops over windows, as trees (``tree_mask`` becomes a runtime
input) or as chains.
"""

from __future__ import annotations

import torch
from torch import fx

from spec_compile.ops import OPS
from spec_compile.ops.torch_private import schema_of
from spec_compile.passes.graph import StageGraph, add_runtime_input, fake, finish, placeholders

_ATTENTION = (OPS.attention, OPS.mla_attention)
_RECURRENT = (OPS.conv_verify, OPS.gdn_verify)
# An op over windows, its form over packed prompts, and how many of its arguments come first that have an entry a token.
_PACKED = {
    OPS.attention: (OPS.prefill_attention, 3),
    OPS.mla_attention: (OPS.mla_prefill_attention, 2),
    OPS.kv_write: (OPS.kv_write_packed, 2),
    OPS.conv_verify: (OPS.conv_prefill, 1),
    OPS.gdn_verify: (OPS.gdn_prefill, 5),
}


def stage(graph: StageGraph, *, tree: bool = False) -> StageGraph:
    """Specialise ``graph`` for ``graph.stage``.

    Args:
        tree: verify a tree of drafts: every attention node and recurrent layer reads the runtime input ``tree_mask`` int32
            [B, N, W].
    """
    calls = [n for n in graph.gm.graph.nodes if n.op == "call_function"]
    nodes = [n for n in calls if n.target in _ATTENTION]
    recurrent = [n for n in calls if n.target in _RECURRENT]
    if graph.stage == "prefill":
        _pack(graph, [n for n in calls if n.target in _PACKED])
    elif tree:
        _attach_tree_mask(graph, nodes + recurrent)
    shape = "packed prompts" if graph.stage == "prefill" else "a tree" if tree else "a chain"
    delta = f", {len(recurrent) // len(_RECURRENT)} recurrent layers" if recurrent else ""
    graph.note(f"stage: {len(nodes)} attention nodes{delta} over {shape}")
    return finish(graph)


def _argument_names(op: object) -> list[str]:
    return [argument.name for argument in schema_of(op.default).arguments]


def _pack(graph: StageGraph, nodes: list[fx.Node]) -> None:
    """op(q [1, T, H, D], …, cache_len, tree_mask, …) -> packed op(q [T, H, D], …, cu_seqlens, …)[None]. Arguments keep their
    names; those that speak of windows have none over there."""
    any_input = next(n for n in placeholders(graph.gm) if fake(n) is not None and isinstance(fake(n), torch.Tensor))
    cu_seqlens = add_runtime_input(graph, "cu_seqlens", fake(any_input).new_empty(2, dtype=torch.int32))
    for node in nodes:
        packed, num_new = _PACKED[node.target]
        given = dict(zip(_argument_names(node.target), node.args, strict=True)) | {"cu_seqlens": cu_seqlens}
        with graph.gm.graph.inserting_before(node):
            for name in _argument_names(node.target)[:num_new]:
                squeezed = graph.gm.graph.call_method("squeeze", (given[name], 0))
                squeezed.meta["example_value"] = fake(given[name]).squeeze(0)
                given[name] = squeezed
            # A bare write has no window: it keeps everything, the packed op's default.
            wanted = [argument for argument in schema_of(packed.default).arguments if not argument.has_default_value()]
            op = graph.gm.graph.call_function(packed, tuple(given[argument.name] for argument in wanted))
            if fake(node) is not None:  # writes have no value
                op.meta["example_value"] = fake(node).squeeze(0)
                restored = graph.gm.graph.call_method("unsqueeze", (op, 0))
                restored.meta["example_value"] = fake(node)
                node.replace_all_uses_with(restored)
        graph.gm.graph.erase_node(node)


def _attach_tree_mask(graph: StageGraph, nodes: list[fx.Node]) -> None:
    first = fake(nodes[0].args[0])  # [B, N, …]
    words = (first.shape[1] + 31) // 32
    tree_mask = add_runtime_input(graph, "tree_mask", first.new_empty(first.shape[0], first.shape[1], words, dtype=torch.int32))
    for node in nodes:
        node.update_arg(_argument_names(node.target).index("tree_mask"), tree_mask)
