"""Pass 6: cut the graph at its attention ops into segments that Inductor compiles, each distinct one once.

A cut at an opaque op costs no fusion, because nothing can fuse across it; and between two attention ops every layer
looks alike (output projection, MLP, next norm, next query/key/value projection, rotary embedding), so a model of any depth
has about three distinct segments. Source of the idea: vLLM's piecewise compilation; sharing segments is ours.

Plans (see ``lower``) are cut out with the attention op they stand before, so that a layer with a plan before it has the
same segments as one without.

Needs: ``lower`` has run. Leaves true: the top graph holds provider ops and calls to segment modules, nothing else.
"""

from __future__ import annotations

from torch import Tensor, fx
from torch.fx.passes.split_module import split_module

from spec_compile.passes.graph import StageGraph, fake, placeholders


def partition(graph: StageGraph) -> StageGraph:
    """Split ``graph`` into segments between attention ops; placeholders keep their bindings."""
    bindings = {n.name: n.meta["binding"] for n in placeholders(graph.gm)}
    part_of, current = {}, 0
    for node in graph.gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if _is_providers(node):
            part_of[node] = current + 1
            if not _is_plan(node):  # a plan shares the part of the attention op behind it
                current += 2
        else:
            part_of[node] = current
    top = split_module(graph.gm, graph.gm, lambda node: part_of[node], keep_original_order=True)
    _inline_provider_ops(top)
    for node in placeholders(top):
        node.meta["binding"] = bindings[node.name]
    graph.gm = top
    segments = [n for n in top.graph.nodes if n.op == "call_module"]
    keys = {segment_key(top.get_submodule(n.target)) for n in segments}
    graph.note(f"partition: {len(segments)} segments, {len(keys)} distinct")
    return graph


def _is_plan(node: fx.Node) -> bool:
    return "plan" in node.meta


def _is_providers(node: fx.Node) -> bool:
    return "attention_node" in node.meta or _is_plan(node)


def _inline_provider_ops(top: fx.GraphModule) -> None:
    """Replace each submodule that split_module made of an attention op, and of plans before it, by these ops themselves."""
    for call in [n for n in top.graph.nodes if n.op == "call_module"]:
        inner = top.get_submodule(call.target)
        body = [n for n in inner.graph.nodes if n.op not in ("placeholder", "output")]
        if not all(_is_providers(node) for node in body):
            continue
        values = dict(zip(placeholders(inner), call.args, strict=True))
        with top.graph.inserting_before(call):
            for node in body:
                values[node] = top.graph.node_copy(node, values.__getitem__)
        (result,) = inner.graph.output_node().args
        if isinstance(result, fx.Node):
            call.replace_all_uses_with(values[result])
        else:  # a plan that later layers use too
            for getitem in list(call.users):
                getitem.replace_all_uses_with(values[result[getitem.args[1]]])
                top.graph.erase_node(getitem)
        top.graph.erase_node(call)
        delattr(top, call.target)
    top.graph.lint()
    top.recompile()


def segment_key(segment: fx.GraphModule) -> str:
    """A text that two segments share exactly when one compiled artifact serves both."""
    names: dict[fx.Node, str] = {}
    lines = []
    for i, node in enumerate(segment.graph.nodes):
        names[node] = f"%{i}"
        if node.op == "placeholder":
            lines.append(f"in {_describe(fake(node))}")
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _Name(names[n]))
        target = node.target if isinstance(node.target, str) else f"{getattr(node.target, '__module__', '')}.{node.target}"
        lines.append(f"{node.op} {target} {args} {kwargs}")
    return "\n".join(lines)


class _Name(str):
    """A node's name inside ``segment_key``, printed without quotes so that it cannot collide with a string argument."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.stride()} {value.device}"
    return f"{type(value).__name__} {value}"
