"""Reading checkpoint files past the page cache."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import threading
from collections.abc import Callable

from raytier.errors import CheckpointError, TierError
from raytier.tiers.aligned import ALIGNMENT, address_of, align_down, align_up

logger = logging.getLogger(__name__)

#: What a filesystem without O_DIRECT answers, at open or at the first read.
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP)
_told_lock = threading.Lock()
_told_devices: set[int] = set()


class DirectFile:
    """A file of known size, read with O_DIRECT; any number of threads may read at once.

    Where the filesystem refuses O_DIRECT, reads go through the page cache and are dropped from it right
    after (said once per filesystem in the log); offsets, lengths and addresses keep the same alignment.

    Args:
        path: of a regular file.
        size: in bytes, as the manifest recorded it.
        opener, preadv: stand-ins for `os.open` and `os.preadv` (fault injection).

    Raises:
        CheckpointError: the file is missing, or its size on disk is not `size`.
        TierError: it cannot be opened for another reason.
    """

    def __init__(
        self,
        path: str,
        size: int,
        *,
        opener: Callable[[str, int], int] = os.open,
        preadv: Callable[[int, list[memoryview], int], int] = os.preadv,
    ) -> None:
        self.path = path
        self.size = size
        self._preadv = preadv
        self._direct = True
        flags = os.O_RDONLY | os.O_CLOEXEC
        try:
            try:
                self._fd = opener(path, flags | os.O_DIRECT)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                self._fd = opener(path, flags)
                self._use_page_cache()
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing: restore it or download the model again") from error
        except OSError as error:
            raise TierError(f"cannot open {path} for reading: {error.strerror} (errno {error.errno})") from error
        actual = os.fstat(self._fd).st_size
        if actual != size:
            self.close()
            raise CheckpointError(
                f"{path} has {actual} bytes, expected {size}: it is truncated or was replaced; "
                "restore it, or load the model again if it was changed on purpose"
            )

    @property
    def direct(self) -> bool:
        """Whether reads bypass the page cache."""
        return self._direct

    def read_into(self, view: memoryview, offset: int, nbytes: int) -> int:
        """Read `nbytes` at `offset` into the start of `view`; returns the bytes transferred, always all of them.

        `offset` and the address of `view` are multiples of `ALIGNMENT`, and so is `nbytes` unless the range ends
        with the file. `view` must hold `align_up(nbytes)` bytes: the file's last block is asked for whole.

        Raises:
            TierError: the disk reports an error, or the file has become shorter.
        """
        end = offset + nbytes
        if offset % ALIGNMENT or address_of(view) % ALIGNMENT or (nbytes % ALIGNMENT and end != self.size):
            raise ValueError(f"{self.path}: unaligned read of {nbytes} bytes at {offset} to {address_of(view):#x}")
        if end > self.size or len(view) < align_up(nbytes):
            raise ValueError(f"{self.path}: {nbytes} bytes at {offset} exceed {self.size} or a view of {len(view)}")
        done = 0
        while done < nbytes:
            start = align_down(done)  # a read cut short inside a block goes on from the start of that block
            reached = start + self._read(view[start : align_up(nbytes)], offset + start)
            if reached <= done:
                raise TierError(f"{self.path} ends at byte {offset + done} of {self.size}: cut while in use")
            done = reached
        if not self._direct:
            os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
        return min(done, nbytes)

    def _read(self, view: memoryview, offset: int) -> int:
        while True:
            direct = self._direct
            try:
                return self._preadv(self._fd, [view], offset)  # os.preadv itself retries EINTR
            except OSError as error:
                if direct and error.errno in _UNSUPPORTED:
                    self._use_page_cache()
                    continue
                reason = f"{error.strerror} (errno {error.errno})"
                raise TierError(f"reading {len(view)} bytes at {offset} of {self.path} failed: {reason}") from error

    def _use_page_cache(self) -> None:
        # The flag is cleared on the open descriptor, so readers in other threads are never left with a closed one.
        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead: it would stay in the cache
        self._direct = False
        device = os.fstat(self._fd).st_dev
        with _told_lock:
            if device in _told_devices:
                return
            _told_devices.add(device)
        logger.warning("no O_DIRECT for %s: its filesystem is read through the page cache, slower", self.path)

    def close(self) -> None:
        """Close the descriptor; the caller makes sure that no read is under way."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
