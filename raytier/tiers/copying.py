"""Copying ranges of checkpoint files into new files, past the page cache and in bounded memory."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from raytier.checkpoint.manifest import Extent, SourceFile
from raytier.errors import CheckpointError, TierError
from raytier.tiers.aligned import ALIGNMENT, AlignedBuffer, align_down, align_up
from raytier.tiers.files import DirectFile
from raytier.tiers.striping import slice_extents

#: Bytes read, and then written, in one request.
CHUNK_BYTES = 4 << 20
#: Files written at once: while one is written, another is read for.
THREADS = 3

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP)

#: As `os.open` with a mode.
Opener = Callable[[str, int, int], int]


@dataclass(frozen=True, slots=True)
class CopyJob:
    """A file to be written.

    Attributes:
        path: of the new file; nothing is there yet.
        size: in bytes, a multiple of `ALIGNMENT`; what no extent fills is zero.
        source: extents whose concatenation are the bytes of a parameter.
        extents: the same bytes in the files of the copy, of which this is number `index`.
    """

    path: str
    size: int
    source: tuple[Extent, ...]
    extents: tuple[Extent, ...]
    index: int

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """(offset in the file, first byte in the parameter, bytes) of every request, at most `CHUNK_BYTES` each."""
        position = 0
        for extent in self.extents:
            if extent.file == self.index:
                for start in range(0, extent.nbytes, CHUNK_BYTES):
                    nbytes = min(CHUNK_BYTES, extent.nbytes - start)
                    yield extent.offset + start, position + start, nbytes
            position += extent.nbytes


def copy_all(
    jobs: Sequence[CopyJob],
    sources: Sequence[SourceFile],
    wrote: Callable[[int, int], None],
    cancelled: Callable[[], bool],
    opener: Opener = os.open,
) -> None:
    """Write the files of `jobs`, each under a temporary name until it is complete and on the disk.

    When it raises, no temporary file is left and nothing is being written any more; files that were complete stay.

    Args:
        sources: what the source extents of the jobs index.
        wrote: called after every request with the bytes written and the bytes read for it.
        cancelled: asked before every request.

    Raises:
        OSError: the disk is full; `filename` is the file that did not fit.
        CheckpointError: a source is missing, has another size, or ends before an extent does.
        TierError: reading or writing failed, or it was cancelled.
    """
    used = {extent.file for job in jobs for extent in job.source}
    for job in jobs:
        for extent in job.source:
            if extent.offset + extent.nbytes > sources[extent.file].size:
                file = sources[extent.file]
                raise CheckpointError(f"{file.path} has {file.size} bytes, {extent} reaches beyond its end")
    failed = threading.Event()
    waiting = SimpleQueue[CopyJob]()
    for job in jobs:
        waiting.put(job)
    errors: list[BaseException] = []
    with ExitStack() as stack:
        files = {number: stack.enter_context(DirectFile(sources[number].path, sources[number].size)) for number in used}

        def stopped() -> bool:
            return failed.is_set() or cancelled()

        def work() -> None:
            try:
                with AlignedBuffer(CHUNK_BYTES + 2 * ALIGNMENT) as read, AlignedBuffer(CHUNK_BYTES) as written:
                    while True:
                        _copy(waiting.get_nowait(), files, read.view, written.view, wrote, stopped, opener)
            except Empty:
                pass
            except BaseException as error:
                errors.append(error)
                failed.set()

        with ThreadPoolExecutor(THREADS, thread_name_prefix="raytier-copy") as pool:
            for _ in range(min(THREADS, len(jobs))):
                pool.submit(work)
    if errors:
        raise errors[0]


def _copy(
    job: CopyJob,
    files: dict[int, DirectFile],
    read: memoryview,
    written: memoryview,
    wrote: Callable[[int, int], None],
    stopped: Callable[[], bool],
    opener: Opener,
) -> None:
    temporary = f"{job.path}.new"
    try:
        with _NewFile(temporary, job.size, opener) as new:
            for offset, start, nbytes in job.chunks():
                if stopped():
                    raise TierError(f"copying to {job.path} was stopped")
                padded = align_up(nbytes)
                nread = _gather(job.source, start, nbytes, files, read, written)
                written[nbytes:padded] = bytes(padded - nbytes)
                new.write(written[:padded], offset)
                wrote(padded, nread)
            new.sync()
        with _naming(temporary):
            os.rename(temporary, job.path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _gather(
    source: Sequence[Extent], start: int, nbytes: int, files: dict[int, DirectFile], read: memoryview, into: memoryview
) -> int:
    """Bytes [start, start + nbytes) of the concatenation of `source` to the start of `into`; returns bytes read."""
    position = total = 0
    for extent in slice_extents(source, start, start + nbytes):
        file = files[extent.file]
        first = align_down(extent.offset)
        last = min(align_up(extent.offset + extent.nbytes), file.size)
        total += file.read_into(read, first, last - first)
        skip = extent.offset - first
        into[position : position + extent.nbytes] = read[skip : skip + extent.nbytes]
        position += extent.nbytes
    return total


class _NewFile:
    """A file of known size that is written with O_DIRECT where the filesystem can, else through the page cache."""

    def __init__(self, path: str, size: int, opener: Opener) -> None:
        self._path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with _naming(path):
            try:
                self._fd = opener(path, flags | os.O_DIRECT, 0o600)
                self._direct = True
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                with suppress(FileNotFoundError):  # the file may have been made before O_DIRECT was refused
                    os.unlink(path)
                self._fd = opener(path, flags, 0o600)
                self._direct = False
            try:
                os.ftruncate(self._fd, size)  # a tmpfs takes huge pages only within the size that it knows
            except BaseException:
                os.close(self._fd)
                raise

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of `view`, whose address, like `offset` and its length, is aligned."""
        done = 0
        with _naming(self._path):
            while done < len(view):
                done += self._pwrite(view[done:], offset + done)

    def _pwrite(self, view: memoryview, offset: int) -> int:
        try:
            return os.pwrite(self._fd, view, offset)
        except OSError as error:
            if not self._direct or error.errno not in _UNSUPPORTED:
                raise
        fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
        self._direct = False
        return os.pwrite(self._fd, view, offset)

    def sync(self) -> None:
        """Wait until it is on the disk, and leave nothing of it in the page cache."""
        with _naming(self._path):
            os.fsync(self._fd)
        if not self._direct:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def __enter__(self) -> _NewFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """An OSError becomes a TierError that names `path`, or, when the disk is full, one whose `filename` that is."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise OSError(error.errno, error.strerror, path) from error
        raise TierError(f"writing {path} failed: {error.strerror} (errno {error.errno})") from error
