"""The form in which a captured forward travels through the passes: an FX graph and what each of its inputs is bound to."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

log = logging.getLogger("spec_compile.passes")


@dataclass(frozen=True)
class RuntimeInput:
    """An input that the caller of the stage supplies by name on every call: ``input_ids``, ``page_table``, …"""

    name: str


@dataclass(frozen=True)
class CacheSlot:
    """An input that is bound to one layer's key (``"k"``), value (``"v"``) or latent (``"kv"``) cache."""

    layer: int
    part: str


Binding = Tensor | RuntimeInput | CacheSlot


@dataclass
class StageGraph:
    """A graph module with its inputs' meaning. Passes take one and return one.

    Attributes:
        gm: every placeholder carries ``meta["binding"]``; nodes carry Dynamo's ``meta["example_value"]`` fakes.
        stage: ``"prefill"``, ``"verify"`` or ``"draft"``.
        report: what each pass did, one line a pass.
    """

    gm: fx.GraphModule
    stage: str
    report: list[str] = field(default_factory=list)

    def copy(self) -> StageGraph:
        """An independent graph over the same tensors, so that one capture serves several variants of a stage."""
        gm = fx.GraphModule(self.gm, copy.deepcopy(self.gm.graph))  # copies nodes; their metadata is shared, not cloned
        return StageGraph(gm, self.stage, list(self.report))

    def note(self, line: str) -> None:
        self.report.append(line)
        log.info("[%s] %s", self.stage, line)


def placeholders(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "placeholder"]


def fake(node: fx.Node) -> Tensor:
    """The fake tensor that stands for a node's value."""
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value


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
    graph.gm.graph.eliminate_dead_code(is_impure_node=_has_effect)
    for node in placeholders(graph.gm):
        if not node.users:
            graph.gm.graph.erase_node(node)
    graph.gm.graph.lint()
    graph.gm.recompile()
    return graph


_IN_PLACE_NAMES = {"setitem"}


def _has_effect(node: fx.Node) -> bool:
    """Whether a node must stay although nobody uses its result: ops that write caches or other tensors."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op == "call_function":
        if isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
            op = node.target if isinstance(node.target, torch._ops.OpOverload) else node.target.default
            return op._schema.is_mutable and bool(_writes_something_live(node))
        return getattr(node.target, "__name__", "") in _IN_PLACE_NAMES and bool(_writes_something_live(node))
    if node.op == "call_method":
        in_place = node.target.endswith("_") and not node.target.endswith("__")
        return in_place and bool(_writes_something_live(node))
    return node.op == "call_module"


def _writes_something_live(node: fx.Node) -> bool:
    """An in-place write on a fresh tensor that nobody else reads (HF's MLA key expansion) is dead; any other write lives."""
    target = node.args[0] if node.args else None
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return True  # our cache-writing ops
    seen: set[fx.Node] = set()
    stack = [target]
    while stack:
        base = stack.pop()
        if not isinstance(base, fx.Node) or base in seen:
            continue
        seen.add(base)
        if base.op == "placeholder":
            return True
        others = [user for user in base.users if user is not node and user not in seen]
        if any(not _is_dead_write(user, seen) for user in others):
            return True
        if _is_view(base):
            stack.append(base.args[0])
    return False


def _is_dead_write(user: fx.Node, family: set[fx.Node]) -> bool:
    """A user that only views or overwrites the same dead tensor and is itself read by nobody else."""
    if user.op == "output":
        return False
    if _is_view(user) or (user.op == "call_method" and user.target == "copy_"):
        return all(u in family or _is_dead_write(u, family | {user}) for u in user.users)
    return False


def _is_view(node: fx.Node) -> bool:
    if node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem":
        return isinstance(node.args[0], fx.Node) and isinstance(fake(node.args[0]), Tensor)
    return node.op == "call_method" and node.target in {"view", "transpose", "__getitem__", "reshape", "unsqueeze"}
