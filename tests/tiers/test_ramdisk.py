"""A5: the ramdisk is memory or it is refused; it is mounted only when asked, and gone afterwards."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raytier.errors import ConfigurationError, ResourceNotAvailableError, TierError
from raytier.tiers import ramdisk
from raytier.tiers.ramdisk import Ramdisk, filesystem_of, mount_at, remove_dead_mount, unmount

MIB = 1 << 20


@pytest.fixture
def may_mount(tmp_path: Path) -> None:
    try:
        Ramdisk(str(tmp_path / "probe"), MIB, mount=True).close()
    except ConfigurationError as error:
        pytest.skip(f"needs the right to mount: {error}")


def test_an_existing_tmpfs_is_used_as_it_is() -> None:
    before = sorted(os.listdir("/dev/shm"))
    with Ramdisk(None, 10 * MIB, 95) as disk:
        assert disk.path == "/dev/shm"
        assert not disk.mounted
        assert disk.usable_bytes == int(10 * MIB * 0.95) // 4096 * 4096
    assert sorted(os.listdir("/dev/shm")) == before


def test_another_filesystem_is_refused_by_name(tmp_path: Path) -> None:
    if filesystem_of(str(tmp_path)) == "tmpfs":
        pytest.skip("the directory for temporary files is on a tmpfs here")
    message = f"tiers.ramdisk.path: {tmp_path} is on {filesystem_of(str(tmp_path))}, not on a tmpfs"
    with pytest.raises(ConfigurationError, match=message):
        Ramdisk(str(tmp_path), MIB)
    with pytest.raises(ConfigurationError, match="is no directory"):
        Ramdisk(str(tmp_path / "missing"), MIB)
    assert not (tmp_path / "missing").exists()


@pytest.mark.usefixtures("may_mount")
def test_a_link_to_another_filesystem_is_refused(tmp_path: Path) -> None:
    with Ramdisk(str(tmp_path / "ram"), MIB, mount=True) as disk:
        link = Path(disk.path) / "link"
        (tmp_path / "slow").mkdir()
        link.symlink_to(tmp_path / "slow")
        with pytest.raises(ConfigurationError, match="slow is on"):
            Ramdisk(str(link), MIB)


@pytest.mark.usefixtures("may_mount")
def test_mount_use_and_unmount(tmp_path: Path) -> None:
    path = tmp_path / "new" / "ram disk \\ 1"  # what mountinfo writes in octal
    disk = Ramdisk(str(path), 8 * MIB, 50, mount=True)
    try:
        there = mount_at(str(path))
        assert there is not None
        assert (there.filesystem, there.source.split("-")[:2]) == ("tmpfs", ["raytier", str(os.getpid())])
        assert filesystem_of(str(path)) == "tmpfs"
        assert disk.usable_bytes == 4 * MIB
        assert os.stat(path).st_mode & 0o777 == 0o700
        status = os.statvfs(path)
        assert status.f_blocks * status.f_frsize == 8 * MIB
        assert status.f_flag & os.ST_NOEXEC and status.f_flag & os.ST_NODEV and status.f_flag & os.ST_NOSUID
        (path / "file").write_bytes(b"x")
    finally:
        disk.close()
        disk.close()
    assert mount_at(str(path)) is None
    assert not path.exists(), "the directory was made for the mount"


@pytest.mark.usefixtures("may_mount")
def test_it_is_unmounted_although_a_file_is_open(tmp_path: Path) -> None:
    with Ramdisk(str(tmp_path), MIB, mount=True) as disk:
        file = open(tmp_path / "file", "w+b")  # noqa: SIM115
        file.write(b"still here")
        file.flush()
    assert mount_at(disk.path) is None
    assert tmp_path.is_dir(), "the directory was there before"
    file.seek(0)
    assert file.read() == b"still here"
    file.close()


@pytest.mark.usefixtures("may_mount")
def test_never_more_than_is_free(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Ramdisk(str(tmp_path), 4 * MIB, mount=True) as disk:
        (tmp_path / "taken").write_bytes(bytes(3 * MIB))
        with caplog.at_level(logging.WARNING):
            assert Ramdisk(disk.path, 64 * MIB).usable_bytes == MIB
        assert f"{64 * MIB} bytes wanted, {MIB} are free" in caplog.text
        (tmp_path / "raytier-4194305-1").mkdir()
        (tmp_path / "raytier-4194305-1" / "left by the dead").write_bytes(bytes(MIB))
        assert Ramdisk(disk.path, 64 * MIB).usable_bytes == MIB
        (tmp_path / "rest").write_bytes(bytes(MIB))
        with pytest.raises(ResourceNotAvailableError, match="nothing is free"):
            Ramdisk(disk.path, MIB)


@pytest.mark.usefixtures("may_mount")
def test_a_place_that_is_taken_is_refused(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("x")
    with pytest.raises(ConfigurationError, match=r"is not empty \(precious, ...\)"):
        Ramdisk(str(tmp_path), MIB, mount=True)
    assert (tmp_path / "precious").exists()
    with Ramdisk(str(tmp_path / "ram"), MIB, mount=True):
        with pytest.raises(ResourceNotAvailableError, match="is the ramdisk of a process that lives"):
            Ramdisk(str(tmp_path / "ram"), MIB, mount=True)
        assert mount_at(str(tmp_path / "ram")) is not None
    with pytest.raises(ConfigurationError, match="is a mount point .* already; set mount: false"):
        Ramdisk("/dev/shm", MIB, mount=True)
    with pytest.raises(ConfigurationError, match="cannot mount at"):
        Ramdisk(str(tmp_path / "precious" / "below"), MIB, mount=True)


@pytest.mark.usefixtures("may_mount")
def test_what_a_killed_process_left_mounted_is_unmounted(tmp_path: Path) -> None:
    code = f"""
import os, signal
from raytier.tiers.ramdisk import Ramdisk
Ramdisk({str(tmp_path)!r}, 1 << 20, mount=True)
open({str(tmp_path / "left")!r}, "w").write("x")
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert (tmp_path / "left").exists()
    with Ramdisk(str(tmp_path), MIB, mount=True):
        assert os.listdir(tmp_path) == []
        assert not remove_dead_mount(str(tmp_path)), "that of a process that lives"
    assert mount_at(str(tmp_path)) is None
    subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert remove_dead_mount(str(tmp_path))
    assert not remove_dead_mount(str(tmp_path))
    assert mount_at(str(tmp_path)) is None


@pytest.mark.usefixtures("may_mount")
def test_of_several_mounts_the_topmost_counts(tmp_path: Path) -> None:
    with Ramdisk(str(tmp_path), MIB, mount=True):
        assert ramdisk._libc().mount(b"somebody's", os.fsencode(tmp_path), b"tmpfs", ctypes.c_ulong(0), None) == 0
        there = mount_at(str(tmp_path))
        assert there is not None and there.source == "somebody's"
        unmount(str(tmp_path))
    assert mount_at(str(tmp_path)) is None


@pytest.mark.usefixtures("may_mount")
def test_without_cleanup_it_stays(tmp_path: Path) -> None:
    disk = Ramdisk(str(tmp_path), MIB, mount=True, cleanup=False)
    try:
        disk.close()
        assert mount_at(str(tmp_path)) is not None
    finally:
        unmount(str(tmp_path))
    with pytest.raises(TierError, match=f"cannot unmount {tmp_path}"):
        unmount(str(tmp_path))


@pytest.mark.usefixtures("may_mount")
def test_a_failure_after_the_mount_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> os.statvfs_result:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "statvfs", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        Ramdisk(str(tmp_path / "ram"), MIB, mount=True, cleanup=False)
    assert mount_at(str(tmp_path / "ram")) is None
    assert not (tmp_path / "ram").exists()


class _Kernel:
    """Stands for the C library: what the kernel answers to `mount`."""

    def __init__(self, error: int) -> None:
        self.error = error
        self.options: list[bytes] = []

    def mount(self, source: bytes, target: bytes, kind: bytes, flags: ctypes.c_ulong, data: bytes) -> int:
        self.options.append(data)
        ctypes.set_errno(self.error)
        return -1


@pytest.mark.parametrize(
    ("error", "attempts", "message"),
    [
        (errno.EPERM, 1, r"may not mount a tmpfs at .* \(it needs CAP_SYS_ADMIN\); set mount: false"),
        (errno.EACCES, 1, "may not mount"),
        (errno.EINVAL, 2, "cannot mount a tmpfs of 1048576 bytes at .*: Invalid argument"),
        (errno.ENOMEM, 1, "Cannot allocate memory"),
    ],
)
def test_a_refused_mount_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, attempts: int, message: str
) -> None:
    kernel = _Kernel(error)
    monkeypatch.setattr(ramdisk, "_libc", lambda: kernel)
    with pytest.raises(ConfigurationError, match=message):
        Ramdisk(str(tmp_path / "ram"), MIB, mount=True)
    assert not (tmp_path / "ram").exists()
    assert [b"huge=" in options for options in kernel.options] == [True, False][:attempts]
