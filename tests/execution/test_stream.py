"""D1: units arrive ahead of their use, sweep after sweep."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytier.checkpoint.manifest import Extent, Parameter, Role
from raytier.errors import ResourceNotAvailableError, TierError
from raytier.execution.layout import StreamUnit, build_unit, whole
from raytier.execution.stream import WeightStream
from raytier.tiers.aligned import AlignedBuffer

pytestmark = pytest.mark.usefixtures("no_reader_thread_is_left")

IO = 64 << 10


def unit_of(disk, index: int, *extents: tuple[int, int, int]) -> StreamUnit:
    """A unit of one parameter of bytes, made of (file, offset, bytes)."""
    found = tuple(Extent(*extent) for extent in extents)
    weight = Parameter(f"w{index}", (sum(e.nbytes for e in found),), "bool", Role.LAYER, index, found)
    return build_unit(f"layer {index}", [whole(weight)], disk.files, index)


def units_of(disk, sizes: Sequence[int]) -> list[StreamUnit]:
    """Units that follow each other in file 0 from an unaligned offset on."""
    return [unit_of(disk, i, (0, 1234 + sum(sizes[:i]), size)) for i, size in enumerate(sizes)]


def content(disk, unit: StreamUnit, view: memoryview) -> tuple[bytes, bytes]:
    """(bytes in the ring, bytes in the file) of a unit of `units_of`."""
    (member,), (read,) = unit.members, unit.reads
    start = read.offset + member.offset - read.dest
    return bytes(view[member.offset : member.offset + member.nbytes]), disk.data[0][start : start + member.nbytes]


def within(seconds: float, work: Callable[[], None]) -> None:
    """Run `work` in a thread of its own: a deadlock is a failure, not a hang."""
    outcome: list[BaseException | None] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"still running after {seconds} s"
    if outcome[0]:
        raise outcome[0]


def sweep(disk, stream: WeightStream, sweeps: int = 1) -> None:
    for _ in range(sweeps):
        for index, unit in enumerate(stream.units):
            got, expected = content(disk, unit, stream.acquire(index))
            assert got == expected
            stream.release(index)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_units_ring_window_and_consumer(disk, data: st.DataObject) -> None:
    """Bit-exact over several sweeps, for any hold-back of releases and any cancellation, without a deadlock."""
    sizes = data.draw(st.lists(st.integers(1, 200_000), min_size=1, max_size=9))
    units = units_of(disk, sizes)
    largest, total = max(u.nbytes for u in units), sum(u.nbytes for u in units)
    ring = AlignedBuffer(data.draw(st.integers(largest, 2 * total)))
    window = data.draw(st.integers(0, len(units) + 3))
    hold = data.draw(st.integers(1, 3))
    seed = data.draw(st.integers(0, 1000))

    def run() -> None:
        rng = random.Random(seed)
        with (
            disk.pool(1 + seed % 3, IO) as pool,
            WeightStream(units, pool, ring, window) as stream,
        ):
            if rng.random() < 0.5:
                stream.start()
            held: list[tuple[int, memoryview]] = []
            index = 0
            for _ in range(4 * len(units)):
                if rng.random() < 0.05:
                    stream.cancel()
                    held.clear()
                    index = 0
                while True:
                    try:
                        held.append((index, stream.acquire(index)))
                        break
                    except RuntimeError:  # no room beside what is held
                        assert held
                        stream.release(held.pop(0)[0])
                for number, view in held:
                    got, expected = content(disk, units[number], view)
                    assert got == expected
                if len(held) >= min(hold, len(units)):
                    stream.release(held.pop(0)[0])
                index = (index + 1) % len(units)
                stream._ring.check_integrity()
            assert stream.stats.units == 4 * len(units)
            stream.cancel()
            assert stream.stats.bytes_read == pool.count().nbytes

    within(60, run)


@pytest.mark.parametrize("window", [0, 1, 5, 100])
@pytest.mark.parametrize("slots", [1, 2, 3, 100])
def test_no_ring_and_window_deadlock_and_the_counters_are_exact(disk, window: int, slots: int) -> None:
    units = units_of(disk, [250_000, 200_000, 250_000, 10, 250_000, 1000])
    ring = AlignedBuffer(slots * max(u.nbytes for u in units))

    def run() -> None:
        with disk.pool(2, IO) as pool, WeightStream(units, pool, ring, window) as stream:
            stream.start()
            sweep(disk, stream, 3)
            assert stream.stats.units == 18
            assert stream.stats.bytes_consumed == 3 * sum(u.wanted_bytes for u in units)
            assert stream.stats.bytes_read == 3 * sum(u.read_bytes for u in units)
            stream.cancel()
            assert stream.stats.bytes_read == pool.count().nbytes

    within(60, run)


def test_prefetch_wraps_and_never_holds_a_unit_twice(disk) -> None:
    units = units_of(disk, [100_000] * 4)
    ring = AlignedBuffer(40 * units[0].nbytes)
    with disk.pool(2, IO) as pool, WeightStream(units, pool, ring, window=30) as stream:
        stream.start()
        assert [s.index for s in stream._ahead] == [0, 1, 2, 3]
        stream.acquire(0)
        assert [s.index for s in stream._ahead] == [1, 2, 3]
        stream.release(0)
        assert [s.index for s in stream._ahead] == [1, 2, 3, 0], "the next sweep begins while this one runs"
        for index in (1, 2, 3):
            stream.acquire(index)
            stream.release(index)
        began = stream.stats.bytes_read
        assert [s.index for s in stream._ahead] == [0, 1, 2, 3], "an idle stream is full"
        sweep(disk, stream)
        assert stream.stats.bytes_read - began == sum(u.read_bytes for u in units), "read anew in every sweep"


def test_a_single_streamed_unit_is_prefetched_for_the_next_sweep(disk) -> None:
    units = units_of(disk, [100_000])
    ring = AlignedBuffer(2 * units[0].nbytes)
    with disk.pool(1, IO) as pool, WeightStream(units, pool, ring, window=1) as stream:
        stream.acquire(0)
        assert len(stream._ahead) == 0
        stream.release(0)
        assert len(stream._ahead) == 1


def test_window_bounds_how_far_ahead(disk) -> None:
    units = units_of(disk, [100_000] * 3 + [25_000] * 9)
    ring = AlignedBuffer(40 * units[0].nbytes)
    with disk.pool(2, IO) as pool, WeightStream(units, pool, ring, window=2) as stream:
        assert len(stream._ahead) == 0
        stream.start()
        assert [s.index for s in stream._ahead] == [0, 1]
        for index in range(3):
            stream.acquire(index)
            stream.release(index)
        assert [s.index for s in stream._ahead] == list(range(3, 10)), "small units count by their bytes"


def test_reading_goes_on_while_a_unit_is_held(disk) -> None:
    units = units_of(disk, [100_000] * 4)
    ring = AlignedBuffer(4 * units[0].nbytes)
    with disk.pool(1, IO) as pool, WeightStream(units, pool, ring, window=1) as stream:
        stream.acquire(0)
        assert [s.index for s in stream._ahead] == [1]


def test_reads_overlap_with_what_the_consumer_does(disk) -> None:
    units = units_of(disk, [IO - 5000] * 8)
    calls: list[float] = []

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        time.sleep(0.02)
        calls.append(time.perf_counter())
        return os.preadv(fd, views, offset)

    ring = AlignedBuffer(4 * units[0].nbytes)
    with disk.pool(1, 2 * IO, preadv=preadv) as pool, WeightStream(units, pool, ring, window=2) as stream:
        stream.start()
        for index in range(8):
            stream.acquire(index)
            time.sleep(0.04)  # computing takes twice as long as reading
            stream.release(index)
        assert stream.stats.io_wait_s < 0.1  # of 0.16 s of reading, the first unit's 0.02 s were waited for


def test_slow_and_shuffled_reads_stay_exact(disk) -> None:
    rng = random.Random(5)

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        time.sleep(rng.random() * 0.003)
        return os.preadv(fd, views, offset)

    units = units_of(disk, [rng.randint(1, 150_000) for _ in range(12)])
    ring = AlignedBuffer(3 * max(u.nbytes for u in units))

    def run() -> None:
        with disk.pool(4, 16384, preadv=preadv) as pool, WeightStream(units, pool, ring, 4) as stream:
            for index in [*range(12)] * 3:
                view = stream.acquire(index)
                time.sleep(rng.random() * 0.003)
                got, expected = content(disk, units[index], view)
                assert got == expected
                stream.release(index)

    within(60, run)


def test_assembled_members_are_whole(disk) -> None:
    units = [unit_of(disk, i, (1, 3 + i, 50_000), (0, 777_777, 40_000), (1, 99_999, 50_001)) for i in range(3)]
    with disk.pool(2, IO) as pool, WeightStream(units, pool, AlignedBuffer(1 << 20), 1) as stream:
        for index in [0, 1, 2] * 3:
            (member,) = units[index].members
            got = bytes(stream.acquire(index)[member.offset : member.offset + member.nbytes])
            one, two = disk.data
            assert got == two[3 + index : 50_003 + index] + one[777_777:817_777] + two[99_999:150_000]
            stream.release(index)


def test_order_is_enforced(disk) -> None:
    units = units_of(disk, [1000] * 3)
    with disk.pool(1, IO) as pool, WeightStream(units, pool, AlignedBuffer(1 << 20), 2) as stream:
        with pytest.raises(RuntimeError, match="next one of the sweep is 0"):
            stream.acquire(1)
        with pytest.raises(RuntimeError, match="released, but held are"):
            stream.release(0)
        stream.acquire(0)
        stream.acquire(1)
        with pytest.raises(RuntimeError, match=r"held are \[0, 1\]"):
            stream.release(1)
        with pytest.raises(RuntimeError, match="acquired"):
            stream.acquire(1)
        stream.release(0)
        stream.release(1)


def test_what_cannot_work_is_refused(disk) -> None:
    units = units_of(disk, [1000, 100_000])
    with disk.pool(1, IO) as pool:
        with pytest.raises(ResourceNotAvailableError, match="layer 1 needs 102400 bytes, the ring has 98304"):
            WeightStream(units, pool, AlignedBuffer(98304), 1)
        with pytest.raises(ValueError, match="at least one unit"):
            WeightStream([], pool, AlignedBuffer(4096), 1)
        stream = WeightStream(units, pool, AlignedBuffer(102_400), 1)
        stream.acquire(0)
        with pytest.raises(RuntimeError, match="1 units are held"):
            stream.acquire(1)
        stream.release(0)
        stream.acquire(1)
        stream.close()


def test_a_read_error_surfaces_in_acquire_and_cancel_recovers(disk) -> None:
    broken = threading.Event()
    broken.set()
    units = units_of(disk, [100_000] * 6)
    bad = units[3].reads[0].offset + (64 << 10)

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        if broken.is_set() and offset <= bad < offset + len(views[0]):
            raise OSError(errno.EIO, "Input/output error")
        return os.preadv(fd, views, offset)

    def run() -> None:
        ring = AlignedBuffer(3 * units[0].nbytes)
        with disk.pool(2, IO, preadv=preadv) as pool, WeightStream(units, pool, ring, 2) as stream:
            for _ in range(2):
                for index in range(3):
                    stream.acquire(index)
                    stream.release(index)
                for _ in range(2):  # it stays an error, no unit is skipped
                    with pytest.raises(TierError, match=r"0\.safetensors failed: Input/output error \(errno 5\)"):
                        stream.acquire(3)
                stream.cancel()
            broken.clear()
            sweep(disk, stream, 2)

    within(60, run)


def test_cancel_leaves_no_writer_behind(disk) -> None:
    let, arrived = threading.Event(), threading.Semaphore(0)

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        arrived.release()
        assert let.wait(30)
        return os.preadv(fd, views, offset)

    units = units_of(disk, [100_000] * 4)
    ring = AlignedBuffer(4 * units[0].nbytes)
    with disk.pool(2, IO, preadv=preadv) as pool, WeightStream(units, pool, ring, 3) as stream:
        stream.start()
        for _ in range(2):
            assert arrived.acquire(timeout=30)
        threading.Timer(0.03, let.set).start()
        stream.cancel()
        assert let.is_set(), "returned while reads were running"
        ring.view[:] = bytes(ring.nbytes)
        assert pool.count().reads == 2
        assert stream.stats.bytes_read == pool.count().nbytes
        time.sleep(0.02)
        assert not any(ring.view)
        sweep(disk, stream)
