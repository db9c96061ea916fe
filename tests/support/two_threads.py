"""Two actions at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable


def in_two_threads(first: Callable[[], None], second: Callable[[], None]) -> None:
    threads = [threading.Thread(target=action) for action in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
