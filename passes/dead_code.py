"""Which nodes of a Dynamo graph have an effect beyond their value, and so survive dead-code elimination.

FX takes every in-place call for an effect. transformers fills fresh tensors in place (MLA's expanded keys), and those
become dead once attention is absorbed; keeping them would keep the expansion's GEMM.
"""

from __future__ import annotations

import operator

from torch import Tensor, fx

from spec_compile.ops.torch_private import OpOverload, OpOverloadPacket, schema_of

_ALLOCATIONS = {"new_empty", "new_zeros", "empty", "empty_like", "zeros", "zeros_like"}
_IN_PLACE_OPERATORS = {"setitem", *(f"i{name}" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"))}
_IN_PLACE_OPERATORS |= {f"i{name}" for name in ("and", "or", "xor", "lshift", "rshift", "matmul")}
_KEYWORD_OPERATORS = {operator.and_, operator.or_, operator.is_, operator.not_}  # their underscore evades a keyword
_VIEWS = {"view", "transpose", "__getitem__", "reshape", "unsqueeze"}


def has_effect(node: fx.Node) -> bool:
    """Whether a node must stay although nobody uses its result: ops that write caches or other tensors."""
    if node.op in ("placeholder", "output", "call_module"):
        return True
    if node.op == "call_function" and isinstance(node.target, OpOverload | OpOverloadPacket):
        op = node.target if isinstance(node.target, OpOverload) else node.target.default
        return schema_of(op).is_mutable  # our cache-writing ops
    return _is_in_place(node) and not _writes_what_is_never_read(node)


def _writes_what_is_never_read(write: fx.Node) -> bool:
    """A write into memory that was allocated in the graph, and that only views and other writes ever touch.

    Whatever is not known to be an allocation or a view is taken for something that shares memory with a live tensor.
    """
    root = write.args[0]
    while isinstance(root, fx.Node) and _is_view(root):
        root = root.args[0]
    if not isinstance(root, fx.Node) or _name(root) not in _ALLOCATIONS:
        return False
    seen: set[fx.Node] = set()
    stack = [root]
    while stack:
        alias = stack.pop()
        seen.add(alias)
        for user in alias.users:
            reads = not (_is_view(user) or _is_in_place(user)) or user.args[0] is not alias
            if reads or any(alias is n for n in _nodes(user.args[1:], user.kwargs)):
                return False
            if user not in seen:
                stack.append(user)
    return True


def _nodes(*args: object) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(args, found.append)
    return found


def _name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", str(node.target)) if node.op in ("call_function", "call_method") else ""


def _is_in_place(node: fx.Node) -> bool:
    name = _name(node)
    if node.target in _KEYWORD_OPERATORS:
        return False
    return name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))


def _is_view(node: fx.Node) -> bool:
    if node.op == "call_function":
        return _name(node) == "getitem" and isinstance(node.args[0].meta.get("example_value"), Tensor)
    return node.op == "call_method" and node.target in _VIEWS
