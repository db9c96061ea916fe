"""What torch does not promise to keep, taken here and nowhere else; read in torch 2.11, 2.13, 2.14.1 and 2.15.

The lowest room holds it, so that every room may use it. ``tests/test_private_names.py`` looks for each of these names in the
installed release, and for private names that a file takes past this one.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _make_graph_module as make_graph_module
from torch.fx._lazy_graph_module import _use_lazy_graph_module as use_lazy_graph_module

__all__ = [
    "FakeTensorMode",
    "OpOverload",
    "OpOverloadPacket",
    "TracingContext",
    "detect_fake_mode",
    "dynamo_switch",
    "forget_traces",
    "inductor_compile",
    "make_graph_module",
    "mark_dynamic",
    "static_shapes",
    "tracing",
    "use_lazy_graph_module",
]


def inductor_compile(gm: torch.fx.GraphModule, examples: list, options: dict[str, object]) -> Callable:
    """Inductor alone, without Dynamo: ``gm`` as a callable for inputs like ``examples``."""
    return torch._inductor.compile(gm, examples, options=options)


def mark_dynamic(tensor: Tensor, dimension: int) -> None:
    """Dynamo keeps the size of ``dimension`` open."""
    torch._dynamo.mark_dynamic(tensor, dimension)


def static_shapes() -> object:
    """A context in which Dynamo makes a size dynamic only where it is marked so."""
    return torch._dynamo.config.patch(automatic_dynamic_shapes=False, assume_static_by_default=True)


def forget_traces(function: Callable) -> None:
    """Dynamo drops what it compiled for ``function``'s code."""
    torch._dynamo.eval_frame.remove_from_cache(function)


def dynamo_switch() -> str | None:
    """What keeps Dynamo from tracing as it is asked to, as a user wrote it; None if nothing does."""
    stance = torch._dynamo.eval_frame._stance
    if stance.stance != "default" or stance.backend is not None:
        return f"torch.compiler.set_stance({stance.stance!r}{'' if stance.backend is None else ', force_backend=…'})"
    if os.environ.get("TORCHDYNAMO_DISABLE", "") == "1":
        return "the environment variable TORCHDYNAMO_DISABLE=1"
    if torch._dynamo.config.disable:
        return "torch._dynamo.config.disable (the environment variable TORCH_COMPILE_DISABLE=1 sets it)"
    return None


def __getattr__(name: str) -> object:
    if name != "CustomGraphPass":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Its uuid() goes into the key of Inductor's disk cache. Inductor and Dynamo come with it: seconds that an op alone need not
    # take.
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass
