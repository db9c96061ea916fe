"""Hugging Face ``generate()`` at a serving engine's speed: ``model = spec_compile(model, draft="ngram")``.

Rooms, each importing only from those right of it: ``spec_compile`` → ``hf_integration`` → ``passes`` → ``ops``.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from spec_compile.logs import configure_logs

if TYPE_CHECKING:
    from spec_compile.api import spec_compile as spec_compile
    from spec_compile.config import SpecConfig as SpecConfig
    from spec_compile.handle import SpecHandle as SpecHandle
    from spec_compile.runtime.stats import SpecStats as SpecStats

__version__ = "0.1.0"
__all__ = ["SpecConfig", "SpecHandle", "SpecStats", "__version__", "spec_compile"]

configure_logs()

# Resolved on first use (PEP 562), so that importing one room, an op say, does not import transformers.
_HOME = {
    "spec_compile": "spec_compile.api",
    "SpecConfig": "spec_compile.config",
    "SpecHandle": "spec_compile.handle",
    "SpecStats": "spec_compile.runtime.stats",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


# torch finds the backend of ``torch.compile(backend="spec_compile")`` by its entry point, but looks for these only once.
if "torch._dynamo.backends.registry" in sys.modules:
    from spec_compile.ops.torch_private import announce_backend

    announce_backend("spec_compile", "spec_compile.dynamo_backend:compile_graph")
