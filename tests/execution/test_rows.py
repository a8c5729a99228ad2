"""C2: embedding rows fetched as needed."""

from __future__ import annotations

import errno
import os
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytier.checkpoint.manifest import Extent, Parameter, Role
from raytier.errors import TierError
from raytier.execution.layout import Read
from raytier.execution.reader import ReadCount, Urgency
from raytier.execution.rows import RowFetcher
from raytier.tiers.aligned import AlignedBuffer

pytestmark = pytest.mark.usefixtures("no_reader_thread_is_left")

ROWS, ELEMENTS = 700, 96  # rows of 192 bytes, some across blocks
TABLE = Parameter(
    "embed", (ROWS, ELEMENTS), "bfloat16", Role.EMBEDDING, extents=(Extent(0, 4001, ROWS * ELEMENTS * 2),)
)


def expected(disk, row: int) -> bytes:
    start = 4001 + row * ELEMENTS * 2
    return disk.data[0][start : start + ELEMENTS * 2]


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.integers(0, ROWS - 1), max_size=60), staging=st.sampled_from([1, 40_000, 8 << 20]))
def test_rows_come_packed_in_the_order_asked_for(disk, rows: list[int], staging: int) -> None:
    with disk.pool(2, 64 << 10) as pool:
        fetcher = RowFetcher(TABLE, disk.files, pool, staging_bytes=staging)
        assert fetcher.row_bytes == 192
        for wanted in (rows, rows[:3]):
            packed = fetcher.fetch(wanted)
            assert bytes(packed) == b"".join(expected(disk, row) for row in wanted)
        fetcher.close()


def test_neighbours_share_a_read_and_memory_stays_within_the_cap(disk) -> None:
    with disk.pool(2, 64 << 10) as pool:
        fetcher = RowFetcher(TABLE, disk.files, pool, staging_bytes=64 << 10)
        fetcher.fetch([22, 20, 21, 23])  # across a block boundary
        assert pool.count() == ReadCount(8192, 1)
        packed = fetcher.fetch(range(ROWS))
        assert bytes(packed) == b"".join(expected(disk, row) for row in range(ROWS))
        assert fetcher._staging is not None
        assert fetcher._staging.nbytes <= 64 << 10


def test_results_do_not_share_memory(disk) -> None:
    with disk.pool(1, 64 << 10) as pool:
        fetcher = RowFetcher(TABLE, disk.files, pool)
        first = fetcher.fetch([1])
        fetcher.fetch([2])
        assert bytes(first) == expected(disk, 1)


def test_rows_overtake_prefetches(disk) -> None:
    offsets: list[int] = []
    reading = threading.Event()

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        reading.set()
        deadline = time.monotonic() + 30
        while not offsets and not pool._queues[Urgency.URGENT] and time.monotonic() < deadline:
            time.sleep(0.001)
        offsets.append(offset)
        return os.preadv(fd, views, offset)

    with disk.pool(1, 64 << 10, preadv=preadv) as pool, AlignedBuffer(1 << 20) as ring:
        prefetch = pool.submit([Read(0, 1 << 20, 1 << 20, 0)], ring.view)
        assert reading.wait(30)
        RowFetcher(TABLE, disk.files, pool).fetch([0])
        prefetch.wait(30)
    assert offsets[:3] == [1 << 20, 0, (1 << 20) + (64 << 10)]  # the read under way, the rows, the next one


def test_errors(disk) -> None:
    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with disk.pool(1, 64 << 10, preadv=preadv) as pool:
        fetcher = RowFetcher(TABLE, disk.files, pool)
        with pytest.raises(TierError, match="Input/output error"):
            fetcher.fetch([1])
        for row in (-1, ROWS):
            with pytest.raises(IndexError, match="embed has 700 rows"):
                fetcher.fetch([0, row])
