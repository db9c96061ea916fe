"""What transformers' generation loop calls on a model, and whether all of it is transformers' own.

Our loop stands in for ``_sample`` and calls none of these. A model, its class or a library (PEFT's prompt and prefix tuning)
that puts something of its own there means it to be called, so such a call has to run as plain transformers. Read in
transformers 5.17 and 5.24: ``_sample``, ``_prefill`` and ``prepare_inputs_for_generation`` in generation/utils.py.
"""

from __future__ import annotations

import types

from transformers import PreTrainedModel

from spec_compile.hf_integration.transformers_private import CALLED_BY_THE_LOOP, SAMPLE

LOOP_METHODS = (SAMPLE, *CALLED_BY_THE_LOOP)
_DECORATORS = ("contextlib", "torch")  # their wrappers stand around methods of transformers


def replaced_loop_method(model: PreTrainedModel) -> str | None:
    """The first of ``LOOP_METHODS`` that is not transformers' own, and what is there instead; None where all are."""
    for name in LOOP_METHODS:
        method = model.__dict__.get(name) if name in CALLED_BY_THE_LOOP else None
        if method is None:  # the class's own; before it stands the one that binding.py put there
            method = next((vars(base)[name] for base in type(model).__mro__[1:] if name in vars(base)), None)
        if method is not None and _module(method).split(".")[0] != "transformers":
            return f"{name} ({_described(method)})"
    return None


def _module(method: object) -> str:
    """Where the code of ``method`` stands. ``__module__`` would not tell: ``functools.wraps`` copies it."""
    function = _function(method)
    module = function.__globals__.get("__name__", "") if isinstance(function, types.FunctionType) else ""
    if module.split(".")[0] in _DECORATORS and hasattr(function, "__wrapped__"):
        return _module(function.__wrapped__)
    return module


def _function(method: object) -> object:
    """The function in a bound, static or class method."""
    return getattr(method, "__func__", method)


def _described(method: object) -> str:
    function = _function(method)
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{_module(method) or type(function).__module__}.{name}"
