"""D3, D6: several reads in flight, every byte counted."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Iterator

import pytest

from raytier.errors import TierError
from raytier.execution.layout import Read
from raytier.execution.reader import BACKGROUND_SHARE, ReaderPool, Urgency
from raytier.planner.plan import Tier
from raytier.tiers.aligned import ALIGNMENT, AlignedBuffer
from raytier.tiers.files import DirectFile

pytestmark = pytest.mark.usefixtures("no_reader_thread_is_left")

IO = 64 << 10


@pytest.fixture
def buffer() -> Iterator[AlignedBuffer]:
    with AlignedBuffer(4 << 20) as buffer:
        yield buffer


class Gate:
    """A preadv that waits until it is let through, and counts who has arrived."""

    def __init__(self) -> None:
        self.arrived = threading.Semaphore(0)
        self.let = threading.Semaphore(0)
        self.offsets: list[int] = []

    def preadv(self, fd: int, views: list[memoryview], offset: int) -> int:
        self.offsets.append(offset)
        self.arrived.release()
        assert self.let.acquire(timeout=30)
        return os.preadv(fd, views, offset)


def test_reads_are_exact_and_counted(disk, buffer) -> None:
    sizes = [len(data) for data in disk.data]
    reads = [
        Read(0, 4096, 1 << 20, 0),
        Read(0, 3 << 20, sizes[0] - (3 << 20), 1 << 20),  # the unaligned tail
        Read(1, 0, sizes[1], (1 << 20) + 4096),
    ]
    with disk.pool(3, IO) as pool:
        ticket = pool.submit(reads, buffer.view)
        ticket.wait(30)
        assert ticket.done
        for read in reads:
            got = buffer.view[read.dest : read.dest + read.nbytes]
            assert got == disk.data[read.file][read.offset : read.offset + read.nbytes]
        assert pool.count().nbytes == ticket.bytes_read == sum(read.nbytes for read in reads)
        assert pool.count().reads == 16 + 1 + 3


def test_requests_are_aligned_bounded_and_of_about_equal_size(disk, buffer) -> None:
    seen: list[tuple[int, int]] = []

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        seen.append((offset, len(views[0])))
        return os.preadv(fd, views, offset)

    with disk.pool(1, IO, preadv=preadv) as pool:
        pool.submit([Read(0, 0, IO + 4096, 0)], buffer.view).wait(30)
    assert seen == [(0, 36864), (36864, 32768)]


def test_several_requests_are_in_flight(disk, buffer) -> None:
    gate = Gate()
    with disk.pool(4, IO, preadv=gate.preadv) as pool:
        ticket = pool.submit([Read(0, 0, 8 * IO, 0)], buffer.view)
        for _ in range(4):
            assert gate.arrived.acquire(timeout=30)
        assert not ticket.done
        with pytest.raises(TierError, match="have not ended within"):
            ticket.wait(0.01)
        gate.let.release(100)
        ticket.wait(30)
    assert sorted(gate.offsets) == [i * IO for i in range(8)]


def test_urgent_reads_overtake(disk, buffer) -> None:
    gate = Gate()
    with disk.pool(1, IO, preadv=gate.preadv) as pool:
        ordinary = pool.submit([Read(0, 0, 3 * IO, 0)], buffer.view)
        assert gate.arrived.acquire(timeout=30)
        urgent = pool.submit([Read(0, 10 * IO, IO, 3 * IO)], buffer.view, Urgency.URGENT)
        gate.let.release(100)
        urgent.wait(30)
        ordinary.wait(30)
    assert gate.offsets == [0, 10 * IO, IO, 2 * IO]


def test_transfers_go_on_beside_a_stream_that_never_pauses(disk, buffer) -> None:
    gate = Gate()
    with disk.pool(1, IO, preadv=gate.preadv) as pool:
        stream = pool.submit([Read(0, 0, 12 * IO, 0)], buffer.view)
        assert gate.arrived.acquire(timeout=30)
        background = pool.submit([Read(0, 20 * IO, 2 * IO, 12 * IO)], buffer.view, Urgency.BACKGROUND)
        gate.let.release(100)
        background.wait(30)
        stream.wait(30)
    assert [gate.offsets.index((20 + i) * IO) for i in range(2)] == [BACKGROUND_SHARE - 1, 2 * BACKGROUND_SHARE - 1]


def test_files_come_and_go(disk, buffer) -> None:
    with disk.pool(1, IO) as pool:
        file = disk.files[0]
        numbers = [pool.add_file(DirectFile(file.path, file.size), Tier.RAMDISK) for _ in range(2)]
        assert numbers == [2, 3]
        pool.submit([Read(2, 0, IO, 0)], buffer.view).wait(30)
        pool.submit([Read(0, 0, 2 * IO, 0)], buffer.view).wait(30)
        pool.drop_file(2).close()
        for use in (lambda: pool.drop_file(2), lambda: pool.submit([Read(2, 0, IO, 0)], buffer.view)):
            with pytest.raises(ValueError, match="file 2 was dropped"):
                use()
        assert (pool.count(Tier.RAMDISK).nbytes, pool.count(Tier.NVME).nbytes) == (IO, 2 * IO)
        assert pool.add_file(DirectFile(file.path, file.size), Tier.NVME) == 2  # its number is used again
        for number in (2, 3):
            pool.drop_file(number).close()
        assert len(pool.files) == 2


def test_cancel_waits_for_running_reads_and_skips_the_rest(disk, buffer) -> None:
    gate = Gate()
    with disk.pool(2, IO, preadv=gate.preadv) as pool:
        ticket = pool.submit([Read(0, 0, 10 * IO, 0)], buffer.view)
        for _ in range(2):
            assert gate.arrived.acquire(timeout=30)
        canceller = threading.Thread(target=ticket.cancel)
        canceller.start()
        canceller.join(0.05)
        assert canceller.is_alive(), "cancelled while the kernel may still write"
        gate.let.release(100)
        canceller.join(30)
        assert not canceller.is_alive()
        buffer.view[: 10 * IO] = bytes(10 * IO)
        with pytest.raises(TierError, match="cancelled"):
            ticket.wait(30)
        pool.submit([Read(0, 0, IO, 20 * IO)], buffer.view).wait(30)  # the pool goes on
        assert not any(buffer.view[: 10 * IO]), "written after cancel"
        assert ticket.bytes_read == 2 * IO
        assert pool.count().nbytes == 3 * IO
        ticket.cancel()
    assert len(gate.offsets) == 3


def test_cancel_after_the_end_changes_nothing(disk, buffer) -> None:
    with disk.pool(1, IO) as pool:
        ticket = pool.submit([Read(0, 0, IO, 0)], buffer.view)
        ticket.wait(30)
        ticket.cancel()
        ticket.wait(30)


@pytest.mark.parametrize("kind", [OSError(errno.EIO, "Input/output error"), ZeroDivisionError("a bug")], ids=repr)
def test_an_error_ends_the_ticket_once_nothing_runs_and_the_pool_goes_on(disk, buffer, kind) -> None:
    running = threading.Semaphore(0)
    failed = threading.Event()

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        if offset == 0:
            assert running.acquire(timeout=30)
            failed.set()
            raise kind
        running.release()
        assert failed.wait(30)
        time.sleep(0.02)
        return os.preadv(fd, views, offset)

    with disk.pool(2, IO, preadv=preadv) as pool:
        ticket = pool.submit([Read(0, 0, 50 * IO // 2, 0)], buffer.view)
        with pytest.raises(TierError, match=r"0\.safetensors failed") as error:
            ticket.wait(30)
        assert error.value.__cause__ is kind or repr(kind) in str(error.value)
        buffer.view[: 25 * IO] = bytes(25 * IO)
        pool.submit([Read(0, ALIGNMENT, 4096, 30 * IO)], buffer.view).wait(30)
        assert not any(buffer.view[: 25 * IO]), "written after wait had raised"
        assert pool.count().reads == 2  # the one beside the failure, the one afterwards


def test_close_fails_what_waits_and_ends_the_threads(disk, buffer) -> None:
    gate = Gate()
    with disk.pool(1, IO, preadv=gate.preadv) as pool:
        first = pool.submit([Read(0, 0, IO, 0)], buffer.view)
        assert gate.arrived.acquire(timeout=30)
        second = pool.submit([Read(0, 0, IO, IO)], buffer.view)
        threading.Timer(0.02, gate.let.release, [100]).start()
        pool.close()
    first.wait(1)
    with pytest.raises(TierError, match="closed before"):
        second.wait(1)
    with pytest.raises(TierError, match="pool is closed"):
        pool.submit([], buffer.view)


def test_an_idle_pool_keeps_no_memory_alive(disk) -> None:
    def mapped() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * 4096

    with disk.pool(2, IO) as pool:
        before = mapped()
        buffer = AlignedBuffer(1 << 30)
        done = pool.submit([Read(0, 0, 8 * IO, 0)], buffer.view)
        cancelled = pool.submit([Read(0, 0, 8 * IO, 8 * IO)], buffer.view)
        cancelled.cancel()
        done.wait(30)
        buffer.close()
        deadline = time.monotonic() + 10
        while mapped() - before >= 1 << 29:
            assert time.monotonic() < deadline, "the buffer is still mapped"
            time.sleep(0.001)


def test_nothing_to_read_is_done_at_once(disk, buffer) -> None:
    with disk.pool(1, IO) as pool:
        pool.submit([], buffer.view).wait(0)
    with pytest.raises(ValueError, match="multiples of 4096"):
        ReaderPool([], threads=1, io_bytes=5000)


def test_counters_are_exact_under_many_submitters(disk) -> None:
    size = len(disk.data[0])
    with disk.pool(4, IO) as pool:
        expected: list[int] = []

        def submit(seed: int) -> None:
            rng = random.Random(seed)
            with AlignedBuffer(512 << 10) as buffer:
                for _ in range(20):
                    offset = rng.randrange(0, size, ALIGNMENT)
                    nbytes = min(rng.randint(1, 64) * ALIGNMENT, size - offset)
                    pool.submit([Read(0, offset, nbytes, 0)], buffer.view, rng.choice(list(Urgency))).wait(30)
                    assert buffer.view[:nbytes] == disk.data[0][offset : offset + nbytes]
                    expected.append(nbytes)

        threads = [threading.Thread(target=submit, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(expected) == 80
        assert pool.count().nbytes == sum(expected)
        assert pool.count().reads == sum(-(-nbytes // IO) for nbytes in expected)
