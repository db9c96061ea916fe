"""``SPEC_COMPILE_LOGS``: what the library tells about its work, on stderr.

``SPEC_COMPILE_LOGS=passes`` prints a line for each pass over each graph; ``+passes`` prints the graph behind it too (the
convention of ``TORCH_LOGS``). Names are loggers below ``spec_compile``, separated by commas. Without it, nothing is printed
that ``logging`` is not told to print.
"""

from __future__ import annotations

import logging
import os


def configure_logs(setting: str | None = None) -> None:
    """Turn on the loggers that ``setting`` names; None reads ``SPEC_COMPILE_LOGS``."""
    names = (os.environ.get("SPEC_COMPILE_LOGS", "") if setting is None else setting).split(",")
    for name in filter(None, (name.strip() for name in names)):
        log = logging.getLogger(f"spec_compile.{name.removeprefix('+')}")
        log.setLevel(logging.DEBUG if name.startswith("+") else logging.INFO)
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
        log.handlers = [handler]
        log.propagate = False  # or an application's own handlers would print it twice
