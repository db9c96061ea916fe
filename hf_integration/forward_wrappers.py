"""``forward`` patched on a module: wrappers of other packages, what they change for generation, and what is behind them.

Known by where their code stands, because wrappers take the names of what they wrap.
"""

from __future__ import annotations

import types

from torch import nn

from spec_compile.ops.torch_private import compiled_callable


def patched_forward(module: nn.Module) -> object | None:
    """What runs in place of the class's own ``forward``; None where nothing does.

    Wrappers that hand on what ``generate()`` passes, and what comes back, are seen through: TRL's fused head, which has another
    way for its own keyword alone (``add_fused_lm_head``, trl/trainer/utils.py of 1.16), and ``torch.compile()``, with which
    plain calls go on. accelerate's ``unwrap_model()`` puts back the class's forward without its decorators, which name and pack
    arguments and results.
    """
    forward = module.__dict__.get("forward")
    while forward is not None:
        function = getattr(forward, "__func__", forward)
        if getattr(forward, "__self__", None) is module and function in _undecorated(type(module).forward):
            return None
        inner = compiled_callable(function) or _behind_fused_head(function)
        if inner is None:
            return forward
        forward = inner
    return None


def changes_numerics(module: nn.Module) -> str | None:
    """Why graphs cannot stand for ``module``'s patched forward though it is known; None where it is not, or changes nothing.

    accelerate's ``prepare()`` wraps the forward of a model in autocast and converts what comes out to float32
    (accelerate/accelerator.py and accelerate/utils/operations.py of 1.15).
    """
    function = getattr(patched_forward(module), "__func__", patched_forward(module))
    if type(getattr(function, "__wrapped__", None)).__name__ != "ConvertOutputsToFp32":
        return None
    return (
        "accelerate runs its forward in mixed precision (torch.autocast), and graphs compute in the types of the model's "
        "weights; load it in that type and train without mixed precision (bf16=False, fp16=False)"
    )


def _undecorated(function: object) -> list[object]:
    """``function`` and what it decorates, outermost first."""
    found = [function]
    while (function := getattr(function, "__wrapped__", None)) is not None:
        found.append(function)
    return found


def _behind_fused_head(function: object) -> object | None:
    if not isinstance(function, types.FunctionType) or function.__globals__.get("__name__") != "trl.trainer.utils":
        return None
    code = function.__code__
    if code.co_name != "_fused_forward" or "original_forward" not in code.co_freevars:
        return None
    return function.__closure__[code.co_freevars.index("original_forward")].cell_contents
