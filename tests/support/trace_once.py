"""One trace a process for models that are alike: tracing is most of what a test of a small model costs.

A trace depends on a model's classes, configuration, plain attributes and the shapes of its tensors, never on their values, and
tests make the same small models again and again. So a graph that one of them had captured serves the next one, bound to that
one's own tensors by their names. What cannot be told to be alike (hooks, patched forwards, adapters, tensors that belong to no
module) is traced anew, and so is whatever calls ``hf_integration.capture`` itself, as the tests of capture do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from torch import Tensor, nn
from transformers import PreTrainedModel

from spec_compile.drafts import dflash_runner, head_runner
from spec_compile.passes.graph import StageGraph, placeholders
from spec_compile.runtime import model_runner

_PLAIN = (bool, int, float, str, tuple, type(None))
_traced: dict[tuple, StageGraph] = {}
sharing = True  # a test that is about capturing itself turns it off


@dataclasses.dataclass(frozen=True)
class _Named:
    """A model's tensor, in graphs that belong to no model."""

    name: str


def trace_once(patch: pytest.MonkeyPatch) -> None:
    """Let runners share traces while ``patch`` lasts."""
    captures = [(model_runner, "capture_prefill"), (head_runner, "capture_head_prefill"), (head_runner, "capture_head_window")]
    captures += [(dflash_runner, "capture_block"), (dflash_runner, "capture_dflash_context")]
    for module, name in captures:
        patch.setattr(module, name, _shared(getattr(module, name)))
    window = _shared(lambda model, batch, num_tokens, taps: real(model, batch, num_tokens, "verify", taps))
    real = model_runner.capture_window

    def capture_window(model: PreTrainedModel, batch: int, num_tokens: int, stage: str, taps: tuple[int, ...]) -> StageGraph:
        return dataclasses.replace(window(model, batch, num_tokens, taps), stage=stage)  # its stage is but a name

    patch.setattr(model_runner, "capture_window", capture_window)


def _shared(capture: Callable[..., StageGraph]) -> Callable[..., StageGraph]:
    def captured(model: PreTrainedModel, *arguments: object) -> StageGraph:
        alike = _what_a_trace_sees(model) if sharing and model.device.type == "cpu" else None
        if alike is None:
            return capture(model, *arguments)
        key = (capture, arguments, alike)
        tensors = _tensors(model)
        if key not in _traced:
            graph, names = capture(model, *arguments), {id(tensor): _Named(name) for name, tensor in tensors.items()}
            if any(isinstance(value, Tensor) and id(value) not in names for value in _bindings(graph)):
                return graph
            _traced[key] = _bound(graph, lambda value: names.get(id(value), value))
        return _bound(_traced[key], lambda value: tensors[value.name] if isinstance(value, _Named) else value)

    return captured


def _bindings(graph: StageGraph) -> list[object]:
    """Of all inputs but the constants that the trace itself made."""
    return [node.meta["binding"] for node in placeholders(graph.gm) if not node.name.startswith("constant_")]


def _bound(graph: StageGraph, rebind: Callable[[object], object]) -> StageGraph:
    """A copy with other bindings; nodes of copies share their metadata otherwise."""
    graph = graph.copy()
    for node in placeholders(graph.gm):
        node.meta = {**node.meta, "binding": rebind(node.meta["binding"])}
    return graph


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _what_a_trace_sees(model: PreTrainedModel) -> tuple | None:
    """Equal for models with equal traces; None where that cannot be told."""
    modules = []
    for name, module in model.named_modules(remove_duplicate=False):
        own = vars(module)
        if "forward" in own or own["_forward_hooks"] or own["_forward_pre_hooks"] or "_disable_adapters" in own:
            return None
        plain = [(k, repr(v)) for k, v in own.items() if isinstance(v, _PLAIN) or dataclasses.is_dataclass(v)]
        kind = type(module)  # not itself: a compiled model has a class of its own
        modules.append((name, kind.__module__, kind.__qualname__, kind.forward, *sorted(plain)))
    first: dict[int, str] = {}
    tensors = [
        (name, first.setdefault(id(t), name), tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad, t.is_inference())
        for name, t in _tensors(model).items()
    ]
    return repr(model.config.to_dict()), model.config._attn_implementation, tuple(modules), tuple(tensors)
