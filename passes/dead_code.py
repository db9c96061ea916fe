"""Which nodes of a Dynamo graph have an effect beyond their value, and so survive dead-code elimination.

FX takes every in-place call for an effect. transformers fills fresh tensors in place (MLA's expanded keys), and those
become dead once attention is absorbed; keeping them would keep the expansion's GEMM.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

_IN_PLACE_NAMES = {"setitem"}


def has_effect(node: fx.Node) -> bool:
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
        return isinstance(node.args[0], fx.Node) and isinstance(node.args[0].meta.get("example_value"), Tensor)
    return node.op == "call_method" and node.target in {"view", "transpose", "__getitem__", "reshape", "unsqueeze"}
