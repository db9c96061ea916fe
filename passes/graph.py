"""The form in which a captured forward travels through the passes: an FX graph and what each of its inputs is bound to."""

from __future__ import annotations

import contextlib
import copy
import logging
from dataclasses import dataclass, field

from torch import Tensor, fx

from spec_compile.ops.torch_private import make_graph_module, use_lazy_graph_module
from spec_compile.passes.dead_code import has_effect

log = logging.getLogger("spec_compile.passes")


@dataclass(frozen=True)
class RuntimeInput:
    """An input that the caller of the stage supplies by name on every call: ``input_ids``, ``page_table``, …"""

    name: str


@dataclass(frozen=True)
class CacheSlot:
    """An input that is bound to one layer's key (``"k"``), value (``"v"``) or latent (``"kv"``) cache, or to a recurrent
    layer's states and window buffers (``"state"``, ``"conv"``, …)."""

    layer: int
    part: str


Binding = Tensor | RuntimeInput | CacheSlot


@dataclass
class StageGraph:
    """A graph module with its inputs' meaning. Passes take one and return one.

    Attributes:
        gm: every placeholder carries ``meta["binding"]``; nodes carry Dynamo's ``meta["example_value"]`` fakes.
        stage: ``"prefill"``, ``"verify"``, ``"draft"`` or ``"draft_extend"``.
        report: what each pass did, one line a pass.
    """

    gm: fx.GraphModule
    stage: str
    report: list[str] = field(default_factory=list)

    def copy(self) -> StageGraph:
        """An independent graph over the same tensors, so that one capture serves several variants of a stage."""
        with lazy_code():
            gm = make_graph_module(self.gm, copy.deepcopy(self.gm.graph))  # copies nodes; their metadata is shared, not cloned
        return StageGraph(gm, self.stage, list(self.report))

    def note(self, line: str) -> None:
        self.report.append(line)
        log.info("[%s] %s", self.stage, line)


def lazy_code() -> contextlib.AbstractContextManager[None]:
    """Graph modules made within write their code when they are first run, not after every pass: most never are.

    torch's own means for it; of ``split_module``, torch 2.11 writes the code at once all the same.
    """
    return use_lazy_graph_module(True)


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def fake(node: fx.Node) -> Tensor:
    """The fake tensor that stands for a node's value."""
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value


def refresh_fakes(gm: fx.GraphModule, changed: set[fx.Node]) -> None:
    """Compute the fakes behind ``changed`` nodes anew, as far as strides change: a view of a view is what segments are compiled
    for, and Inductor checks that."""
    changed = set(changed)
    for node in gm.graph.nodes:
        if node.op in ("placeholder", "output") or not changed.intersection(node.all_input_nodes):
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), fake)
        value = getattr(args[0], node.target)(*args[1:], **kwargs) if node.op == "call_method" else node.target(*args, **kwargs)
        if _strides(value) != _strides(fake(node)):
            changed.add(node)
        node.meta["example_value"] = value


def _strides(value: object) -> object:
    if isinstance(value, Tensor):
        return value.stride()
    return [_strides(part) for part in value] if isinstance(value, tuple | list) else None


def add_runtime_input(graph: StageGraph, name: str, example: Tensor) -> fx.Node:
    """A new placeholder behind the last one, bound to the runtime input ``name``."""
    last = placeholders(graph.gm)[-1]
    with graph.gm.graph.inserting_after(last):
        node = graph.gm.graph.placeholder(name)
    node.meta["example_value"] = example
    node.meta["binding"] = RuntimeInput(name)
    return node


def finish(graph: StageGraph) -> StageGraph:
    """Drop dead nodes and unused placeholders, check the graph, regenerate its code."""
    graph.gm.graph.eliminate_dead_code(is_impure_node=has_effect)
    for node in placeholders(graph.gm):
        if not node.users:
            graph.gm.graph.erase_node(node)
    graph.gm.graph.lint()
    graph.gm.recompile()
    log.debug("[%s] %s", graph.stage, graph.gm.graph)
    return graph
