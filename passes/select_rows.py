"""Pass of any graph: where only some rows of a linear's result are read, they are selected before it is computed.

``model(ids).logits[:, -1]`` inside a compiled function otherwise computes the vocabulary's logits for every token of a prompt.

Needs: a graph with fakes. Leaves true: the same values within rounding (a matrix library may add a shorter product up in
another order); nothing else that the graph computes or writes changes.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from spec_compile.passes.graph import StageGraph, fake

_WITH_NUMBERS = {operator.truediv, operator.mul, operator.add, operator.sub, torch.tanh}
_METHODS = {"float", "tanh", "double", "half", "bfloat16"}


def select_rows(graph: StageGraph) -> StageGraph:
    """Move each ``linear(x, …)[rows]``, elementwise steps between them included, to ``linear(x[rows], …)``."""
    moved = 0
    for node in list(graph.gm.graph.nodes):
        if _selects_rows(node) and (chain := _chain_to_linear(node.args[0])) is not None:
            _move(graph.gm.graph, node, chain)
            moved += 1
    if moved:
        graph.note(f"select_rows: {moved} linears compute the rows alone that are read of them")
        graph.gm.graph.lint()
        graph.gm.recompile()
    return graph


def _selects_rows(node: fx.Node) -> bool:
    """An index of numbers and slices that leaves the last dimension whole, and selects something."""
    if node.op != "call_function" or node.target is not operator.getitem or not isinstance(fake(node.args[0]), Tensor):
        return False
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if not all(type(part) is int or (type(part) is slice and _is_constant(part)) for part in index):
        return False
    if len(index) == fake(node.args[0]).dim():
        if index[-1] != slice(None):
            return False
        index = index[:-1]
    return any(part != slice(None) and part != slice(0, None) for part in index)


def _is_constant(part: slice) -> bool:
    return all(bound is None or type(bound) is int for bound in (part.start, part.stop, part.step))


def _chain_to_linear(node: fx.Node) -> list[fx.Node] | None:
    """The linear and the elementwise steps behind it, in order, each read by the next alone."""
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and len(node.users) == 1:
        chain.append(node)
        if node.target is F.linear:
            return chain[::-1] if isinstance(node.args[0], fx.Node) and not node.kwargs else None
        if not _is_elementwise(node):
            return None
        node = node.args[0]
    return None


def _is_elementwise(node: fx.Node) -> bool:
    """A step whose only tensor is its first argument."""
    if node.op == "call_method":
        known = node.target in _METHODS or (node.target == "to" and all(isinstance(a, torch.dtype) for a in node.args[1:]))
    else:
        known = node.target in _WITH_NUMBERS
    return known and not node.kwargs and not any(isinstance(arg, fx.Node) for arg in node.args[1:])


def _move(graph: fx.Graph, selection: fx.Node, chain: list[fx.Node]) -> None:
    linear = chain[0]
    source, index = linear.args[0], selection.args[1]
    with graph.inserting_before(linear):
        rows = graph.call_function(operator.getitem, (source, index))
    rows.meta["example_value"] = fake(source)[index]
    linear.update_arg(0, rows)
    for node in chain:
        args = fx.map_arg(node.args, fake)
        value = getattr(args[0], node.target)(*args[1:]) if node.op == "call_method" else node.target(*args)
        node.meta["example_value"] = value
    selection.replace_all_uses_with(chain[-1])
    graph.erase_node(selection)
