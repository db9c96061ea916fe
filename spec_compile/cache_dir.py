"""Where the library keeps files between processes. A leaf module: imports nothing of the project."""

from __future__ import annotations

import os
import sys
from pathlib import Path

CACHE_VARIABLE = "SPEC_COMPILE_CACHE_DIR"


def cache_dir() -> Path:
    """$SPEC_COMPILE_CACHE_DIR, else ``spec_compile`` in the platform's cache directory for this user; may not exist yet."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "spec_compile"
