"""Every error a user can meet. A leaf: imports nothing of the project, so any room may raise them.

A message says what happened, where, and what to do.
"""

from __future__ import annotations


class SpecCompileError(Exception):
    """Base class of all errors raised by spec_compile."""


class CaptureError(SpecCompileError):
    """The model's forward could not be captured as one graph with one attention op a layer."""


class BackendError(SpecCompileError, ValueError):
    """No provider, or not the forced one, can run an attention node. Names the node and each provider's reason."""


class DraftError(SpecCompileError, ValueError):
    """The draft cannot serve this target (vocabulary, device, format)."""


class ConfigError(SpecCompileError, ValueError):
    """An argument of spec_compile() or SpecConfig is out of its domain."""


class RanPlainError(SpecCompileError):
    """A ``generate()`` call that was to be accelerated ran as plain transformers. Says why."""


class SamplingError(SpecCompileError, RuntimeError):
    """The model's own distribution is not finite: there is nothing to sample from (plain transformers: a RuntimeError)."""


class PositionError(SpecCompileError, IndexError):
    """A text reached the end of the model's position embeddings (plain transformers: an IndexError, on a GPU an assertion)."""


class MissingDependencyError(SpecCompileError, ImportError):
    """An optional dependency is absent. The message carries the install command."""
