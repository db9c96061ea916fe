"""Pass 1: gated delta rules take their gates raw, and key heads unrepeated.

A model computes decay and strength of every token with half a dozen small operations, and 5.17's repeats key heads for its
value heads; kernels do both while they load (FlashInfer's know no other form).

Needs: a captured graph whose ``gated_delta_rule`` nodes are fed by g = -exp(A_log) · softplus(a + dt_bias), β = sigmoid(b).
Leaves true: ``gdn_verify`` nodes over ``a``, ``b``, ``A_log`` and ``dt_bias`` in their place.
"""

from __future__ import annotations

import torch
from torch import fx

from spec_compile.errors import CaptureError
from spec_compile.passes.graph import StageGraph, fake, finish

_RULE = torch.ops.spec_compile.gated_delta_rule
_RAW = torch.ops.spec_compile.gdn_verify


def fold_gates(graph: StageGraph) -> StageGraph:
    """Rewrite every ``gated_delta_rule``.

    Raises:
        CaptureError: gates of another form.
    """
    nodes = [n for n in graph.gm.graph.nodes if n.op == "call_function" and n.target is _RULE]
    for node in nodes:
        query, key, value, g, beta, *rest = node.args
        raw = _raw_gates(g, beta)
        if raw is None:
            raise CaptureError(f"the gates of {node.name} are not -exp(A_log) * softplus(a + dt_bias) and sigmoid(b).")
        query, key = _unrepeated(query), _unrepeated(key)
        with graph.gm.graph.inserting_before(node):
            folded = graph.gm.graph.call_function(_RAW, (query, key, value, *raw, *rest))
        folded.meta["example_value"] = fake(node)
        node.replace_all_uses_with(folded)
        graph.gm.graph.erase_node(node)
    if nodes:
        graph.note(f"fold_gates: {len(nodes)} delta rules compute their gates themselves")
    return finish(graph)


def _raw_gates(g: fx.Node, beta: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node, fx.Node] | None:
    """(a, b, A_log, dt_bias), or None."""
    b = _operand(_widened(beta), "sigmoid")
    factors = g.args if _name(g) == "mul" else (None, None)
    a_log = _widened(_operand(_operand(factors[0], "neg"), "exp"))
    inner = _operand(factors[1], "softplus")
    if b is None or a_log is None or inner is None or _name(inner) != "add":
        return None
    a, dt_bias = (_widened(arg) for arg in inner.args)
    return a, b, a_log, dt_bias


def _name(node: object) -> str:
    return getattr(node.target, "__name__", str(node.target)) if isinstance(node, fx.Node) else ""


def _operand(node: object, name: str) -> fx.Node | None:
    """What ``name(x)`` was called with."""
    return node.args[0] if _name(node) == name and len(node.args) == 1 and not node.kwargs else None


def _widened(node: object) -> object:
    """What stands before a conversion to float32, which kernels make themselves."""
    return node.args[0] if _name(node) == "float" else node


def _unrepeated(node: fx.Node) -> fx.Node:
    """Heads before ``repeat_interleave`` gave every value head its own copy."""
    if _name(node) != "repeat_interleave" or node.kwargs.get("dim", node.args[-1]) not in (2, -2):
        return node
    return node.args[0]
