"""D3: memory that direct reads can land in."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

from raytier.tiers.aligned import ALIGNMENT, AlignedBuffer, address_of, align_down, align_up


@pytest.mark.parametrize(("value", "down", "up"), [(0, 0, 0), (1, 0, 4096), (4096, 4096, 4096), (8191, 4096, 8192)])
def test_rounding(value: int, down: int, up: int) -> None:
    assert (align_down(value), align_up(value)) == (down, up)


def test_memory_is_aligned_writable_and_zero() -> None:
    with AlignedBuffer(10_000) as buffer:
        assert buffer.nbytes == len(buffer.view) == 12_288
        assert buffer.address % ALIGNMENT == 0
        assert buffer.address == address_of(buffer.view)
        assert not any(buffer.view)
        buffer.view[-1] = 7
        assert ctypes.string_at(buffer.address + buffer.nbytes - 1, 1) == b"\x07"


def test_views_outlive_close() -> None:
    buffer = AlignedBuffer(ALIGNMENT)
    array = np.frombuffer(buffer.view, dtype=np.uint8)
    array[:] = 5
    buffer.close()
    buffer.close()
    assert int(array.sum()) == 5 * ALIGNMENT
    with pytest.raises(ValueError, match="closed"):
        _ = buffer.view


def test_memory_returns_to_the_system_when_closed() -> None:
    def mapped() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * 4096

    before = mapped()
    buffer = AlignedBuffer(1 << 30)
    assert mapped() - before >= 1 << 30
    buffer.close()
    assert mapped() - before < 1 << 29


def test_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="positive"):
        AlignedBuffer(0)


def test_huge_pages_fill_a_buffer_and_nothing_around_it_is_taken() -> None:
    chosen = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not chosen.exists() or "[never]" in chosen.read_text():
        pytest.skip("no transparent huge pages here")
    before = resident()
    with AlignedBuffer(3 * 2**21 + ALIGNMENT) as buffer:
        assert buffer.address % 2**21 == 0
        np.frombuffer(buffer.view, dtype=np.uint8)[:] = 1
        # Other memory of the process may come and go, by less than another huge page.
        assert buffer.nbytes <= resident() - before < buffer.nbytes + 2**20
        assert huge_pages(buffer.address) in (0, 3 * 2**21), "all of them, if there is one to be had"


def resident() -> int:
    """Anonymous memory of this process in bytes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def huge_pages(address: int) -> int:
    """Bytes of huge pages in the mapping that begins at `address`."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    assert any(line.startswith(f"{address:x}-") for line in lines)
    return int(next(line.split()[1] for line in lines if line.startswith("AnonHugePages:"))) * 1024
