"""A2: reading and writing rates of disks, and nothing left behind."""

from __future__ import annotations

import errno
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from raytier.errors import TierError
from raytier.hardware import disk_rates as module
from raytier.hardware.disk_rates import DiskReaders, measure_disk_read, probe_files

MIB = 2**20


@pytest.mark.parametrize("size", [1, 4095, 4096, 10_000, 9 * MIB + 5])
def test_read_rate_of_files_of_any_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    assert measure_disk_read(str(path), 0.02) > 0


def test_all_files_are_read_and_the_rate_is_bytes_over_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clockwork disk: every read of 1 MiB takes 10 ms, four at a time."""
    paths = [str(tmp_path / name) for name in "ab"]
    for path in paths:
        Path(path).write_bytes(bytes(MIB))
    seen: list[int] = []

    def read(fd: int, buffers: list[Any], offset: int) -> int:
        seen.append(fd)
        assert offset == 0
        time.sleep(0.01)
        return len(buffers[0])

    monkeypatch.setattr(module.os, "preadv", read)
    rate = measure_disk_read(paths, 0.3)
    assert rate == pytest.approx(4 * MIB / 0.01, rel=0.5)
    counts = [seen.count(fd) for fd in set(seen)]
    assert len(counts) == 2
    assert abs(counts[0] - counts[1]) <= 4


def test_reading_without_o_direct_does_not_measure_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    dropped: list[int] = []
    real_open = os.open

    def refuse(name: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(name, flags, *rest)

    monkeypatch.setattr(module.os, "open", refuse)
    monkeypatch.setattr(module.os, "posix_fadvise", lambda fd, offset, length, advice: dropped.append(advice))
    assert measure_disk_read(str(path), 0.02) > 0
    assert set(dropped) == {os.POSIX_FADV_DONTNEED}


def test_read_rate_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(TierError, match="empty"):
        measure_disk_read(str(tmp_path / "empty"))
    with pytest.raises(TierError, match="missing"):
        measure_disk_read(str(tmp_path / "missing"))


def test_an_error_of_a_read_is_raised_and_everything_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(module.os, "preadv", fail)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TierError, match="Input/output error"), DiskReaders([str(path)]) as readers:
        readers.wait_for_first()
    assert len(os.listdir("/proc/self/fd")) == before


def test_probes_are_written_measured_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PROBE_BYTES", 24 * MIB)
    places = [tmp_path / "a", tmp_path / "b"]
    for place in places:
        place.mkdir()
    with probe_files([str(place) for place in places], 5) as (files, rate):
        assert [os.path.dirname(file) for file in files] == [str(place) for place in places]
        assert [os.path.getsize(file) for file in files] == [24 * MIB] * 2
        assert rate is not None and rate > 0
        assert os.stat(files[0]).st_blocks * 512 >= 24 * MIB  # no holes
        with open(files[0], "rb") as file:
            assert file.read(MIB) != bytes(MIB)
    assert [list(place.iterdir()) for place in places] == [[], []]


def test_probes_go_when_their_user_fails(tmp_path: Path) -> None:
    seen: list[str] = []

    def use() -> None:
        with probe_files([str(tmp_path)], 0.01) as (files, _):
            seen.extend(files)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        use()
    assert len(seen) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_or_unwritable_directory_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = shutil.disk_usage(tmp_path)._replace(free=50 * MIB)
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, "disk_usage", lambda path: full)
        with probe_files([str(tmp_path)]) as (files, rate):
            assert (files, rate) == ([], None)
    with probe_files(["/proc"]) as (files, rate):
        assert (files, rate) == ([], None)
    assert list(tmp_path.iterdir()) == []
