"""Whose turn it is: buffers and graphs of a model serve one call at a time, and calls of other threads wait.

A running call hands control to its caller's code: stopping criteria, streamers, logits processors. Where that code waits for a
call of the same model in another thread (a judge in a thread pool), the other call would wait for its turn, and both for ever.
Nothing tells such a wait from a slow criterion, so who waits for a call that has not come back from its caller's code for
``PATIENCE`` seconds goes without a turn.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

PATIENCE = 1.0


class Turns:
    """A lock that knows who has it, and since when its owner is in code that may wait for others."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._away_since: float | None = None

    def is_mine(self) -> bool:
        """Whether this thread has the turn."""
        return self._owner == threading.get_ident()

    @contextlib.contextmanager
    def take(self) -> Iterator[bool]:
        """Wait for a turn and have it inside; False inside where the one who has it may be waiting for this thread."""
        while not self._lock.acquire(timeout=PATIENCE / 4):
            away_since = self._away_since
            if away_since is not None and time.monotonic() - away_since > PATIENCE:
                yield False
                return
        try:
            self._owner = threading.get_ident()
            yield True
        finally:
            self._owner = None
            self._lock.release()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """The owner of the turn runs its caller's code inside."""
        self._away_since = time.monotonic()
        try:
            yield
        finally:
            self._away_since = None
