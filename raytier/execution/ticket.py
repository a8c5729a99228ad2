"""What reads that were submitted together have come to."""

from __future__ import annotations

import threading

from raytier.errors import TierError


class ReadTicket:
    """Reads submitted together: wait for all of them, or cancel.

    Invariant: `_running <= _unfinished`, and memory of the ticket is written only while `_running > 0`.
    """

    def __init__(self, requests: int) -> None:
        self._unfinished = requests  # neither done nor skipped
        self._running = 0
        self._error: TierError | None = None
        self._cancelled = False
        self._bytes_read = 0
        self._changed = threading.Condition()

    @property
    def done(self) -> bool:
        """Whether `wait` would return or raise at once."""
        with self._changed:
            return self._over

    @property
    def bytes_read(self) -> int:
        """Bytes read so far."""
        with self._changed:
            return self._bytes_read

    def wait(self, timeout: float | None = None) -> None:
        """Return when everything has been read. When it raises an error of a read, no memory is being written any more.

        Raises:
            TierError: the first error of a read; the ticket was cancelled; or `timeout` seconds have passed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._over, timeout):
                raise TierError(f"{self._unfinished} reads have not ended within {timeout} s: the disk does not answer")
            if self._error:
                raise self._error
            if self._cancelled and self._unfinished:
                raise TierError("the reads were cancelled")

    def cancel(self) -> None:
        """Skip what has not begun and return when nothing is being written any more: the memory is free again."""
        with self._changed:
            self._cancelled = True
            self._changed.wait_for(lambda: self._running == 0)

    @property
    def _over(self) -> bool:
        stopped = self._cancelled or self._error is not None
        return self._running == 0 and (stopped or self._unfinished == 0)

    # The three below are called by the pool's threads.

    def begin(self) -> bool:
        """Whether the next request is to be executed; if so, `end` or `fail` follows."""
        with self._changed:
            if self._cancelled or self._error:
                return False
            self._running += 1
            return True

    def end(self, nbytes: int) -> None:
        with self._changed:
            self._running -= 1
            self._unfinished -= 1
            self._bytes_read += nbytes
            self._changed.notify_all()

    def fail(self, error: TierError, *, running: bool) -> None:
        with self._changed:
            self._running -= running
            self._error = self._error or error
            self._changed.notify_all()
