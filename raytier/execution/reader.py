"""Threads that read file ranges into memory, several requests at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from raytier.codecs.codec import Decoder
from raytier.errors import TierError
from raytier.execution.layout import CodedRead, Read
from raytier.planner.plan import FILE_TIERS, Tier
from raytier.tiers.aligned import ALIGNMENT, AlignedBuffer, align_up
from raytier.tiers.files import DirectFile


class Urgency(IntEnum):
    """Which of the waiting requests a free thread takes first."""

    URGENT = 0  # someone computes nothing until the bytes are there
    STREAM = 1  # needed soon, in the order of submission
    BACKGROUND = 2  # transfers between tiers; they get one request in `BACKGROUND_SHARE` even while others wait


#: While the stream keeps the disk busy all the time, a transfer must go on all the same.
BACKGROUND_SHARE = 4


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

    def _begin(self) -> bool:
        """Whether the next request is to be executed; if so, `_end` or `_fail` follows."""
        with self._changed:
            if self._cancelled or self._error:
                return False
            self._running += 1
            return True

    def _end(self, nbytes: int) -> None:
        with self._changed:
            self._running -= 1
            self._unfinished -= 1
            self._bytes_read += nbytes
            self._changed.notify_all()

    def _fail(self, error: TierError, *, running: bool) -> None:
        with self._changed:
            self._running -= running
            self._error = self._error or error
            self._changed.notify_all()


@dataclass(frozen=True, slots=True)
class ReadCount:
    """What was read without an error: bytes of files (alignment included), requests, and bytes that were decoded."""

    nbytes: int = 0
    reads: int = 0
    decoded: int = 0

    def __add__(self, other: ReadCount) -> ReadCount:
        return ReadCount(self.nbytes + other.nbytes, self.reads + other.reads, self.decoded + other.decoded)


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
class _PlainRequest:
    ticket: ReadTicket
    tier: Tier
    file: DirectFile
    offset: int
    nbytes: int
    view: memoryview

    def execute(self, workspace: _Workspace) -> ReadCount:
        return ReadCount(self.file.read_into(self.view, self.offset, self.nbytes), 1)


@dataclass(frozen=True, slots=True)
class _CodedRequest:
    ticket: ReadTicket
    tier: Tier
    files: tuple[DirectFile, ...]
    coded: CodedRead
    view: memoryview  # of the whole unit

    @property
    def file(self) -> DirectFile:
        return self.files[0]

    def execute(self, workspace: _Workspace) -> ReadCount:
        coded, nbytes, decoded = self.coded, 0, 0
        scratch = workspace.scratch(coded.scratch_bytes)
        for file, read in zip(self.files, coded.reads, strict=True):
            into = scratch[read.dest : read.dest + align_up(read.nbytes)]
            nbytes += file.read_into(into, read.offset, read.nbytes)
        data, unit = np.frombuffer(scratch, np.uint8), np.frombuffer(self.view, np.uint8)
        for frame in coded.frames:
            workspace.decoder.decode(
                coded.codec,
                coded.element,
                data[frame.offset : frame.offset + frame.nbytes],
                unit[frame.dest : frame.dest + frame.decoded],
            )
            decoded += frame.decoded
        return ReadCount(nbytes, len(coded.reads), decoded)


_Request = _PlainRequest | _CodedRequest


class ReaderPool:
    """`threads` threads execute reads of numbered files in requests of at most `io_bytes`.

    The caller owns the files and closes them after the pool, or after `drop_file`.
    """

    def __init__(self, files: Sequence[DirectFile], threads: int, io_bytes: int) -> None:
        if threads <= 0 or io_bytes <= 0 or io_bytes % ALIGNMENT:
            raise ValueError(f"{threads} threads, {io_bytes} bytes: at least one, in multiples of {ALIGNMENT}")
        self._files: list[tuple[DirectFile, Tier] | None] = [(file, Tier.NVME) for file in files]
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
                self._files[index] = (file, tier)
                return index
            self._files.append((file, tier))
            return len(self._files) - 1

    def drop_file(self, index: int) -> DirectFile:
        """Forget file `index` and return it; no read of it may be waiting or running."""
        with self._lock:
            (file, _), self._files[index] = self._entry(index), None
            return file

    @property
    def files(self) -> tuple[DirectFile, ...]:
        """Files that have not been dropped."""
        with self._lock:
            return tuple(entry[0] for entry in self._files if entry is not None)

    def count(self, *tiers: Tier) -> ReadCount:
        """Read since the pool was made, from all tiers or from `tiers`, dropped files included."""
        with self._lock:
            return sum((self._counts[tier] for tier in tiers or FILE_TIERS), ReadCount())

    @property
    def queued(self) -> int:
        """Requests that no thread has taken yet."""
        with self._lock:
            return sum(map(len, self._queues.values()))

    def _entry(self, index: int) -> tuple[DirectFile, Tier]:
        entry = self._files[index]
        if entry is None:
            raise ValueError(f"file {index} was dropped")
        return entry

    def submit(
        self, reads: Iterable[Read | CodedRead], view: memoryview, urgency: Urgency = Urgency.STREAM
    ) -> ReadTicket:
        """Read, and decode, all of `reads` into `view`: at an aligned address, and there until the ticket is over."""
        wanted = [(read, self._split(read.nbytes) if isinstance(read, Read) else [(0, read.nbytes)]) for read in reads]
        ticket = ReadTicket(sum(len(pieces) for _, pieces in wanted))
        requests: list[_Request] = []
        for read, pieces in wanted:
            if isinstance(read, Read):
                file, tier = self._entry(read.file)
                for start, nbytes in pieces:
                    into = view[read.dest + start : read.dest + start + align_up(nbytes)]
                    requests.append(_PlainRequest(ticket, tier, file, read.offset + start, nbytes, into))
            else:
                entries = [self._entry(one.file) for one in read.reads]
                files = tuple(file for file, _ in entries)
                requests.append(_CodedRequest(ticket, entries[0][1], files, read, view))
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
        if not ticket._begin():
            return
        try:
            count = request.execute(workspace)
        except TierError as error:
            ticket._fail(error, running=True)
        except Exception as error:  # whatever it is, the one who waits must hear of it
            ticket._fail(TierError(f"reading {request.file.path} failed: {error!r}"), running=True)
        else:
            with self._lock:
                self._counts[request.tier] += count
            ticket._end(count.nbytes)

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
                request.ticket._fail(TierError("the reader pool was closed before the read began"), running=False)
            queue.clear()

    def __enter__(self) -> ReaderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
