"""What transformers calls the cache of a forward: ``cache`` from 5.24, ``past_key_values`` before.

The name is read off signatures, by the type that a parameter is annotated with, so that the next one needs no change here.
Values are told by their type: ``isinstance(value, Cache)``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

from transformers import LlamaForCausalLM
from transformers.cache_utils import Cache
from transformers.generation.utils import GenerateDecoderOnlyOutput

_NAMES = ("cache", "past_key_values", "past_key_value")  # newest first, for forwards without annotations


def cache_argument(forward: Callable) -> str:
    """The name of the parameter by which ``forward``, of a model or a decoder layer, takes its cache.

    Where neither an annotation nor a known name tells, as in ``forward(self, *args, **kwargs)``, it is the name that the
    installed transformers gives it in its own models.
    """
    found = _by_signature(forward)
    return _LLAMA if found is None else found


def _by_signature(function: Callable) -> str | None:
    parameters = inspect.signature(function).parameters
    for name, parameter in parameters.items():
        if _mentions_cache(parameter.annotation):
            return name
    return next((name for name in _NAMES if name in parameters), None)


def _mentions_cache(annotation: object) -> bool:
    """Whether an annotation, evaluated or still text, is ``Cache``, a subclass of it, or a union with one."""
    if isinstance(annotation, type):
        return issubclass(annotation, Cache)
    return re.search(r"\b\w*Cache\b", str(annotation)) is not None


_LLAMA = _by_signature(LlamaForCausalLM.forward) or _NAMES[0]

# The field of a result of generate() that holds the cache.
RESULT_CACHE: str = _by_signature(GenerateDecoderOnlyOutput.__init__) or _NAMES[0]
