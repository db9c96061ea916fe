"""Passes that hold for any graph that Dynamo hands to a backend, whose caller expects the very outputs.

There is no paged cache, so attention stays what the model's code calls, and no stage, so nothing may be left out that the
caller reads. Parameters are inputs like others and may be new ones in the next call (``inline_inbuilt_nn_modules``), which
is why ``fuse_linears`` has no place here: a fused weight is a copy that would not follow them, and moving parameters into one
storage behind the back of whoever flattened or shares them (FSDP, DeepSpeed) is not a backend's to do. Dead code is Inductor's
business: it looks when writes have become values, and knows of effects (``relu(x, inplace=True)``) what a graph does not tell.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef

from spec_compile.ops.torch_private import HigherOrderOperator, size_hint
from spec_compile.passes.graph import StageGraph, fake, placeholders
from spec_compile.passes.narrow_logits import greedy_ids
from spec_compile.passes.partition import partition
from spec_compile.passes.select_rows import select_rows

# Entering a segment costs the host some 0.1 ms (a CPU, torch 2.13), about what a layer takes a GPU for one token: calls of
# fewer tokens than this stay whole.
LEAST_TOKENS = 64
_LEAST_CUTS = 4  # shallower graphs are compiled about as fast in one piece


def prepare_any(graph: StageGraph, *, cut: bool) -> StageGraph:
    """A Dynamo graph, in place or cut into segments between its attention calls.

    Args:
        cut: segments may be compiled apart, those that are alike once.
    """
    graph = select_rows(graph)
    graph = split_argmax(graph)
    if cut and (reason := why_whole(graph)) is not None:
        graph.note(f"partition: left whole, {reason}")
    elif cut:
        whole = graph.gm
        graph = partition(graph, is_attention)
        if (strange := _strange_value(graph.gm)) is not None:
            graph.gm = whole
            graph.note(f"partition: left whole after all, {strange} is passed from part to part")
    return graph


def _strange_value(top: fx.GraphModule) -> str | None:
    """What leaves a segment and is neither a tensor nor a size."""
    for call in top.graph.nodes:
        if call.op == "call_module":
            parts = fake(call) if isinstance(fake(call), tuple) else (fake(call),)
            if odd := [part for part in parts if not isinstance(part, Tensor | int | torch.SymInt)]:
                return f"a {type(odd[0]).__name__}"
    return None


def is_attention(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is F.scaled_dot_product_attention


def split_argmax(graph: StageGraph) -> StageGraph:
    """The argmax of few wide rows goes over slices, as ``narrow_logits`` has it: Inductor takes one program a row."""
    split = 0
    for node in [n for n in graph.gm.graph.nodes if _is_row_argmax(n)]:
        with graph.gm.graph.inserting_before(node):
            ids = greedy_ids(graph.gm.graph, node.args[0])
        if ids.target == "argmax":  # too many rows, or a width that nothing divides
            graph.gm.graph.erase_node(ids)
            continue
        node.replace_all_uses_with(ids)
        graph.gm.graph.erase_node(node)
        split += 1
    if split:
        graph.note(f"split_argmax: {split} over slices of their rows")
        graph.gm.recompile()
    return graph


def _is_row_argmax(node: fx.Node) -> bool:
    """``x.argmax(-1)`` or ``torch.argmax(x, dim=-1)`` of wide rows."""
    if not (node.target == "argmax" if node.op == "call_method" else node.target is torch.argmax):
        return False
    value = fake(node.args[0]) if len(node.args) in (1, 2) and isinstance(node.args[0], fx.Node) else None
    given = dict(zip(("input", "dim"), node.args, strict=False)) | node.kwargs
    if not isinstance(value, Tensor) or value.dim() == 0 or not set(given) <= {"input", "dim", "keepdim"}:
        return False
    last = given.get("dim") in (-1, value.dim() - 1) and not given.get("keepdim", False)
    return last and isinstance(value.shape[-1], int) and value.shape[-1] >= 8 * 1024


def why_whole(graph: StageGraph) -> str | None:
    """Why a graph is not cut; None where it is.

    Segments are compiled as functions of their own. So no mode (autocast) may reach over a cut, nothing but calls may stand
    in the graph, and where inputs are written, no two of them may share memory: of that Dynamo must make guards.
    """
    cuts = [node for node in graph.gm.graph.nodes if is_attention(node)]
    if len(cuts) < _LEAST_CUTS:
        return f"it calls attention {len(cuts)} times"
    query = fake(cuts[0].args[0])  # [B, H, S, D]
    if size_hint(query.shape[0] * query.shape[-2]) < LEAST_TOKENS:
        return f"it is called with fewer than {LEAST_TOKENS} tokens"
    if (strange := next(_strange(graph.gm), None)) is not None:
        return f"{strange} reaches over its parts"
    tensors = [value for node in placeholders(graph.gm) if isinstance(value := fake(node), Tensor)]
    return "some of its inputs share memory" if len(set(memory(tensors))) < len(tensors) else None


def memory(tensors: list[Tensor]) -> list[StorageWeakRef]:
    """What compares equal for tensors over one storage."""
    return [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]


# A pair of these switches something for what stands between them.
_BEGINS, _ENDS = re.compile("_enter_autocast|_.*increment_nesting"), re.compile("_exit_autocast|_.*decrement_nesting")
# In place, and what Dynamo noted of their operand's shape is what it was afterwards.
_RESHAPES = {f"{name}_" for name in ("resize", "resize_as", "set", "t", "squeeze", "unsqueeze", "transpose", "as_strided")}
_RESHAPES |= {"swapaxes_", "swapdims_"}


def _strange(gm: fx.GraphModule) -> Iterator[str]:
    """Nodes that are not mere computation, or switch something that is still on at a cut."""
    depth = 0
    for node in gm.graph.nodes:
        name = getattr(node.target, "__name__", str(node.target))
        if node.op in ("placeholder", "output"):
            continue
        if _BEGINS.fullmatch(name) or _ENDS.fullmatch(name):
            depth += 1 if _BEGINS.fullmatch(name) else -1
        elif depth and is_attention(node):
            yield "a mode such as autocast"
        elif (
            node.op not in ("call_function", "call_method")
            or isinstance(node.target, HigherOrderOperator)
            or name in _RESHAPES
            or (node.target is not operator.setitem and node.is_impure(impure_random=False))
        ):
            yield name
