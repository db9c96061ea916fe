"""A model's class is swapped for one whose ``generate()`` runs our decode loop.

``generate()`` looks its loop up on the model's class, so the class is swapped for a subclass of the same name. Everything
before the loop (config merging, defaults, checks, ``num_return_sequences``) stays transformers' own. The public ``generate()``
is seen as well, so that what the caller gave is told from what transformers added, and a loop that is no longer asked for is
noticed.
"""

from __future__ import annotations

import contextvars
import copy
import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from spec_compile.hf_integration.transformers_private import PLAIN_LOOPS, SAMPLE


@dataclass
class PublicCall:
    """A call of the public ``generate()`` that is running.

    Attributes:
        model: whose call it is.
        arguments: what the caller gave by keyword.
        reached_loop: whether transformers came to one of the loops that the swapped class has.
    """

    model: PreTrainedModel
    arguments: Mapping[str, object]
    reached_loop: bool = False


# A call within a call (a criterion that generates, an assistant) has its own, and so has every thread.
_running: contextvars.ContextVar[PublicCall | None] = contextvars.ContextVar("spec_compile_generate", default=None)


def bind_generate(
    model: PreTrainedModel,
    loop: Callable[..., object],
    on_plain: Callable[[str], None],
    on_unreached: Callable[[Mapping[str, object]], None],
    on_failed: Callable[[], None],
) -> type[PreTrainedModel]:
    """Swap ``model``'s class for one whose generation loop is ``loop``; returns the original class.

    The class holds none of the methods alive: Dynamo's caches keep the classes of captured models for good (torch 2.13), and
    what the class held would stay with them.

    Args:
        loop: a method, called as ``loop(model, plain, given, input_ids, logits_processor, stopping_criteria,
            generation_config, synced_gpus=…, streamer=…, **model_kwargs)``, where ``plain`` is transformers' own loop and
            ``given`` are the keyword arguments of the public call, None where ``generate()`` was not called on the model.
        on_plain: a method, told the reason of a call that transformers' other loops take (beams, assistants).
        on_unreached: a method, told the arguments of a call that returned without any of these loops.
        on_failed: a method, told of a call that raised before any of them.
    """
    cls = own_class(model)  # one of an earlier call, whose handle somebody deleted, is replaced
    weak_loop, weak_on_plain, weak_on_unreached, weak_on_failed = map(
        weakref.WeakMethod, (loop, on_plain, on_unreached, on_failed)
    )

    @functools.wraps(cls.generate)
    def generate(self, *args, **kwargs):
        call = PublicCall(self, kwargs)
        token = _running.set(call)
        try:
            result = cls.generate(self, *args, **kwargs)
        except BaseException:
            if not call.reached_loop and (on_failed := weak_on_failed()) is not None:
                on_failed()
            raise
        finally:
            _running.reset(token)
        unreached = weak_on_unreached()
        if not call.reached_loop and unreached is not None:
            unreached(kwargs)
        return result

    def sample(self, *args, **kwargs):
        given = _reached(self)
        plain, run = functools.partial(getattr(cls, SAMPLE), self), weak_loop()
        if run is None:  # removed by another thread when this call was on its way
            return plain(*args, **kwargs)
        return run(self, plain, given, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        """Pickle the plain model: pools and graphs belong to this process, and no module holds the swapped class."""
        return object.__new__, (cls,), _plain_state(self)

    def __deepcopy__(self, memo):
        """A copy is the plain model too: pools and graphs belong to the original's weights."""
        warnings.warn("spec_compile: a copy of a compiled model is a plain model; call spec_compile() on it.", stacklevel=3)
        twin = memo[id(self)] = cls.__new__(cls)
        twin.__dict__.update(copy.deepcopy(_plain_state(self), memo))
        return twin

    members: dict[str, object] = {
        "generate": generate,
        SAMPLE: sample,
        "__reduce_ex__": __reduce_ex__,
        "__deepcopy__": __deepcopy__,
        "_spec_compile_swapped": True,
    }
    for name, what in PLAIN_LOOPS.items():
        members[name] = _plain_loop(cls, name, what, weak_on_plain)
    # Same names: transformers and pipelines look models up by class name, and save_pretrained writes it.
    members |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    model.__class__ = type(cls.__name__, (cls,), members)
    return cls


def own_class(module: nn.Module) -> type:
    """The class of ``module``; of a model whose class was swapped the one before."""
    cls = type(module)
    return cls.__mro__[1] if "_spec_compile_swapped" in vars(cls) else cls


def _reached(model: PreTrainedModel) -> Mapping[str, object] | None:
    """The arguments of the public call whose loop is being entered; that call has reached a loop."""
    call = _running.get()
    if call is None or call.model is not model:
        return None
    call.reached_loop = True
    return call.arguments


def _plain_state(model: PreTrainedModel) -> dict[str, object]:
    return {name: value for name, value in model.__dict__.items() if name != "spec"}


def _plain_loop(cls: type, name: str, what: str, weak_on_plain: Callable[[], Callable[[str], None] | None]) -> Callable:
    def method(self, *args, **kwargs):
        _reached(self)
        on_plain = weak_on_plain()
        if on_plain is not None:
            on_plain(f"{what} is not accelerated")
        return getattr(cls, name)(self, *args, **kwargs)

    method.__name__ = name
    return method
