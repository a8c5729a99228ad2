"""D3: reads past the page cache, and where that is refused."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytier.errors import CheckpointError, TierError
from raytier.tiers import files
from raytier.tiers.aligned import AlignedBuffer, address_of, align_up
from raytier.tiers.files import DirectFile

SIZE = (1 << 20) + 777
DATA = os.urandom(SIZE)


@pytest.fixture
def path(tmp_path: Path) -> str:
    file = tmp_path / "model.safetensors"
    with open(file, "wb") as out:
        out.write(DATA)
        out.flush()
        os.fsync(out.fileno())
    return str(file)


@pytest.fixture
def view() -> Iterator[memoryview]:
    with AlignedBuffer(SIZE) as buffer:
        yield buffer.view


def refuse_direct(path: str, flags: int) -> int:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, "Invalid argument", path)
    return os.open(path, flags)


def cached_bytes(path: str) -> int:
    """Bytes of the file in the page cache."""
    with open(path, "r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
        pages = (ctypes.c_ubyte * (align_up(len(memory)) // 4096))()
        libc = ctypes.CDLL(None, use_errno=True)
        address, length = ctypes.c_void_p(address_of(memory)), ctypes.c_size_t(len(memory))
        assert libc.mincore(address, length, pages) == 0, os.strerror(ctypes.get_errno())
        return sum(page & 1 for page in pages) * 4096


def drop_cache(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@pytest.mark.parametrize("opener", [os.open, refuse_direct])
@pytest.mark.parametrize(("offset", "nbytes"), [(0, SIZE), (0, 4096), (8192, 65536), (1 << 20, 777), (1 << 20, 0)])
def test_reads_exactly(path: str, view: memoryview, opener: object, offset: int, nbytes: int) -> None:
    with DirectFile(path, SIZE, opener=opener) as file:  # type: ignore[arg-type]
        assert file.read_into(view, offset, nbytes) == nbytes
        assert view[:nbytes] == DATA[offset : offset + nbytes]
        assert file.direct == (opener is os.open)


def test_direct_descriptor_is_used_here(path: str) -> None:
    opened: list[int] = []

    def opener(path: str, flags: int) -> int:
        opened.append(os.open(path, flags))
        return opened[-1]

    with DirectFile(path, SIZE, opener=opener):
        (fd,) = opened
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_neither_way_leaves_the_file_in_the_page_cache(path: str, view: memoryview) -> None:
    drop_cache(path)
    assert cached_bytes(path) == 0
    for opener in (os.open, refuse_direct):
        with DirectFile(path, SIZE, opener=opener) as file:
            for offset in (0, 65536):  # in sequence: where read-ahead would set in
                file.read_into(view, offset, 65536)
                assert cached_bytes(path) == 0
            file.read_into(view, 0, SIZE)
            assert cached_bytes(path) <= 4096  # the kernel keeps a partial last page


def test_falls_back_when_the_first_read_refuses(path: str, view: memoryview) -> None:
    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return os.preadv(fd, views, offset)

    with DirectFile(path, SIZE, preadv=preadv) as file:
        assert file.direct
        assert file.read_into(view, 0, SIZE) == SIZE
        assert view[:SIZE] == DATA
        assert not file.direct


def test_fallback_is_said_once_per_filesystem(
    path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "_told_devices", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            DirectFile(path, SIZE, opener=refuse_direct).close()
    assert [path in record.getMessage() for record in caplog.records] == [True]


def test_short_reads_are_continued(path: str, view: memoryview) -> None:
    calls: list[int] = []

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        calls.append(offset)
        count = os.preadv(fd, views, offset)
        return count if len(calls) > 3 else min(count, 10_000)  # not even a multiple of a sector

    with DirectFile(path, SIZE, preadv=preadv) as file:
        assert file.read_into(view, 0, SIZE) == SIZE
    assert view[:SIZE] == DATA
    assert calls == [0, 8192, 16384, 24576]


@pytest.mark.parametrize("actual", [0, 4096, SIZE - 1, SIZE + 1])
def test_wrong_size_names_file_and_both_sizes(path: str, actual: int) -> None:
    os.truncate(path, actual)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError, match=rf"model.safetensors has {actual} bytes, expected {SIZE}"):
        DirectFile(path, SIZE)
    assert len(os.listdir("/proc/self/fd")) == before


def test_file_cut_while_in_use(path: str, view: memoryview) -> None:
    with DirectFile(path, SIZE) as file:
        os.truncate(path, 8192)
        assert file.read_into(view, 0, 8192) == 8192
        with pytest.raises(TierError, match=rf"model.safetensors ends at byte 8192 of {SIZE}"):
            file.read_into(view, 4096, 8192)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.safetensors is missing"):
        DirectFile(str(tmp_path / "gone.safetensors"), 1)


def test_refused_open_names_file_and_errno(path: str) -> None:
    def opener(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with pytest.raises(TierError, match=rf"cannot open {path} for reading: Permission denied \(errno 13\)"):
        DirectFile(path, SIZE, opener=opener)


def test_io_error_names_file_offset_and_errno(path: str, view: memoryview) -> None:
    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with (
        DirectFile(path, SIZE, preadv=preadv) as file,
        pytest.raises(TierError, match=rf"at 8192 of {path} failed: Input/output error \(errno 5\)"),
    ):
        file.read_into(view, 8192, 4096)


@pytest.mark.parametrize(("start", "offset", "nbytes"), [(0, 1, 4096), (1, 0, 4096), (0, 0, 4095), (0, 1 << 20, 4096)])
def test_misuse_is_refused(path: str, view: memoryview, start: int, offset: int, nbytes: int) -> None:
    with DirectFile(path, SIZE) as file, pytest.raises(ValueError, match=r"model\.safetensors"):
        file.read_into(view[start:], offset, nbytes)


def test_view_too_small_is_refused(path: str, view: memoryview) -> None:
    with DirectFile(path, SIZE) as file, pytest.raises(ValueError, match="exceed"):
        file.read_into(view[:777], 1 << 20, 777)


def test_many_threads_read_at_once(path: str) -> None:
    wrong: list[int] = []
    with DirectFile(path, SIZE) as file:

        def check(seed: int) -> None:
            with AlignedBuffer(65536) as buffer:
                for step in range(40):
                    offset = (seed * 131 + step * 37) % 240 * 4096
                    file.read_into(buffer.view, offset, 65536)
                    if buffer.view != DATA[offset : offset + 65536]:
                        wrong.append(offset)

        threads = [threading.Thread(target=check, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong
