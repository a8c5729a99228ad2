"""How fast files are read and written on this node, past the page cache. No torch."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import mmap
import os
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

from raytier.errors import TierError

logger = logging.getLogger(__name__)

_ALIGN = 4096
_REQUEST = 8 * 2**20
_QUEUE_DEPTH = 4
#: Reads go round a region of this size, as layers go round the ring. A few buffers that are used again and again stay
#: in the caches of the CPU: reading into them was measured at up to twice the rate at which layers then arrived.
_REGION = 128 * 2**20
#: Largest file written for a measurement, and the share of the free space that it may take.
_PROBE_BYTES = 256 * 2**20
_PROBE_SHARE = 0.1
#: A disk that has not answered by then does not answer.
_PATIENCE_S = 10.0
#: A rate from fewer bytes says little; a directory without room for them is not measured.
_LEAST_BYTES = 8 * 2**20


class DiskReaders:
    """Threads that read files at random aligned offsets from `__enter__` to `stop`, several requests in flight.

    This is how layers are fetched: requests of 8 MiB, spread over all files (stripes on several disks), into
    page-aligned memory on huge pages. Small files are read again and again; with O_DIRECT every read reaches the disk.

    Args:
        paths: existing files, the larger the better.

    Raises:
        TierError: a file is missing, empty or unreadable.
    """

    def __init__(self, paths: Sequence[str], depth: int = _QUEUE_DEPTH) -> None:
        self._files: list[_File] = []
        self._errors: list[OSError] = []
        self._nbytes = 0
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        try:
            for path in paths:
                self._files.append(_File(path))
        except OSError as error:
            self._close_files()
            raise TierError(f"{error.filename or paths[0]} cannot be read: {error.strerror or error}") from error
        self._length = min(file.length for file in self._files)
        # Anonymous maps are page-aligned, as O_DIRECT demands; with small pages the same disk was measured at a third.
        slots = max(depth, _REGION // self._length if self._length >= 2**20 else depth)
        self._region = mmap.mmap(-1, slots * self._length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            self._region.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, len(self._region), _ALIGN):
            self._region[start] = 1  # the first touch costs more than the read: keep it out of the time
        self._slots = itertools.cycle(range(slots))
        self._turns = itertools.cycle(self._files)
        self._threads = [threading.Thread(target=self._run, args=(i,), name=f"disk-rate-{i}") for i in range(depth)]

    def read_so_far(self) -> int:
        """Bytes read until now."""
        with self._lock:
            return self._nbytes

    def wait_for_first(self) -> None:
        """Return when reads have begun to come back, so that a rate from now on starts and ends in the middle of reads.

        Raises:
            TierError: none has within 10 s.
        """
        deadline = time.perf_counter() + _PATIENCE_S
        while not self.read_so_far() and not self._errors:
            if time.perf_counter() > deadline:
                raise TierError(f"nothing was read within {_PATIENCE_S:g} s: the disk does not answer")
            time.sleep(0.001)

    def rate_over(self, seconds: float) -> float:
        """Bytes per second over the next `seconds`, or as long as it takes for a few reads to end."""
        before, began = self.read_so_far(), time.perf_counter()
        deadline = began + max(seconds, _PATIENCE_S)
        while True:
            time.sleep(seconds)
            nbytes, now = self.read_so_far() - before, time.perf_counter()
            if nbytes >= len(self._threads) * self._length or self._errors or now > deadline:
                return max(1, nbytes) / (now - began)

    def stop(self) -> None:
        """End the reads and free everything; TierError when one of them failed."""
        self._stopping.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._close_files()
        self._region.close()
        if self._errors:
            error = self._errors[0]
            raise TierError(f"{error.filename or 'the disk'} cannot be read: {error}") from error

    def _run(self, seed: int) -> None:
        draw = random.Random(seed)
        try:
            with memoryview(self._region) as view:
                while not self._stopping.is_set():
                    with self._lock:
                        slot, file = next(self._slots), next(self._turns)
                    with view[slot * self._length : (slot + 1) * self._length] as target:
                        nbytes = file.read(target, draw)
                    with self._lock:
                        self._nbytes += nbytes
        except OSError as error:
            self._errors.append(error)

    def _close_files(self) -> None:
        for file in self._files:
            file.close()
        self._files = []

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _File:
    """One file, opened with O_DIRECT where the filesystem has it; `length` = bytes of one read."""

    def __init__(self, path: str) -> None:
        size = os.path.getsize(path)
        if size == 0:
            raise OSError(errno.ENODATA, "it is empty", path)
        self._fd, self._direct = open_direct(path, os.O_RDONLY)
        self.length = max(_ALIGN, min(_REQUEST, size // _ALIGN * _ALIGN))
        self._size = size

    def read(self, target: memoryview, draw: random.Random) -> int:
        offset = draw.randrange(max(1, (self._size - len(target)) // _ALIGN + 1)) * _ALIGN
        nbytes = os.preadv(self._fd, [target], offset)
        if not self._direct:  # or the next read of the same bytes would come from memory
            os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
        return nbytes

    def close(self) -> None:
        os.close(self._fd)


def open_direct(path: str, flags: int) -> tuple[int, bool]:
    """A descriptor of `path`, and whether it bypasses the page cache; where O_DIRECT is refused, it does not."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC), True
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    logger.info("%s: O_DIRECT is not supported here, its rate is measured through the page cache", path)
    return os.open(path, flags | os.O_CLOEXEC), False


def measure_disk_read(paths: str | Sequence[str], seconds: float = 0.5) -> float:
    """Bytes per second of reading existing files past the page cache, all of `paths` at the same time.

    Raises:
        TierError: a file is missing, empty or unreadable.
    """
    with DiskReaders([paths] if isinstance(paths, str) else paths) as readers:
        readers.wait_for_first()
        return readers.rate_over(seconds)


@contextlib.contextmanager
def probe_files(directories: Sequence[str], seconds: float = 0.4) -> Iterator[tuple[list[str], float | None]]:
    """One freshly written file per directory, and the bytes per second with which all of them were written.

    The files are for measuring reads; they are gone at the end. They take at most 256 MiB and a tenth of the free space
    each. The rate is None, and the list empty, where that is too little to measure or the directory cannot be written.
    """
    files: list[str] = []
    try:
        rate = None
        try:
            for directory in directories:
                handle, name = tempfile.mkstemp(prefix=".raytier-rate-", dir=directory)
                files.append(name)
                os.close(handle)
            rate = _write(files, seconds)
        except OSError as error:
            logger.warning("%s: the write rate cannot be measured here: %s", ", ".join(directories), error)
        yield (files if rate is not None else []), rate
    finally:
        for name in files:
            with contextlib.suppress(OSError):
                os.unlink(name)


def _write(files: Sequence[str], seconds: float) -> float | None:
    """Fill all files at the same time, each by its own threads; bytes per second until the disk has everything."""
    room = min(int(shutil.disk_usage(os.path.dirname(name)).free * _PROBE_SHARE) for name in files)
    limit = min(_PROBE_BYTES, room // _REQUEST * _REQUEST)
    if limit < _LEAST_BYTES:
        return None
    data = mmap.mmap(-1, _REQUEST, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    data.write(random.Random(0).randbytes(2**20) * (_REQUEST // 2**20))  # no zeros: some disks do not store those
    handles: list[int] = []
    try:
        for name in files:
            handles.append(open_direct(name, os.O_WRONLY)[0])
        offsets = [itertools.count(0, _REQUEST) for _ in handles]
        errors: list[OSError] = []
        written = [0] * (_QUEUE_DEPTH * len(handles))
        began = time.perf_counter()
        deadline = began + seconds

        def run(number: int) -> None:
            index = number % len(handles)
            try:
                while (offset := next(offsets[index])) < limit:
                    written[number] += os.pwritev(handles[index], [data], offset)
                    if time.perf_counter() > deadline and offset >= _LEAST_BYTES:
                        return
            except OSError as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(i,), name=f"disk-rate-{i}") for i in range(len(written))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        for handle in handles:
            os.fdatasync(handle)
        return sum(written) / (time.perf_counter() - began)
    finally:
        for handle in handles:
            os.close(handle)
        data.close()
