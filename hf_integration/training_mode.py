"""Whether a model computes otherwise in the modes that its modules are in now than in eval mode, in which it was captured.

What a mode changes is not read off known layers alone: the forward is captured in it, too, and the two graphs are compared. So
noise in a router, layers that are skipped and hooks that act in training count as much as dropout does.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from spec_compile.ops.torch_private import MODULES
from spec_compile.passes.graph import StageGraph

_DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def training_flags(model: nn.Module) -> tuple[int, ...]:
    """Ids of the modules that are in training mode, and how many of these are to checkpoint activations, which releases before
    transformers 5.24 do without gradients, too. Walks ``__dict__`` by hand, as it is asked in every call."""
    found: list[int] = []
    _walk(model, found)
    return tuple(found)


def _walk(module: nn.Module, found: list[int]) -> None:
    own = module.__dict__
    if own["training"]:
        found.append(id(module))
        if own.get("gradient_checkpointing"):
            found.append(-1)
    for child in own[MODULES].values():
        if child is not None:
            _walk(child, found)


def active_dropout(model: nn.Module) -> str | None:
    """A dropout layer in training mode that drops something, by name; None where there is none."""
    for name, module in model.named_modules():
        if module.training and isinstance(module, _DROPOUT) and module.p > 0:
            return f"{name} ({type(module).__name__}, p={module.p})"
    return None


def what_differs(evaluated: StageGraph, as_it_is: StageGraph) -> str | None:
    """What the second graph computes that the first does not, by its module; None where both compute the same.

    Args:
        evaluated, as_it_is: one forward, captured in eval mode and in the modes of now.
    """
    steps = [[node for node in graph.gm.graph.nodes if not _is_inert(node)] for graph in (evaluated, as_it_is)]
    numbers: dict[fx.Node, object] = {}
    for before, now in zip(*steps, strict=False):
        if not _alike(before, now, numbers):
            return _place(now)
        numbers[before] = numbers[now] = len(numbers)
    return None if len(steps[0]) == len(steps[1]) else "its forward"


def _is_inert(node: fx.Node) -> bool:
    """Dropout that drops nothing: its value is its input's."""
    if node.op != "call_function" or node.target not in (nn.functional.dropout, torch.dropout):
        return False
    given = dict(zip(("input", "p", "training"), node.args, strict=False)) | node.kwargs
    return given.get("p", 0.5) == 0 or not given.get("training", given.get("train", True))


def _alike(before: fx.Node, now: fx.Node, numbers: dict[fx.Node, object]) -> bool:
    if before.op != now.op:
        return False
    if before.op == "placeholder":
        return _same_binding(before.meta["binding"], now.meta["binding"])

    def number(node: fx.Node) -> object:
        while _is_inert(node):
            node = node.all_input_nodes[0]
        return f"%{numbers[node]}"

    arguments = [repr(fx.map_arg((node.args, node.kwargs), number)) for node in (before, now)]
    return before.target == now.target and arguments[0] == arguments[1]


def _same_binding(before: object, now: object) -> bool:
    if not (isinstance(before, Tensor) and isinstance(now, Tensor)):
        return type(before) is type(now) and before == now
    if (before.shape, before.dtype, before.device) != (now.shape, now.dtype, now.device):
        return False
    return before.data_ptr() == now.data_ptr() or torch.equal(before, now)  # constants are made anew by every capture


def _place(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return f"its {stack[-1][1].__name__.split('.')[-1]}" if stack and hasattr(stack[-1][1], "__name__") else "its forward"
