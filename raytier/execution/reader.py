"""Threads that read file ranges into memory, several requests at a time."""

from __future__ import annotations

import logging
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

import numpy as np

from raytier.codecs.codec import Decoder, checksum
from raytier.errors import DamagedError, TierError
from raytier.execution.reads import Check, CodedRead, Read
from raytier.execution.ticket import ReadTicket
from raytier.planner.plan import FILE_TIERS, Tier
from raytier.tiers.aligned import ALIGNMENT, AlignedBuffer, align_down, align_up
from raytier.tiers.checks import SourceChecks, Sums
from raytier.tiers.files import DirectFile

logger = logging.getLogger(__name__)


class Urgency(IntEnum):
    """Which of the waiting requests a free thread takes first."""

    URGENT = 0  # someone computes nothing until the bytes are there
    STREAM = 1  # needed soon, in the order of submission
    BACKGROUND = 2  # transfers between tiers; they get one request in `BACKGROUND_SHARE` even while others wait


#: While the stream keeps the disk busy all the time, a transfer must go on all the same.
BACKGROUND_SHARE = 4


@dataclass(frozen=True, slots=True)
class ReadCount:
    """What was read without an error: bytes of files (alignment included), requests, and bytes that were decoded.

    Attributes:
        damaged: times that bytes were not what they should be, whatever came of it.
        mended: parameters whose files were written anew for that reason.
    """

    nbytes: int = 0
    reads: int = 0
    decoded: int = 0
    damaged: int = 0
    mended: int = 0

    def __add__(self, other: ReadCount) -> ReadCount:
        return ReadCount(
            self.nbytes + other.nbytes,
            self.reads + other.reads,
            self.decoded + other.decoded,
            self.damaged + other.damaged,
            self.mended + other.mended,
        )


#: Called with a parameter, whether a tier has made its files, what is wrong with bytes of it, and what reads and checks
#: them again. Returns when they are there, else raises DamagedError.
Recover = Callable[[str, bool, str, Callable[[], str | None]], None]


class _Workspace:
    """Memory of one thread for what is read and not yet decoded. It grows to the largest request, and is kept."""

    def __init__(self) -> None:
        self.decoder = Decoder()
        self._scratch: AlignedBuffer | None = None

    def scratch(self, nbytes: int) -> memoryview:
        if self._scratch is None or self._scratch.nbytes < nbytes:
            self._scratch = AlignedBuffer(nbytes)
        return self._scratch.view


@dataclass(frozen=True, slots=True)
class _File:
    """A file of the pool, the tier that it counts for, and what ranges of it were when they were first read."""

    direct: DirectFile
    tier: Tier
    sums: Sums


class _Together:
    """Plain reads that were submitted together: what is checked may be brought by several requests."""

    def __init__(self, reads: Sequence[Read], files: Sequence[_File], view: memoryview) -> None:
        self.view = view
        self._reads = reads
        self._files = files
        self._brought: dict[int, int] = {}  # by `Check.dest`, of those that are not there yet
        self._lock = threading.Lock()

    def complete(self, check: Check, nbytes: int) -> bool:
        """Note that `nbytes` more of a check's are there; whether all are."""
        if nbytes == check.nbytes:
            return True
        with self._lock:
            self._brought[check.dest] = nbytes + self._brought.get(check.dest, 0)
            return self._brought[check.dest] == check.nbytes

    def damage(self, check: Check) -> str | None:
        """What is wrong with bytes that are there; None: nothing."""
        found = checksum(self.view[check.dest : check.end])
        file = next(file for read, file in self._reading(check))
        if check.checksum is None:
            expected = file.sums.setdefault((check.offset, check.nbytes), found)
        else:
            expected = check.checksum
        return None if found == expected else _describe(file.direct.path, check.offset, check.nbytes, check.name)

    def again(self, check: Check) -> str | None:
        """Read once more what is checked, and check it."""
        for read, file in self._reading(check):
            first = align_down(max(check.dest, read.dest) - read.dest)
            last = min(align_up(min(check.end, read.dest + read.nbytes) - read.dest), read.nbytes)
            into = self.view[read.dest + first : read.dest + align_up(last)]
            try:
                file.direct.read_into(into, read.offset + first, last - first)
            except TierError as error:
                return error.message
        return self.damage(check)

    def _reading(self, check: Check) -> Iterator[tuple[Read, _File]]:
        for read, file in zip(self._reads, self._files, strict=True):
            if read.dest < check.end and check.dest < read.dest + read.nbytes:
                yield read, file


@dataclass(frozen=True, slots=True)
class _PlainRequest:
    """`nbytes` from `start` on of a read."""

    ticket: ReadTicket
    source: _File
    together: _Together
    read: Read
    start: int
    nbytes: int

    def execute(self, workspace: _Workspace, recover: Recover) -> ReadCount:
        read, together = self.read, self.together
        first = read.dest + self.start
        last = first + self.nbytes
        into = together.view[first : read.dest + align_up(self.start + self.nbytes)]
        checks = read.checks[bisect_right(read.checks, first, key=lambda c: c.end) :]
        failed: TierError | None = None
        try:
            self.source.direct.read_into(into, read.offset + self.start, self.nbytes)
        except TierError as error:
            if not checks or checks[0].checksum is None:
                raise
            failed = error  # what a tier has made can be made again
        for check in checks:
            if check.dest >= last:
                break
            if together.complete(check, min(last, check.end) - max(first, check.dest)):
                problem = together.damage(check) if failed is None else failed.message
                if problem is not None:
                    recover(check.name, check.checksum is not None, problem, partial(together.again, check))
        return ReadCount(self.nbytes, 1)


@dataclass(frozen=True, slots=True)
class _CodedRequest:
    ticket: ReadTicket
    files: tuple[_File, ...]
    coded: CodedRead
    view: memoryview  # of the whole unit

    @property
    def source(self) -> _File:
        return self.files[0]

    def execute(self, workspace: _Workspace, recover: Recover) -> ReadCount:
        coded = self.coded
        scratch = workspace.scratch(coded.scratch_bytes)
        if (problem := self._fetch(scratch)) is not None:
            recover(coded.name, True, problem, partial(self._fetch, scratch))
        data, unit = np.frombuffer(scratch, np.uint8), np.frombuffer(self.view, np.uint8)
        for frame in coded.frames:
            workspace.decoder.decode(
                coded.codec,
                coded.element,
                data[frame.offset : frame.offset + frame.nbytes],
                unit[frame.dest : frame.dest + frame.decoded],
            )
        return ReadCount(coded.nbytes, len(coded.reads), sum(frame.decoded for frame in coded.frames))

    def _fetch(self, scratch: memoryview) -> str | None:
        """Read all frames to `scratch` and check them; what is wrong with them, None: nothing."""
        coded = self.coded
        try:
            for file, read in zip(self.files, coded.reads, strict=True):
                into = scratch[read.dest : read.dest + align_up(read.nbytes)]
                file.direct.read_into(into, read.offset, read.nbytes)
        except TierError as error:
            return error.message
        for frame in coded.frames:
            if checksum(scratch[frame.offset : frame.offset + frame.nbytes]) != frame.checksum:
                at = bisect_right(coded.reads, frame.offset, key=lambda read: read.dest) - 1
                offset = coded.reads[at].offset + frame.offset - coded.reads[at].dest
                return _describe(self.files[at].direct.path, offset, frame.nbytes, coded.name)
        return None


def _describe(path: str, offset: int, nbytes: int, name: str) -> str:
    return f"{path} is damaged: bytes {offset} to {offset + nbytes} ({name}) are not what they were"


_Request = _PlainRequest | _CodedRequest


class ReaderPool:
    """`threads` threads execute reads of numbered files in requests of at most `io_bytes`.

    The caller owns the files and closes them after the pool, or after `drop_file`.

    What is read is checked before its ticket is over. What is not as it should be is read again; still wrong, a file
    that a tier has made is mended, if that can be done, else the ticket fails with DamagedError.

    Args:
        checks: what is known of `files`; it learns what is read for the first time. None: nothing.
        mend: makes the files of a parameter again, in place; raises DamagedError when it cannot.
    """

    def __init__(
        self,
        files: Sequence[DirectFile],
        threads: int,
        io_bytes: int,
        checks: SourceChecks | None = None,
        mend: Callable[[str], None] | None = None,
    ) -> None:
        if threads <= 0 or io_bytes <= 0 or io_bytes % ALIGNMENT:
            raise ValueError(f"{threads} threads, {io_bytes} bytes: at least one, in multiples of {ALIGNMENT}")
        known: Sequence[Sums] = [{} for _ in files] if checks is None else checks.sums
        self._checks = checks
        self._files: list[_File | None] = [_File(f, Tier.NVME, s) for f, s in zip(files, known, strict=True)]
        self._mend = mend
        self._mending = threading.Lock()
        self._counts = dict.fromkeys(FILE_TIERS, ReadCount())
        self._io_bytes = io_bytes
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._queues: dict[Urgency, deque[_Request]] = {urgency: deque() for urgency in Urgency}
        self._taken = 0
        self._closed = False
        names = [f"raytier-read-{index}" for index in range(threads)]
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def add_file(self, file: DirectFile, tier: Tier) -> int:
        """The number of one more file; numbers of dropped files are used again."""
        with self._lock:
            if None in self._files:
                index = self._files.index(None)
                self._files[index] = _File(file, tier, {})
                return index
            self._files.append(_File(file, tier, {}))
            return len(self._files) - 1

    def drop_file(self, index: int) -> DirectFile:
        """Forget file `index` and return it; no read of it may be waiting or running."""
        with self._lock:
            entry, self._files[index] = self._entry(index), None
            return entry.direct

    @property
    def files(self) -> tuple[DirectFile, ...]:
        """Files that have not been dropped."""
        with self._lock:
            return tuple(entry.direct for entry in self._files if entry is not None)

    def count(self, *tiers: Tier) -> ReadCount:
        """Read since the pool was made, from all tiers or from `tiers`, dropped files included."""
        with self._lock:
            return sum((self._counts[tier] for tier in tiers or FILE_TIERS), ReadCount())

    @property
    def queued(self) -> int:
        """Requests that no thread has taken yet."""
        with self._lock:
            return sum(map(len, self._queues.values()))

    def _entry(self, index: int) -> _File:
        entry = self._files[index]
        if entry is None:
            raise ValueError(f"file {index} was dropped")
        return entry

    def submit(
        self, reads: Iterable[Read | CodedRead], view: memoryview, urgency: Urgency = Urgency.STREAM
    ) -> ReadTicket:
        """Read, and decode, all of `reads` into `view`: at an aligned address, and there until the ticket is over."""
        reads = tuple(reads)
        plain = [read for read in reads if isinstance(read, Read)]
        files = [self._entry(read.file) for read in plain]
        together = _Together(plain, files, view)
        pieces = [self._split(read.nbytes) for read in plain]
        ticket = ReadTicket(sum(map(len, pieces)) + len(reads) - len(plain))
        requests: list[_Request] = []
        for read, file, parts in zip(plain, files, pieces, strict=True):
            requests += (_PlainRequest(ticket, file, together, read, start, nbytes) for start, nbytes in parts)
        for coded in reads:
            if isinstance(coded, CodedRead):
                requests.append(_CodedRequest(ticket, tuple(self._entry(one.file) for one in coded.reads), coded, view))
        with self._work:
            if self._closed:
                raise TierError("the reader pool is closed")
            self._queues[urgency].extend(requests)
            self._work.notify(len(requests))
        return ticket

    def _split(self, nbytes: int) -> list[tuple[int, int]]:
        """(start, bytes) of requests of about equal size: a small rest would cost a request for little."""
        count = -(-nbytes // self._io_bytes)
        size = align_up(-(-nbytes // count)) if count else 1
        return [(start, min(size, nbytes - start)) for start in range(0, nbytes, size)]

    def _run(self) -> None:
        workspace = _Workspace()
        while request := self._next():
            self._execute(request, workspace)
            del request  # or it would keep the memory alive while this thread waits

    def _execute(self, request: _Request, workspace: _Workspace) -> None:
        ticket = request.ticket
        if not ticket.begin():
            return
        try:
            count = request.execute(workspace, partial(self._recover, request.source.tier))
        except TierError as error:
            ticket.fail(error, running=True)
        except Exception as error:  # whatever it is, the one who waits must hear of it
            ticket.fail(TierError(f"reading {request.source.direct.path} failed: {error!r}"), running=True)
        else:
            with self._lock:
                self._counts[request.source.tier] += count
            ticket.end(count.nbytes)
            if self._checks is not None:
                self._checks.save_sometimes()

    def _recover(self, tier: Tier, name: str, made: bool, problem: str, again: Callable[[], str | None]) -> None:
        logger.warning("%s; reading it again", problem)
        with self._lock:
            self._counts[tier] += ReadCount(damaged=1)
        if (found := again()) is None:
            return
        if not made or self._mend is None:
            raise DamagedError(f"{found}; restore the file")
        with self._mending:
            if again() is None:  # another thread has had it mended
                return
            self._mend(name)
            if (found := again()) is not None:
                raise DamagedError(f"{found}, and writing it again did not help: the disk may be failing")
            with self._lock:
                self._counts[tier] += ReadCount(mended=1)

    def _next(self) -> _Request | None:
        with self._work:
            self._work.wait_for(lambda: self._closed or any(self._queues.values()))
            if self._closed:
                return None
            urgent, stream, background = self._queues.values()
            self._taken += 1
            if background and not urgent and self._taken % BACKGROUND_SHARE == 0:
                return background.popleft()
            return (urgent or stream or background).popleft()

    def close(self) -> None:
        """End the threads after the requests that they execute now; tickets with others left fail."""
        with self._work:
            self._closed = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join()
        for queue in self._queues.values():
            for request in queue:
                request.ticket.fail(TierError("the reader pool was closed before the read began"), running=False)
            queue.clear()

    def __enter__(self) -> ReaderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
