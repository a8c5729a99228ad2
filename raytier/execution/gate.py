"""Changes to what a sweep uses take effect between sweeps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class SweepGate:
    """Lets changes in while no sweep runs: at once when idle, else right before the next sweep begins.

    Invariant: a sweep and a change never run at the same time, nor do two changes. A change never waits for more than
    the sweep under way, however closely sweeps follow each other.
    """

    def __init__(self) -> None:
        self._busy = threading.Lock()
        self._changes: deque[tuple[Callable[[], object], Future[object]]] = deque()

    @contextmanager
    def sweep(self) -> Iterator[None]:
        """Hold changes back; those that wait already come first."""
        try:
            with self._busy:
                self._apply()
                yield
        finally:
            self._apply_if_idle()

    def between(self, change: Callable[[], T]) -> T:
        """Run `change` between sweeps and return its result; an exception of it is raised here and hurts no sweep."""
        future: Future[object] = Future()
        self._changes.append((change, future))
        self._apply_if_idle()
        return future.result()  # type: ignore[return-value]

    def _apply_if_idle(self) -> None:
        # What is appended while someone else holds the lock is seen by that one, here, after letting go of it.
        while self._changes and self._busy.acquire(blocking=False):
            try:
                self._apply()
            finally:
                self._busy.release()

    def _apply(self) -> None:
        while self._changes:
            change, future = self._changes.popleft()
            try:
                future.set_result(change())
            except BaseException as error:  # whatever it is, it belongs to the one who asked
                future.set_exception(error)
