"""How much of the machine other processes use right now. A leaf: imports nothing of the project."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STAT = Path("/proc/stat")


def cores_used_by_others(seconds: float = 0.5) -> float | None:
    """Cores that other processes kept busy over the next ``seconds``; None where the system does not tell (not Linux).

    The load average would be older: a minute after an installation it still counts that one.
    """
    before = _busy_seconds()
    started = time.monotonic()
    if before is None:
        return None
    time.sleep(seconds)
    after = _busy_seconds()
    if after is None:
        return None
    return max(0.0, after[0] - before[0] - (after[1] - before[1])) / (time.monotonic() - started)


def _busy_seconds() -> tuple[float, float] | None:
    """Busy seconds of all cores since boot, and of this process's threads."""
    try:
        # cpu user nice system idle iowait irq softirq steal, in clock ticks: proc_stat(5). Guests are in user and nice.
        user, nice, system, _idle, _iowait, irq, softirq = map(int, _STAT.read_text().split("\n")[0].split()[1:8])
        ticks = os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, AttributeError):
        return None
    own = os.times()
    return (user + nice + system + irq + softirq) / ticks, own.user + own.system
