"""Writing parameters of a checkpoint to new files, in another form or coded where a scheme says so, past the page cache
and in bounded memory."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

import numpy as np
import xxhash

from raytier.checkpoint.manifest import Extent, Parameter, SourceFile, Stored
from raytier.codecs.codec import RATIOS, Encoder, Frames, checksum, frame_ranges, frame_step
from raytier.codecs.coded import DoesNotShrinkError
from raytier.codecs.forms import Bytes, Form
from raytier.codecs.scheme import Scheme, element_of, form_parts
from raytier.errors import CheckpointError, DamagedError, TierError
from raytier.tiers.aligned import ALIGNMENT, AlignedBuffer, align_down, align_up
from raytier.tiers.checks import SourceChecks, check_ranges
from raytier.tiers.copies import TierCopy
from raytier.tiers.files import DirectFile
from raytier.tiers.striping import file_sizes, slice_extents, stripe_extents

#: Bytes read, and then written, in one request.
CHUNK_BYTES = 4 << 20
#: Files written at once: while one is written, another is read for.
THREADS = 3

#: What is coded may turn out so much larger than expected.
_MARGIN = 1.03
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_UNSUPPORTED = (errno.EINVAL, errno.EOPNOTSUPP)

#: As `os.open` with a mode.
Opener = Callable[[str, int, int], int]


@dataclass(frozen=True, slots=True)
class CopyJob:
    """A parameter to be written.

    Attributes:
        paths: of its files, in stripes of `stripe_bytes`, a multiple of `ALIGNMENT`; nothing is there yet. What turns
            out to be small may need fewer of them.
        most: bytes in each of them at most.
    """

    parameter: Parameter
    scheme: Scheme
    paths: tuple[str, ...]
    stripe_bytes: int
    most: tuple[int, ...]


def copy_all(
    jobs: Sequence[CopyJob],
    sources: Sequence[SourceFile],
    wrote: Callable[[int, int], None],
    finished: Callable[[CopyJob, TierCopy], None],
    cancelled: Callable[[], bool],
    opener: Opener = os.open,
    checks: SourceChecks | None = None,
) -> None:
    """Write the files of `jobs`, each under a temporary name until all of its parameter is on the disk.

    When it raises, no temporary file is left and nothing is being written any more; files that were complete stay.

    Args:
        sources: what the extents of the jobs' parameters index.
        wrote: called after every request with the bytes written and the bytes read.
        finished: called with every parameter that is complete, by one of several threads.
        cancelled: asked before every request.
        checks: what is known of `sources`; what is read here first becomes known.

    Raises:
        OSError: the disk is full; `filename` is the file that did not fit.
        CheckpointError: a source is missing, has another size, or ends before an extent does.
        TierError: reading or writing failed, or it was cancelled. DamagedError: a source is not as it was.
    """
    used = {extent.file for job in jobs for extent in job.parameter.extents}
    for job in jobs:
        for extent in job.parameter.extents:
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
                    source = Source(files, read.view, wrote, stopped, checks)
                    while True:
                        job = waiting.get_nowait()
                        finished(job, _copy(job, source, written.view, wrote, opener))
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


class Source:
    """Reads parameters of the checkpoint, each from its beginning to its end, in memory that it uses again and again.

    What is read is checked as soon as a range of it is complete (`check_ranges`).
    """

    def __init__(
        self,
        files: dict[int, DirectFile],
        memory: memoryview,
        wrote: Callable[[int, int], None],
        stopped: Callable[[], bool],
        checks: SourceChecks | None,
    ) -> None:
        self._checks = checks
        self._checking: Iterator[tuple[int, Extent]] = iter(())
        self._expected = (0, Extent(0, 0, 0))
        self._sum = xxhash.xxh3_64()
        self._files = files
        self._memory = memory
        self._wrote = wrote
        self._stopped = stopped
        self._data = np.empty(0, np.uint8)

    def read(self, parameter: Parameter, start: int, stop: int) -> Bytes:
        """Bytes [start, stop) of a parameter, valid until the next call."""
        if len(self._data) < stop - start:
            self._data = np.empty(stop - start, np.uint8)
        data = self._data[: stop - start]
        for begin in range(start, stop, CHUNK_BYTES):
            if self._stopped():
                raise TierError(f"copying {parameter.name} was stopped")
            nbytes = min(CHUNK_BYTES, stop - begin)
            into = data.data[begin - start : begin - start + nbytes]
            self._wrote(0, _gather(parameter.extents, begin, nbytes, self._files, self._memory, into))
        if self._checks is not None:
            self._check(self._checks, parameter, start, data)
        return data

    def _check(self, checks: SourceChecks, parameter: Parameter, start: int, data: Bytes) -> None:
        """Check what becomes complete with the bytes `data` from `start` on, which follow those of the last call."""
        if start == 0:
            self._checking = check_ranges(parameter, 0, parameter.nbytes)
            self._expected = next(self._checking)
            self._sum.reset()
        position, stop = start, start + len(data)
        while position < stop:
            begin, extent = self._expected
            end = min(stop, begin + extent.nbytes)
            self._sum.update(data[position - start : end - start].data)
            position = end
            if end == begin + extent.nbytes:
                found = self._sum.intdigest()
                if checks.sums[extent.file].setdefault((extent.offset, extent.nbytes), found) != found:
                    path = self._files[extent.file].path
                    raise DamagedError(
                        f"{path} is damaged: bytes {extent.offset} to {extent.offset + extent.nbytes} "
                        f"({parameter.name}) are not what they were; restore the file"
                    )
                self._sum.reset()
                self._expected = next(self._checking, (stop, extent))


def _copy(
    job: CopyJob, source: Source, written: memoryview, wrote: Callable[[int, int], None], opener: Opener
) -> TierCopy:
    parameter, form = job.parameter, job.scheme.form
    piece_rows = parameter.piece_rows(form)
    encoder = Encoder(job.scheme.codec, element_of(form, parameter.dtype))
    step = frame_step(0, 0) if piece_rows else parameter.step(_form_nbytes(parameter, form))
    sizes: list[int] = []
    checksums: list[int] = []
    pieces: list[int] = []
    try:
        with _Striped(job, written, wrote, opener) as striped:
            for rows in row_pieces(parameter, piece_rows):
                pieces.append(0)
                for frame in form_frames(parameter, form, rows, source.read, step):
                    coded = encoder.encode(frame)
                    pieces[-1] += len(frame)
                    sizes.append(len(coded))
                    checksums.append(checksum(coded))
                    striped.append(memoryview(coded))
            several = tuple(pieces) if piece_rows else ()
            return striped.finish(Frames(sum(pieces), step, tuple(sizes), tuple(checksums), several), piece_rows)
    except DoesNotShrinkError:
        return _copy(replace(job, scheme=replace(job.scheme, form=None)), source, written, wrote, opener)


def row_pieces(parameter: Parameter, piece_rows: int) -> Iterator[tuple[int, int]]:
    """(first, last) of the rows that are encoded together."""
    rows = parameter.shape[0] if parameter.shape else 1
    for first in range(0, rows, piece_rows or max(1, rows)):
        yield first, min(rows, first + (piece_rows or rows))


def form_frames(
    parameter: Parameter,
    form: Form | None,
    rows: tuple[int, int],
    read: Callable[[Parameter, int, int], Bytes],
    step: int,
) -> Iterator[Bytes]:
    """Rows [first, last) of a parameter in a form, in pieces of `step` bytes and a rest, each valid until the next."""
    first, last = rows
    count = parameter.shape[0] if parameter.shape else 1
    begin = parameter.nbytes * first // max(1, count)
    nbytes = parameter.nbytes * last // max(1, count) - begin
    shape = (last - first, *parameter.shape[1:]) if parameter.shape else ()

    def part(start: int, stop: int) -> Bytes:
        return read(parameter, begin + start, begin + stop)

    yield from frames_of(form_parts(form, part, nbytes, parameter.dtype, shape), step)


def _form_nbytes(parameter: Parameter, form: Form | None) -> int:
    """Bytes in a form, as far as they are known before."""
    nbytes = None if form is None else form.nbytes(parameter.shape)
    return parameter.nbytes if nbytes is None else nbytes


def frames_of(parts: Iterable[Bytes], step: int) -> Iterator[Bytes]:
    """The concatenation of `parts` in pieces of `step` bytes and a rest, each valid until the next."""
    frame, filled = np.empty(step, np.uint8), 0
    for part in parts:
        position = 0
        while position < len(part):
            count = min(step - filled, len(part) - position)
            if count == step:
                yield part[position : position + step]
            else:
                frame[filled : filled + count] = part[position : position + count]
                filled += count
                if filled == step:
                    yield frame
                    filled = 0
            position += count
    if filled:
        yield frame[:filled]


class _Striped:
    """The files of one parameter, written from the beginning to the end through `memory`.

    What is written is dealt out as `stripe_extents` says. Leaving it before `finish` removes everything.
    """

    def __init__(self, job: CopyJob, memory: memoryview, wrote: Callable[[int, int], None], opener: Opener) -> None:
        self._job = job
        self._memory = memory
        self._wrote = wrote
        self._opener = opener
        self._files: list[_NewFile] = []
        self._position = 0  # of what has been written, in the coded bytes
        self._waiting = 0  # bytes in memory behind that

    def append(self, data: memoryview) -> None:
        while data:
            count = min(len(data), self._room() - self._waiting)
            self._memory[self._waiting : self._waiting + count] = data[:count]
            self._waiting += count
            data = data[count:]
            if self._waiting == self._room():
                self._flush()

    def _room(self) -> int:
        """Bytes that the next request may have: it ends with its stripe."""
        if len(self._job.paths) == 1:
            return len(self._memory)
        return min(len(self._memory), self._job.stripe_bytes - self._position % self._job.stripe_bytes)

    def _flush(self) -> None:
        if not self._waiting:
            return
        job, count = self._job, len(self._job.paths)
        stripe, within = divmod(self._position, job.stripe_bytes) if count > 1 else (0, self._position)
        number = stripe % count
        if number == len(self._files):
            self._files.append(_NewFile(f"{job.paths[number]}.new", job.most[number], self._opener))
        padded = align_up(self._waiting)
        self._memory[self._waiting : padded] = bytes(padded - self._waiting)
        self._files[number].write(self._memory[:padded], stripe // count * job.stripe_bytes + within)
        self._position += self._waiting
        self._waiting = 0
        self._wrote(padded, 0)

    def finish(self, frames: Frames, piece_rows: int) -> TierCopy:
        """Have it all on the disk under its name."""
        self._flush()
        job = self._job
        extents = stripe_extents(self._position, max(1, len(job.paths)), job.stripe_bytes)
        sizes = file_sizes(extents)
        for file, size in zip(self._files, sizes, strict=True):
            file.sync(size)
        for file, path in zip(self._files, job.paths, strict=False):
            with _naming(file.path):
                os.rename(file.path, path)
        files = tuple(SourceFile(path, size) for path, size in zip(job.paths, sizes, strict=False))
        return TierCopy(files, Stored(job.scheme.form, job.scheme.codec, frames, extents, piece_rows))

    def __enter__(self) -> _Striped:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for file in self._files:
            file.close()
        if kind is not None:
            for path in (path for one in self._job.paths for path in (f"{one}.new", one)):
                with suppress(OSError):
                    os.unlink(path)


def most_nbytes(parameter: Parameter, scheme: Scheme) -> int:
    """Upper bound of the bytes that a parameter takes in its files, padding left out."""
    nbytes = _form_nbytes(parameter, scheme.form)
    piece_rows = parameter.piece_rows(scheme.form)
    if piece_rows:
        frames = nbytes // frame_step(0, 0) + 2 * -(-parameter.shape[0] // piece_rows)
        return nbytes + frames * scheme.codec.most_bytes(0)
    step = parameter.step(nbytes)
    return sum(scheme.codec.most_bytes(stop - start) for start, stop in frame_ranges(nbytes, step))


def expected_nbytes(parameter: Parameter, scheme: Scheme) -> int:
    """Bytes that a parameter will take in its files, as far as can be said before it is coded."""
    dtype = parameter.dtype if scheme.form is None else scheme.form.dtype
    ratio = RATIOS.get(scheme.codec.name, {}).get(dtype or "", 1.0)
    return min(most_nbytes(parameter, scheme), int(_MARGIN * ratio * _form_nbytes(parameter, scheme.form)) + ALIGNMENT)


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
    """A file of at most `size` bytes, written with O_DIRECT where the filesystem can, else through the page cache."""

    def __init__(self, path: str, size: int, opener: Opener) -> None:
        self.path = path
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
        with _naming(self.path):
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

    def sync(self, size: int) -> None:
        """Cut it to `size`, wait until it is on the disk, and leave nothing of it in the page cache."""
        with _naming(self.path):
            os.ftruncate(self._fd, size)
            os.fsync(self._fd)
        if not self._direct:
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
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
