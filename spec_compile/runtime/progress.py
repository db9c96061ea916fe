"""A progress bar for work that keeps a user waiting; silent when nothing is shown to a person."""

from __future__ import annotations

import sys
from types import TracebackType

from transformers.utils import logging


class Progress:
    """Counts ``total`` steps on stderr. Follows ``transformers``' progress-bar switch and shows nothing in pipes.

    Args:
        label: what is being done.
        total: steps; fewer than one shows nothing.
        enabled: the user's choice.
    """

    def __init__(self, label: str, total: int, enabled: bool) -> None:
        show = enabled and total > 0 and sys.stderr.isatty() and logging.is_progress_bar_enabled()
        self._bar = logging.tqdm(total=total, desc=f"spec_compile: {label}", leave=False) if show else None

    def advance(self, what: str) -> None:
        """Name the step that begins."""
        if self._bar is not None:
            self._bar.set_postfix_str(what)
            self._bar.update(1)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()
