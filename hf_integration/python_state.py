"""What Python code reads when it runs, and whether it would still read the same: attributes, containers, closures, globals.

Captured graphs keep numbers, flags and functions as they were when they were traced. Everything here is remembered by
reference and compared by ``==``, which for a dictionary or list is one call that compares identities first.
"""

from __future__ import annotations

import enum
import functools
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

_SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, enum.Enum)
_CONTAINERS = (list, tuple, dict, set)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, functools.partial)
# Objects and functions of these are not looked into: what they hold is theirs.
_LIBRARIES = frozenset(
    {"torch", "transformers", "numpy", "accelerate", "spec_compile", *sys.stdlib_module_names} - {"__main__"}
)


@dataclass
class Attributes:
    """The ``__dict__`` of an object.

    Attributes:
        name: how a user writes the object: ``"model.layers.0.self_attn"``.
        live, before: the dictionary itself and what it was.
    """

    name: str
    live: dict[str, object]
    before: dict[str, object]


@dataclass
class Remembered:
    """Everything that was found on the way through one or more values, each with a name that a user knows it by.

    Attributes:
        containers: lists, dictionaries and sets, each with a copy.
        cells: closure cells with what was in them.
        names: (namespace, name in it, value) of globals.
        defaults: functions with the defaults of their arguments.
    """

    objects: list[Attributes] = field(default_factory=list)
    containers: list[tuple[str, object, object]] = field(default_factory=list)
    cells: list[tuple[str, types.CellType, object]] = field(default_factory=list)
    names: dict[tuple[int, str], tuple[str, dict[str, object], str, object]] = field(default_factory=dict)
    defaults: list[tuple[str, types.FunctionType, tuple]] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)


def remember(found: Remembered, name: str, value: object) -> None:
    """Add ``value`` and what it leads to. Modules are left to those who know the whole model."""
    if isinstance(value, (*_SIMPLE, Tensor, nn.Module, type)) or id(value) in found.seen:
        return
    found.seen.add(id(value))
    if isinstance(value, _CONTAINERS):
        if not isinstance(value, tuple):
            # A dictionary that makes what it is asked for (transformers' ACT2FN) would make it anew each time.
            found.containers.append((name, value, dict(dict.items(value)) if isinstance(value, dict) else value.copy()))
        for key, inner in dict.items(value) if isinstance(value, dict) else enumerate(value):
            remember(found, f"{name}[{key!r}]", inner)
    elif isinstance(value, functools.partial):
        for inner in (value.func, value.args, value.keywords):
            remember(found, name, inner)
    elif isinstance(value, types.MethodType):
        remember(found, name, value.__func__)
        remember(found, name, value.__self__)
    elif isinstance(value, types.FunctionType):
        if not _of_library(value):
            _remember_function(found, name, value)
        elif hasattr(value, "__wrapped__"):  # a decorator's
            remember(found, name, value.__wrapped__)
    elif isinstance(value, PretrainedConfig) or _is_users(value):
        found.objects.append(Attributes(name, value.__dict__, dict(value.__dict__)))
        for key, inner in value.__dict__.items():
            remember(found, f"{name}.{key}", inner)
        if callable(value) and not isinstance(value, PretrainedConfig):
            remember(found, name, type(value).__call__)


def _remember_function(found: Remembered, name: str, function: types.FunctionType) -> None:
    """What ``function`` reads from around it: its closure, its defaults, and globals that are no modules."""
    for key, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        value = _contents(cell)
        found.cells.append((f"{key} in {name}", cell, value))
        remember(found, f"{key} in {name}", value)
    if function.__defaults__ or function.__kwdefaults__:
        found.defaults.append((f"the defaults of {name}", function, _defaults(function)))
    space = function.__globals__
    for key in _global_names(function.__code__):
        value = space.get(key)
        known = isinstance(value, (*_SIMPLE, *_CONTAINERS, *_FUNCTIONS, type, Tensor))
        if value is None or not known or (id(space), key) in found.names:
            continue
        label = f"{key} in {space.get('__name__')}"
        found.names[id(space), key] = (label, space, key, value)
        remember(found, label, value)


def differences(before: Remembered, ignored: frozenset[str]) -> Iterator[str]:
    """What would be read otherwise now. Fast while nothing has changed.

    Args:
        ignored: attributes that say nothing about a forward.
    """
    for thing in before.objects:
        if not equal(thing.live, thing.before):
            yield from changed_attributes(thing, ignored)
    for name, value, copy in before.containers:
        if not equal(value, copy) and name.rpartition(".")[2] not in ignored:
            yield name
    yield from (name for name, cell, value in before.cells if not same(value, _contents(cell)))
    yield from (name for name, space, key, value in before.names.values() if not same(value, space.get(key)))
    yield from (name for name, function, values in before.defaults if not same(values, _defaults(function)))


def changed_attributes(thing: Attributes, ignored: frozenset[str], tensors: frozenset[int] = frozenset()) -> list[str]:
    """Names of what of ``thing`` is no longer what it was, with the values where they are short.

    Args:
        tensors: ids of the tensors that matter; others come and go.
    """
    found = []
    for key in sorted(thing.live.keys() | thing.before.keys(), key=str):
        if key in ignored:
            continue
        old, new = thing.before.get(key, _ABSENT), thing.live.get(key, _ABSENT)
        if old is _ABSENT and not isinstance(new, (bool, int, float, str, *_FUNCTIONS)):
            continue  # something kept there, which no code has read
        if isinstance(old, Tensor) and isinstance(new, Tensor) and id(old) not in tensors:
            continue
        if _is_opaque(old) and _is_opaque(new):
            continue
        if not same(old, new):
            found.append(f"{thing.name}.{key}{_values(old, new)}".lstrip("."))
    if not found:  # the next comparison is fast again
        thing.before = dict(thing.live)
    return found


def same(old: object, new: object) -> bool:
    """Whether code that reads ``new`` does what it did with ``old``."""
    if old is new:
        return True
    if isinstance(old, Tensor) or isinstance(new, Tensor) or (isinstance(old, bool) != isinstance(new, bool)):
        return False
    return equal(old, new)


def equal(old: object, new: object) -> bool:
    """``==`` of any two values; those that cannot say (tensors, arrays) differ."""
    try:
        return bool(old == new)
    except Exception:
        return False


class _Absent:
    """What stands for no attribute."""


_ABSENT = _Absent()


def _is_users(value: object) -> bool:
    return hasattr(value, "__dict__") and type(value).__module__.partition(".")[0] not in _LIBRARIES


def _is_opaque(value: object) -> bool:
    """Whether ``value`` is an object of some library that is neither looked into nor read by a forward."""
    known = isinstance(value, _SIMPLE + _CONTAINERS + _FUNCTIONS + (Tensor, nn.Module, type, PretrainedConfig))
    return not known and not _is_users(value)


def _of_library(function: types.FunctionType) -> bool:
    """Whether ``function`` is torch's, transformers' (but for its models) or Python's own: what those read is theirs."""
    module = function.__globals__.get("__name__") or ""
    if module.startswith("transformers.models."):
        return False
    return module.partition(".")[0] in _LIBRARIES


def _contents(cell: types.CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _defaults(function: types.FunctionType) -> tuple:
    return function.__defaults__ or (), tuple((function.__kwdefaults__ or {}).items())


@functools.lru_cache(maxsize=4096)
def _global_names(code: types.CodeType) -> tuple[str, ...]:
    """Names in ``code`` and the functions within it that may be globals."""
    inner = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in _global_names(const)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


def _values(old: object, new: object) -> str:
    """`` (2, was 1)`` for values that fit."""
    if isinstance(old, _SIMPLE) and isinstance(new, _SIMPLE) and len(f"{old!r}{new!r}") < 40:
        return f" ({new!r}, was {old!r})"
    return ""
