"""What a captured graph takes for granted about a module, cheap enough to be checked on every call."""

from __future__ import annotations

from torch import nn

from spec_compile.hf_integration.forward_wrappers import patched_forward


def fingerprint(model: nn.Module) -> list[object]:
    """A list that changes with whatever captured graphs do not see: parameters and buffers moved or replaced, modules
    replaced, forward hooks added or removed, ``forward`` patched on an instance, adapters switched, merged or rescaled.

    In-place changes of values are seen by the graphs and change nothing here. Walks ``__dict__`` by hand: 0.6 ms for the
    1047 modules of an 80-layer llama, where ``model.parameters()`` alone took 1.7 ms (one core of a shared CPU).
    """
    found: list[object] = []
    _walk(model, found)
    return found


def _walk(module: nn.Module, found: list[object]) -> None:
    own = module.__dict__
    found.append(id(module))
    for tensors in (own["_parameters"], own["_buffers"]):
        for tensor in tensors.values():
            if tensor is not None:
                found.append(tensor.data_ptr())
    for hooks in (own["_forward_hooks"], own["_forward_pre_hooks"]):
        if hooks:
            found.extend(number for number, hook in hooks.items() if not _is_idle(hook))  # numbers are never used again
    if "forward" in own and (patched := patched_forward(module)) is not None:  # accelerate and others wrap a module this way
        found.append(id(patched))
    if "_disable_adapters" in own:  # PEFT's BaseTunerLayer (peft/tuners/tuners_utils.py) reads these in forward
        names = ("_disable_adapters", "_active_adapter", "merged_adapters", "scaling")
        found.append(repr([own.get(name) for name in names]))
    for child in own["_modules"].values():
        if child is not None:
            _walk(child, found)


def _is_idle(hook: object) -> bool:
    """Hooks that transformers leaves on a model after the first call that asks for hidden states or attentions; in any other
    call they do nothing (transformers/utils/output_capturing.py)."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"
