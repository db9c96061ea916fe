"""Warnings about the user's call, at the line where the user made it. A leaf: imports nothing of the project."""

from __future__ import annotations

import sys
import warnings

# Frames between the user's line and ours: generate() is transformers', its decorators are torch's and the standard library's.
_BETWEEN = {"spec_compile", "transformers", "torch", "contextlib", "functools"}


def warn_user(text: str) -> None:
    """A ``UserWarning`` each time it is asked for: Python's default filter would show one of a line once in a process, and
    who calls this decides how often it is said. Filters that ignore warnings or make errors of them keep their meaning."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame = frame.f_back
    place = frame.f_globals.get("__name__")
    warnings.warn_explicit(f"spec_compile: {text}", UserWarning, frame.f_code.co_filename, frame.f_lineno, place, registry={})
