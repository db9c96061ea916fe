"""A model's modules once more, over the same tensors: what capture may switch and hook while others use the model."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from spec_compile.hf_integration.fingerprint import is_idle
from spec_compile.hf_integration.forward_wrappers import patched_forward
from spec_compile.ops.torch_private import COMPILED_CALL, FORWARD_HOOKS, FORWARD_PRE_HOOKS


def configurations(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """``config`` and those within it."""
    yield config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            yield from configurations(part)


def private_copy(model: PreTrainedModel, *, in_eval_mode: bool = True) -> PreTrainedModel:
    """Modules and configurations of their own that share every parameter and buffer with ``model``.

    Args:
        in_eval_mode: whether the copy is; otherwise each of its modules is in the mode of its original.

    Nothing done to the copy (hooks, switches, another attention) is seen by the model or by another thread that runs it. What
    refers to the model's modules from within, such as a ``forward`` that was patched on an instance, refers to the copy's.
    """
    twins: dict[int, nn.Module] = {}
    for module in model.modules():
        twin = twins[id(module)] = object.__new__(type(module))
        twin.__dict__.update(module.__dict__)
        # Wrappers that are seen through, and what module.compile() left, hold the model's own modules, not the copy's.
        twin.__dict__.pop(COMPILED_CALL, None)
        if twin.__dict__.pop("forward", None) is not None and (behind := patched_forward(module)) is not None:
            twin.__dict__["forward"] = behind
    memo: dict[int, object] = {}  # one copy of a configuration that several modules hold
    for twin in twins.values():
        for name, value in twin.__dict__.items():
            twin.__dict__[name] = _moved(value, twins, memo)
        for table in (FORWARD_HOOKS, FORWARD_PRE_HOOKS):
            hooks = twin.__dict__[table]  # of its own by now
            for number in [number for number, hook in hooks.items() if is_idle(hook)]:
                del hooks[number]
        if in_eval_mode:
            twin.__dict__["training"] = False
    return twins[id(model)]


def ask_for_logits_alone(twin: PreTrainedModel) -> None:
    """Hidden states and the like that a checkpoint's configuration asks for leave no trace in a text, and collecting them takes
    a lock that Dynamo cannot trace. A call that asks for them runs plain."""
    for config in configurations(twin.config):
        for name in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if getattr(config, name, False):
                setattr(config, name, False)
        config.return_dict = True


def _moved(value: object, twins: dict[int, nn.Module], memo: dict[int, object]) -> object:
    """``value`` with every module and configuration of the model in it replaced by the copy's."""
    if isinstance(value, nn.Module):
        return twins.get(id(value), value)
    if isinstance(value, PretrainedConfig):
        return copy.deepcopy(value, memo)
    if isinstance(value, dict):
        moved = copy.copy(value)  # of its own even where nothing is replaced: hooks are added to it
        moved.update({key: _moved(item, twins, memo) for key, item in value.items()})
        return moved
    if type(value) in (list, tuple):
        moved = [_moved(item, twins, memo) for item in value]
        return value if all(a is b for a, b in zip(moved, value, strict=True)) else type(value)(moved)
    if isinstance(value, types.MethodType) and id(value.__self__) in twins:
        return types.MethodType(value.__func__, twins[id(value.__self__)])
    if isinstance(value, functools.partial):
        partial = functools.partial(value.func, *_moved(value.args, twins, memo), **_moved(value.keywords, twins, memo))
        partial.__dict__.update(value.__dict__)
        return partial
    return value
