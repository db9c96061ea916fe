"""What torch does not promise to keep, taken here and nowhere else; read in torch 2.11, 2.13, 2.14.1 and 2.15.

The lowest room holds it, so that every room may use it. ``tests/test_private_names.py`` looks for each of these names in the
installed release, and for private names that a file takes past this one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx._lazy_graph_module import _make_graph_module as make_graph_module
from torch.fx._lazy_graph_module import _use_lazy_graph_module as use_lazy_graph_module
from torch.nn.modules import module as nn_module

__all__ = [
    "BUFFERS",
    "COMPILED_CALL",
    "FORWARD_HOOKS",
    "FORWARD_PRE_HOOKS",
    "MODULES",
    "ORIGINAL_MODULE",
    "PARAMETERS",
    "DropoutNd",
    "FakeTensorMode",
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "TracingContext",
    "announce_backend",
    "compiled_callable",
    "detect_fake_mode",
    "dynamo_switch",
    "effective_option",
    "fake_of",
    "forget_traces",
    "global_hooks",
    "inductor_compile",
    "inductor_options",
    "make_graph_module",
    "mark_dynamic",
    "overload_of",
    "python_of",
    "reset_cuda_graphs",
    "schema_of",
    "size_hint",
    "static_shapes",
    "tracing",
    "use_lazy_graph_module",
]

# The dictionaries of a module, in its ``__dict__``: torch/nn/modules/module.py.
PARAMETERS, BUFFERS, MODULES = "_parameters", "_buffers", "_modules"
FORWARD_HOOKS, FORWARD_PRE_HOOKS = "_forward_hooks", "_forward_pre_hooks"
# What torch.compile() of a module calls that module: torch/_dynamo/eval_frame.py.
ORIGINAL_MODULE = "_orig_mod"
# What module.compile() leaves in the module's ``__dict__``, and a call of it runs: torch/nn/modules/module.py.
COMPILED_CALL = "_compiled_call_impl"
DropoutNd = nn.modules.dropout._DropoutNd  # nn.Dropout and its kin


def global_hooks() -> dict[str, dict[int, Callable]]:
    """Hooks that were registered for all modules, by the table that a module keeps its own of that kind in."""
    return {
        FORWARD_HOOKS: nn_module._global_forward_hooks,
        FORWARD_PRE_HOOKS: nn_module._global_forward_pre_hooks,
    }


def schema_of(op: OpOverload) -> torch.FunctionSchema:
    """Arguments of an op, and whether it writes any of them."""
    return op._schema


def python_of(op: torch.library.CustomOpDef) -> Callable:
    """The function that ``torch.library.custom_op`` made ``op`` of."""
    return op._init_fn


def fake_of(op: torch.library.CustomOpDef) -> Callable:
    """The function that was given to ``op.register_fake``."""
    return op._abstract_fn


def overload_of(op: torch.library.CustomOpDef) -> OpOverload:
    """What ``torch.ops`` has of ``op``."""
    return op._opoverload


def inductor_compile(gm: torch.fx.GraphModule, examples: list, options: dict[str, object]) -> Callable:
    """Inductor alone, without Dynamo: ``gm`` as a callable for inputs like ``examples``."""
    return torch._inductor.compile(gm, examples, options=options)


def inductor_options(mode: str | None, options: dict[str, object] | None) -> dict[str, object]:
    """What ``torch.compile``'s own backend makes of its two arguments.

    Raises:
        RuntimeError: an option or mode that Inductor does not know.
    """
    return dict(torch._TorchCompileInductorWrapper(mode, options, None).config)


def effective_option(options: dict[str, object], name: str) -> object:
    """An option as it holds in a compilation with ``options``: given there, or set for the process."""
    from torch._inductor import config

    value: object = config
    for part in name.split("."):
        value = getattr(value, part)
    return options.get(name, value)


def reset_cuda_graphs() -> None:
    """Free what Inductor recorded, if anything."""
    if (trees := sys.modules.get("torch._inductor.cudagraph_trees")) is not None:
        trees.reset_cudagraph_trees()


def announce_backend(name: str, place: str) -> None:
    """Let ``torch.compile(backend=name)`` find ``place`` ("module:function"), as an entry point would, without importing it."""
    from torch._dynamo.backends.registry import _BACKENDS

    _BACKENDS.setdefault(name, EntryPoint(name, place, "torch_dynamo_backends"))


def size_hint(size: int | torch.SymInt) -> int:
    """A size as it was in the call that is traced; 0 where it depends on values."""
    return size if isinstance(size, int) else size.node.hint or 0


def mark_dynamic(tensor: Tensor, dimension: int) -> None:
    """Dynamo keeps the size of ``dimension`` open."""
    torch._dynamo.mark_dynamic(tensor, dimension)


def static_shapes() -> object:
    """A context in which Dynamo makes a size dynamic only where it is marked so."""
    return torch._dynamo.config.patch(automatic_dynamic_shapes=False, assume_static_by_default=True)


def forget_traces(function: Callable) -> None:
    """Dynamo drops what it compiled for ``function``'s code."""
    torch._dynamo.eval_frame.remove_from_cache(function)


def compiled_callable(function: object) -> object | None:
    """What ``torch.compile()`` was given, of what it gave back; None of anything else, ``torch.compiler.disable()``'s too."""
    code = getattr(function, "__code__", None)
    if code is None or code.co_name != "compile_wrapper" or function.__globals__.get("__name__") != "torch._dynamo.eval_frame":
        return None
    return function._torchdynamo_orig_callable


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
