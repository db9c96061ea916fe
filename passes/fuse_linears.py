"""Pass 5: sibling linears on one input become one GEMM.

Needs: linears whose weights (and biases) are plain parameters.
Leaves true: one linear per group, whose parts and their views have the fakes of wider rows; each parameter is a view of the
fused weight, so memory, ``state_dict()`` and ``save_pretrained()`` stay what they were, and an in-place update of a parameter
is seen by the graph.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx, nn

from spec_compile.passes.graph import StageGraph, fake, finish, refresh_fakes


def fuse_linears(graph: StageGraph) -> StageGraph:
    """Fuse every group of two or more linears that read the same tensor (query/key/value, gate/up, …)."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.gm.graph.nodes:
        if _is_plain_linear(node):
            groups.setdefault(node.args[0], []).append(node)
    fused, parts = 0, set()
    for source, linears in groups.items():
        for alike in _fusable(linears):
            parts |= _fuse(graph, source, alike, fused)
            fused += 1
    refresh_fakes(graph.gm, parts)
    graph.note(f"fuse_linears: {fused} groups")
    return finish(graph)


def _is_plain_linear(node: fx.Node) -> bool:
    if node.op != "call_function" or getattr(node.target, "__name__", "") != "linear" or node.kwargs:
        return False
    weight = node.args[1]
    return isinstance(weight, fx.Node) and type(weight.meta.get("binding")) is nn.Parameter and len(weight.users) == 1


def _bias(node: fx.Node) -> fx.Node | None:
    return node.args[2] if len(node.args) > 2 else None


def _fusable(linears: list[fx.Node]) -> list[list[fx.Node]]:
    """Split a group into parts that agree in dtype, input width and in having a bias; parts of one are left alone."""
    parts: dict[tuple, list[fx.Node]] = {}
    for node in linears:
        weight: Tensor = node.args[1].meta["binding"]
        bias = _bias(node)
        if bias is not None and type(bias.meta.get("binding")) is not nn.Parameter:
            continue
        parts.setdefault((weight.dtype, weight.shape[1], bias is None), []).append(node)
    return [part for part in parts.values() if len(part) > 1]


def _fuse(graph: StageGraph, source: fx.Node, linears: list[fx.Node], number: int) -> set[fx.Node]:
    """Put one linear in their place; the nodes that now are its parts, views of wider rows."""
    weight = _fused_input(graph, [n.args[1] for n in linears], f"fused_weight_{number}")
    args: tuple = (source, weight)
    if _bias(linears[0]) is not None:
        args += (_fused_input(graph, [_bias(n) for n in linears], f"fused_bias_{number}"),)
    sizes = [n.args[1].meta["binding"].shape[0] for n in linears]
    values = [fake(n) for n in linears]
    with graph.gm.graph.inserting_before(linears[0]):
        wide = graph.gm.graph.call_function(torch.nn.functional.linear, args)
        wide.meta["example_value"] = torch.cat(values, -1)
        split = graph.gm.graph.call_method("split", (wide, sizes, -1))
        split.meta["example_value"] = fake(wide).split(sizes, -1)
        parts = set()
        for i, node in enumerate(linears):
            part = graph.gm.graph.call_function(operator.getitem, (split, i))
            part.meta["example_value"] = fake(split)[i]
            node.replace_all_uses_with(part)
            parts.add(part)
    for node in linears:
        graph.gm.graph.erase_node(node)
    return parts


def _fused_input(graph: StageGraph, nodes: list[fx.Node], name: str) -> fx.Node:
    fused = fuse_parameters([n.meta["binding"] for n in nodes])
    with graph.gm.graph.inserting_after(nodes[-1]):
        node = graph.gm.graph.placeholder(name)
    with fake(nodes[0]).fake_mode:
        node.meta["example_value"] = torch.empty(fused.shape, dtype=fused.dtype, device=fused.device)
    node.meta["binding"] = fused
    return node


def fuse_parameters(parameters: list[nn.Parameter]) -> Tensor:
    """One tensor holding all ``parameters`` stacked along dim 0, which become views of it.

    Parameters that already lie behind each other in one storage (another stage fused them) are not moved.
    """
    first = parameters[0]
    rows = sum(p.shape[0] for p in parameters)
    offset = first.storage_offset()
    adjacent = True
    for p in parameters:
        same_storage = p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        adjacent = adjacent and same_storage and p.storage_offset() == offset and p.is_contiguous()
        offset += p.numel()
    shape = (rows, *first.shape[1:])
    if adjacent:
        return torch.as_strided(first.detach(), shape, first.stride(), first.storage_offset())
    with torch.no_grad():
        fused = torch.cat([p.detach() for p in parameters])
        start = 0
        for p in parameters:
            p.data = fused[start : start + p.shape[0]]
            start += p.shape[0]
    return fused
