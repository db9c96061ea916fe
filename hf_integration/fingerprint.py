"""What a captured graph takes for granted about a module, cheap enough to be checked on every call."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel

from spec_compile.hf_integration.binding import own_class
from spec_compile.hf_integration.forward_wrappers import patched_forward
from spec_compile.hf_integration.python_state import Attributes, Remembered, changed_attributes, differences, equal, remember
from spec_compile.hf_integration.transformers_private import PRIVATE_NOTES, PRIVATE_SETTINGS
from spec_compile.ops.torch_private import (
    BUFFERS,
    COMPILED_CALL,
    FORWARD_HOOKS,
    FORWARD_PRE_HOOKS,
    MODULES,
    PARAMETERS,
    DropoutNd,
    global_hooks,
)

# The dictionaries that every module has; what is in them is looked at by itself.
_TABLES = frozenset(nn.Module().__dict__)
# What transformers, trainers and generate() itself leave on models and configs, and no forward in eval mode reads.
_IDLE_ATTRIBUTES = _TABLES | {
    "spec", "generation_config", "gradient_checkpointing", "warnings_issued", "model_tags", "rope_deltas", "name_or_path",
    "forward",  # what is patched there is looked at by itself
    *PRIVATE_NOTES,
    COMPILED_CALL,  # runs the same forward
}  # fmt: skip
_IDLE_SETTINGS = frozenset({
    "use_cache", "pad_token_id", "eos_token_id", "bos_token_id", "name_or_path", "architectures", "id2label",
    "label2id", "transformers_version", "return_dict", "output_hidden_states", "output_attentions", "dtype",
    *PRIVATE_SETTINGS,
})  # fmt: skip
_MANY_BASES = (nn.Module, PreTrainedModel, GenerationMixin, object)  # what generate() and trainers need of them is no forward


@dataclass
class _Module:
    """A module of the model as it was."""

    attributes: Attributes
    module: nn.Module
    kind: type
    children: dict[str, nn.Module | None]
    tensors: dict[str, tuple]
    hooks: tuple[tuple[str, int], ...]
    forward: object | None  # patched on the instance


@dataclass
class Fingerprint:
    """A model as it was when its graphs were captured; see ``what_changed``.

    Attributes:
        bound: ids of the tensors that graphs hold: of plain attributes, only those count.
    """

    modules: list[_Module] = field(default_factory=list)
    state: Remembered = field(default_factory=Remembered)
    classes: list[tuple[type, dict[str, object]]] = field(default_factory=list)
    global_hooks: tuple[tuple[str, int], ...] = ()
    bound: frozenset[int] = frozenset()


def fingerprint(model: nn.Module, bound: frozenset[int] = frozenset()) -> Fingerprint:
    """What graphs do not see of ``model``: where its tensors lie and how, its modules and their classes, forward hooks,
    numbers and functions that a forward reads: attributes, configs, closures of hooks, methods and what those call.

    In-place changes of tensors' values are seen by the graphs and are no change here.
    """
    found = Fingerprint(bound=bound, global_hooks=_global_hooks())
    classes: dict[type, None] = {}
    seen: set[int] = set()
    _walk(model, "", found, classes, seen)
    for cls in classes:
        members = _members(cls)
        found.classes.append((cls, members))
        for name, value in members.items():
            remember(found.state, f"{cls.__name__}.{name}", _function(value))
    for name, hook in _hooks_of(*global_hooks().values()):
        remember(found.state, f"a global {name}", hook)
    return found


def what_changed(before: Fingerprint) -> Iterator[str]:
    """Names of what is no longer as it was, one by one; nothing while all is.

    1.2 ms for the 1047 modules of an 80-layer llama (one core of a shared CPU). Where nothing has changed that is one
    comparison of dictionaries a module, which goes by identity, and the address and layout of every tensor.
    """
    for seen in before.modules:
        module, own = seen.module, seen.attributes.live
        if module.__class__ is not seen.kind and own_class(module) is not seen.kind:
            yield f"{_called(seen)} (of class {own_class(module).__name__}, was {seen.kind.__name__})"
        if not equal(own, seen.attributes.before):
            yield from changed_attributes(
                seen.attributes, _ignored(module, own.keys() - seen.attributes.before.keys()), before.bound
            )
        if ("forward" in own or seen.forward is not None) and patched_forward(module) != seen.forward:
            yield f"{seen.attributes.name}.forward".lstrip(".")
        if own[PARAMETERS] or own[BUFFERS] or seen.tensors:
            now = _tensors(own)
            if now != seen.tensors:
                yield from _changed_tensors(seen, now)
        if (own[MODULES] or seen.children) and own[MODULES] != seen.children:
            yield from _changed_children(seen)
        if (own[FORWARD_HOOKS] or own[FORWARD_PRE_HOOKS] or seen.hooks) and _hooks(own) != seen.hooks:
            yield f"the forward hooks of {_called(seen)}"
    if before.global_hooks != _global_hooks():
        yield "forward hooks of all modules"
    for cls, members in before.classes:
        now = _members(cls)
        if now.keys() != members.keys() or any(now[name] is not value for name, value in members.items()):
            changed = (name for name in sorted(now.keys() | members.keys()) if now.get(name) is not members.get(name))
            yield from (f"{cls.__name__}.{name}" for name in changed)
    yield from differences(before.state, _IDLE_SETTINGS)


def _walk(module: nn.Module, name: str, found: Fingerprint, classes: dict[type, None], seen: set[int]) -> None:
    if id(module) in seen:
        return
    seen.add(id(module))
    own, kind = module.__dict__, own_class(module)
    attributes, forward = Attributes(name, own, dict(own)), patched_forward(module)
    found.modules.append(_Module(attributes, module, kind, dict(own[MODULES]), _tensors(own), _hooks(own), forward))
    remember(found.state, f"{name}.forward".lstrip("."), forward)
    classes.update((base, None) for base in kind.__mro__ if base not in _MANY_BASES)
    ignored = _ignored(module)
    for key, value in own.items():
        if key not in ignored:
            remember(found.state, f"{name}.{key}" if name else key, value)
            if isinstance(value, nn.Module):
                _walk(value, f"{name}.{key}" if name else key, found, classes, seen)
    for what, hook in _hooks_of(own[FORWARD_HOOKS], own[FORWARD_PRE_HOOKS]):
        remember(found.state, f"a {what} of {name or 'the model'}", hook)
    for key, child in own[MODULES].items():
        if child is not None:
            _walk(child, f"{name}.{key}" if name else key, found, classes, seen)


def _called(seen: _Module) -> str:
    return seen.attributes.name or "the model"


def _ignored(module: nn.Module, new: Set[str] = frozenset()) -> frozenset[str]:
    """Attributes of ``module`` that its forward does not read. On a whole model these are also ``new`` ones, notes of
    generate() and of trainers, and methods of transformers' that somebody has put something before."""
    if isinstance(module, DropoutNd):
        return _IDLE_ATTRIBUTES | {"p"}  # read in training mode alone, where it is looked at in every call
    if not isinstance(module, PreTrainedModel):
        return _IDLE_ATTRIBUTES
    return _IDLE_ATTRIBUTES | _METHODS | new


_METHODS = frozenset(
    name for base in (PreTrainedModel, GenerationMixin) for name in dir(base) if callable(getattr(base, name, None))
)


def _tensors(own: dict[str, dict]) -> dict[str, tuple]:
    """Where a module's parameters and buffers lie, and how."""
    found = {}
    for table in (own[PARAMETERS], own[BUFFERS]):
        for name, tensor in table.items():
            if tensor is not None:
                found[name] = (_address(tensor), tensor.shape, tensor.stride(), tensor.dtype, tensor.__class__)
    return found


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # a subclass that wraps others has no memory of its own
        return id(tensor)


def _changed_tensors(seen: _Module, now: dict[str, tuple]) -> Iterator[str]:
    for name in sorted(seen.tensors.keys() | now.keys()):
        if seen.tensors.get(name) != now.get(name):
            yield f"{seen.attributes.name}.{name}".lstrip(".")


def _changed_children(seen: _Module) -> Iterator[str]:
    now = seen.attributes.live[MODULES]
    for name in sorted(seen.children.keys() | now.keys()):
        if seen.children.get(name) is not now.get(name):
            yield f"{seen.attributes.name}.{name}".lstrip(".")


def _hooks_of(*tables: dict[int, Callable]) -> Iterator[tuple[str, Callable]]:
    for what, table in zip(("forward hook", "forward pre-hook"), tables, strict=True):
        yield from ((what, hook) for hook in table.values() if not is_idle(hook))


def _hooks(own: dict[str, dict]) -> tuple[tuple[str, int], ...]:
    """Numbers of hooks are never used again."""
    tables = FORWARD_HOOKS, FORWARD_PRE_HOOKS
    return tuple((table, number) for table in tables for number, hook in own[table].items() if not is_idle(hook))


def _global_hooks() -> tuple[tuple[str, int], ...]:
    return _hooks(global_hooks())


def is_idle(hook: object) -> bool:
    """Hooks that do nothing in a call of ``generate()``: those that transformers leaves on a model after the first call that
    asks for hidden states or attentions (transformers/utils/output_capturing.py), and those that make the embeddings' output
    require gradients, left by gradient checkpointing and by PEFT: under ``no_grad`` nothing does."""
    module, name = getattr(hook, "__module__", None), getattr(hook, "__name__", "")
    return module == "transformers.utils.output_capturing" or (
        module in ("transformers.modeling_utils", "peft.peft_model", "peft.utils.other", "peft.mixed_model")
        and name.startswith("make_inputs_require_grad")
    )


def _members(cls: type) -> dict[str, object]:
    """Members of a class that a forward may run or read."""
    return {name: value for name, value in vars(cls).items() if isinstance(value, _READ) and _is_public_or_code(name, value)}


_CODE = (types.FunctionType, staticmethod, classmethod, property)
_READ = (*_CODE, bool, int, float, str, torch.dtype, list, tuple, dict, set)


def _is_public_or_code(name: str, value: object) -> bool:
    """False for Python's own names, and for the private tables that transformers keeps on its classes and changes."""
    if name.startswith("__"):
        return name == "__call__"
    return not name.startswith("_") or not isinstance(value, list | tuple | dict | set)


def _function(member: object) -> object:
    if isinstance(member, property):
        return member.fget
    return getattr(member, "__func__", member)
