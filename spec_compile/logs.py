"""``SPEC_COMPILE_LOGS``: what the library tells about its work, on stderr.

``SPEC_COMPILE_LOGS=passes`` prints a line for each pass over each graph; ``+passes`` prints the graph behind it too (the
convention of ``TORCH_LOGS``). ``linears`` prints what linear layers of a few tokens were measured to take on a GPU. Topics are
loggers below ``spec_compile``, separated by commas. Without it, nothing is printed that ``logging`` is not told to print.
"""

from __future__ import annotations

import logging
import os
import warnings

TOPICS = ("passes", "linears")


def configure_logs(setting: str | None = None) -> None:
    """Turn on the topics that ``setting`` names; None reads ``SPEC_COMPILE_LOGS``. A topic that does not exist is a warning."""
    names = (os.environ.get("SPEC_COMPILE_LOGS", "") if setting is None else setting).split(",")
    for name in filter(None, (name.strip() for name in names)):
        if name.removeprefix("+") not in TOPICS:
            known = ", ".join(f"{topic}, +{topic}" for topic in TOPICS)
            warnings.warn(f"SPEC_COMPILE_LOGS={name}: there is no such topic; choose from {known}.", stacklevel=2)
            continue
        log = logging.getLogger(f"spec_compile.{name.removeprefix('+')}")
        log.setLevel(logging.DEBUG if name.startswith("+") else logging.INFO)
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s %(message)s"))
        log.handlers = [handler]
        log.propagate = False  # or an application's own handlers would print it twice
