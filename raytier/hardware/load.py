"""How much of this node other processes use. No torch."""

from __future__ import annotations

import os
import time


class LoadMeter:
    """CPU time of everything but this process since the meter was made, stolen time included."""

    def __init__(self, stat: str = "/proc/stat") -> None:
        self._stat = stat
        self._began, self._before = time.perf_counter(), self._others()

    @property
    def other_cores(self) -> float:
        """Cores that other work has used on average until now; 0.0 where the kernel does not tell."""
        now, seconds = self._others(), time.perf_counter() - self._began
        if now is None or self._before is None or seconds <= 0:
            return 0.0
        return max(0.0, (now - self._before) / seconds)

    def _others(self) -> float | None:
        """CPU seconds of everybody else since the machine started."""
        try:
            with open(self._stat) as file:
                user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, file.readline().split()[1:9])
        except (OSError, ValueError):
            return None
        own = os.times()
        busy = user + nice + system + irq + softirq + steal  # guests are counted in user and nice
        return busy / os.sysconf("SC_CLK_TCK") - own.user - own.system
