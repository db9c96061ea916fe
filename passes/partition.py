"""Pass 6: cut the graph at its attention ops, delta rules and other writes of caches into segments that Inductor compiles, each
distinct one once.

A cut at an opaque op costs no fusion, because nothing can fuse across it; and between two attention ops every layer
looks alike (output projection, MLP, next norm, next query/key/value projection, rotary embedding), so a model of any depth
has about three distinct segments. Source of the idea: vLLM's piecewise compilation; sharing segments is ours.

Providers are chosen after the cut, so that choosing again (a larger KV pool) leaves every compiled segment as it is.

Needs: a staged graph. Leaves true: the top graph holds generic attention ops and delta rules, cache writes and calls to
segments, nothing else, and every node of it has its fake.
"""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import Tensor, fx
from torch.fx.passes.split_module import split_module

from spec_compile.passes.graph import StageGraph, fake, lazy_code, placeholders
from spec_compile.passes.node_description import needs_provider

_WRITES = tuple(
    getattr(torch.ops.spec_compile, name) for name in ("kv_write", "kv_write_packed", "conv_verify", "conv_prefill")
)


def partition(graph: StageGraph, is_cut: Callable[[fx.Node], bool] | None = None) -> StageGraph:
    """Split ``graph`` into segments between attention ops; placeholders keep their bindings.

    Args:
        is_cut: which nodes stay between segments; None for what providers run and writes of caches.
    """
    is_cut = is_cut or _is_cut
    bindings = {n.name: n.meta["binding"] for n in placeholders(graph.gm) if "binding" in n.meta}
    part_of, current = {}, 0
    for node in graph.gm.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if is_cut(node):
            part_of[node] = current + 1
            current += 2
        else:
            part_of[node] = current
    with lazy_code():
        top = split_module(graph.gm, graph.gm, lambda node: part_of[node], keep_original_order=True)
    _inline_opaque(top, is_cut)
    _give_fakes(top)
    for node in placeholders(top):
        if node.name in bindings:  # of captured graphs; Dynamo's own inputs are bound to nothing
            node.meta["binding"] = bindings[node.name]
    graph.gm = top
    segments = [n for n in top.graph.nodes if n.op == "call_module"]
    keys = {segment_key(top.get_submodule(n.target)) for n in segments}
    graph.note(f"partition: {len(segments)} segments, {len(keys)} distinct")
    return graph


def _is_cut(node: fx.Node) -> bool:
    """Whether a node stays between segments: what providers run, and writes of caches, which Inductor might copy to write."""
    return needs_provider(node) or node.target in _WRITES


def _inline_opaque(top: fx.GraphModule, is_cut: Callable[[fx.Node], bool]) -> None:
    """Replace each one-op submodule that split_module made of an opaque op by the op itself."""
    for call in [n for n in top.graph.nodes if n.op == "call_module"]:
        inner = top.get_submodule(call.target)
        body = [n for n in inner.graph.nodes if n.op not in ("placeholder", "output")]
        if len(body) != 1 or not is_cut(body[0]):
            continue
        values = dict(zip(placeholders(inner), call.args, strict=True))
        with top.graph.inserting_before(call):
            op = top.graph.node_copy(body[0], lambda n, values=values: values[n])
        call.replace_all_uses_with(op)
        top.graph.erase_node(call)
        delattr(top, call.target)
    top.graph.lint()
    top.recompile()


def _give_fakes(top: fx.GraphModule) -> None:
    """The fakes of what segments return, which split_module leaves inside them."""
    for call in [n for n in top.graph.nodes if n.op == "call_module"]:
        (result,) = top.get_submodule(call.target).graph.output_node().args
        if isinstance(result, fx.Node):
            call.meta["example_value"] = fake(result)
            continue
        call.meta["example_value"] = tuple(fake(value) for value in result)
        for user in call.users:
            if user.target is operator.getitem:
                user.meta["example_value"] = fake(result[user.args[1]])


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
