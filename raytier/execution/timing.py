"""How long calls take on this device."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

#: Calls that took longer than this multiple of the fastest one were disturbed by other work.
_DISTURBED = 1.5
_LEAST_CALLS = 5
#: Slow calls may take this multiple of the time that was meant for them.
_PATIENCE = 3


def typical_seconds(call: Callable[[], object], seconds: float) -> float:
    """Median duration of `call` over `seconds`, or a little longer for five calls; a warm-up call left out.

    Calls that other work on the machine disturbed do not count. On two cores of which one is used by somebody else,
    nearly every parallel call waits for the end of a time slice and takes ten times as long, but a few do not.
    """
    call()
    durations: list[float] = []
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds or (
        len(durations) < _LEAST_CALLS and (not durations or spent < _PATIENCE * seconds)
    ):
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return median(d for d in durations if d <= _DISTURBED * min(durations))


def calls_per_second(call: Callable[[], object], seconds: float) -> float:
    """How often `call` is done in a second, disturbances included, over about `seconds`; a warm-up call left out."""
    call()
    count, began = 0, time.perf_counter()
    while (now := time.perf_counter()) < began + seconds or not count:
        call()
        count += 1
    return count / (now - began)


def wait(device: str) -> None:
    """Return when the device has done what it was given."""
    if device != "cpu":
        torch.cuda.synchronize(device)
