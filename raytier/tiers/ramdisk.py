"""The ramdisk tier's directory: on a tmpfs that is there, or on one mounted for it. Never on anything else."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from raytier.errors import ConfigurationError, ResourceNotAvailableError, TierError
from raytier.tiers.aligned import align_down
from raytier.tiers.owners import is_alive, is_owner_name, owner_name, remove_leftovers

logger = logging.getLogger(__name__)

DEFAULT_PATH = "/dev/shm"

_MS_NOSUID, _MS_NODEV, _MS_NOEXEC = 2, 4, 8
_MNT_DETACH = 2
_FLAGS = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC


@dataclass(frozen=True, slots=True)
class Mount:
    """A line of /proc/self/mountinfo. `device` is what `os.stat(...).st_dev` says of files on it."""

    point: str
    device: int
    filesystem: str
    source: str


class Ramdisk:
    """A directory on a tmpfs and how much of it may be used.

    Attributes:
        path: the directory.
        usable_bytes: the configured share of the size, never more than is free there.
        mounted: by this object.

    Args:
        path: None: /dev/shm.
        size_bytes: of the tmpfs to be mounted, else of what may be used of the one that is there.
        usable_percent: of `size_bytes`.
        mount: mount a tmpfs at `path`, which is made if need be; it must be empty and no mount point.
        cleanup: unmount it and remove what was made on `close`.

    Raises:
        ConfigurationError: `path` is not on a tmpfs, is missing, or cannot be mounted at; never used all the same.
        ResourceNotAvailableError: another process has its ramdisk there, or nothing is free.
    """

    def __init__(
        self,
        path: str | None,
        size_bytes: int,
        usable_percent: float = 100.0,
        *,
        mount: bool = False,
        cleanup: bool = True,
    ) -> None:
        self.path = os.path.realpath(path or DEFAULT_PATH)
        self.mounted = False
        self._cleanup = cleanup
        self._made = False
        try:
            if mount:
                self._mount(size_bytes)
            else:
                _check_tmpfs(self.path)
            self.usable_bytes = self._usable(size_bytes, usable_percent)
        except BaseException:
            self._cleanup = True
            self.close()
            raise

    def _mount(self, size_bytes: int) -> None:
        remove_dead_mount(self.path)
        there = mount_at(self.path)
        if there is not None:
            if is_owner_name(there.source):
                raise ResourceNotAvailableError(
                    f"tiers.ramdisk.path: {self.path} is the ramdisk of a process that lives ({there.source}); "
                    "choose another path"
                )
            raise ConfigurationError(
                f"tiers.ramdisk.mount: {self.path} is a mount point ({there.filesystem}) already; "
                "set mount: false to use it, or choose another path"
            )
        try:
            self._made = not os.path.isdir(self.path)
            os.makedirs(self.path, exist_ok=True)
            occupied = os.listdir(self.path)
        except OSError as error:
            self._made = False
            raise ConfigurationError(f"tiers.ramdisk.path: cannot mount at {self.path}: {error.strerror}") from error
        if occupied:
            raise ConfigurationError(
                f"tiers.ramdisk.path: {self.path} is not empty ({occupied[0]}, ...) and a mount would hide that; "
                "choose another path"
            )
        _mount_tmpfs(self.path, size_bytes)
        self.mounted = True

    def _usable(self, size_bytes: int, usable_percent: float) -> int:
        wanted = align_down(int(size_bytes * usable_percent / 100))
        remove_leftovers(self.path)  # or what the dead have left would count as taken
        status = os.statvfs(self.path)
        free = align_down(status.f_bavail * status.f_frsize)
        if free <= 0:
            raise ResourceNotAvailableError(f"tiers.ramdisk: nothing is free in {self.path}; free some, or mount one")
        if free < wanted:
            logger.warning("ramdisk %s: %d bytes wanted, %d are free and will be used", self.path, wanted, free)
        return min(wanted, free)

    def close(self) -> None:
        """Unmount what was mounted, when that is wanted. Memory goes when its last reader has closed its files."""
        if not self._cleanup:
            return
        if self.mounted:
            self.mounted = False
            unmount(self.path)
        if self._made:
            self._made = False
            with contextlib.suppress(OSError):  # somebody has put something there
                os.rmdir(self.path)

    def __enter__(self) -> Ramdisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def remove_dead_mount(path: str) -> bool:
    """Unmount the ramdisk that a dead process has left at `path`; whether there was one."""
    path = os.path.realpath(path)
    there = mount_at(path)
    if there is None or not is_owner_name(there.source) or is_alive(there.source):
        return False
    unmount(path)
    return True


def unmount(path: str) -> None:
    """Take the mount out of the tree, also while files on it are open.

    Raises:
        TierError: the kernel refuses.
    """
    if _libc().umount2(os.fsencode(path), _MNT_DETACH) != 0:
        raise TierError(f"cannot unmount {path}: {os.strerror(ctypes.get_errno())}; do it by hand: umount {path}")


def mounts() -> list[Mount]:
    """All mounts that this process sees, in the order in which they were made."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split()
        major, minor = fields[2].split(":")
        filesystem, source = fields[fields.index("-", 6) + 1 :][:2]
        found.append(Mount(_unescape(fields[4]), os.makedev(int(major), int(minor)), filesystem, _unescape(source)))
    return found


def mount_at(path: str) -> Mount | None:
    """The mount whose point is exactly `path`, the one on top of several."""
    return next((mount for mount in reversed(mounts()) if mount.point == path), None)


def filesystem_of(path: str) -> str:
    """Kind of the filesystem that an existing `path` lies on, "unknown" where the kernel does not say."""
    device = os.stat(path).st_dev
    return next((mount.filesystem for mount in mounts() if mount.device == device), "unknown")


def _check_tmpfs(path: str) -> None:
    if not os.path.isdir(path):
        raise ConfigurationError(
            f"tiers.ramdisk.path: {path} is no directory; create it on a tmpfs, or set mount: true"
        )
    filesystem = filesystem_of(path)
    if filesystem != "tmpfs":
        raise ConfigurationError(
            f"tiers.ramdisk.path: {path} is on {filesystem}, not on a tmpfs, so it is no memory; choose a directory "
            "on a tmpfs (/dev/shm), or set mount: true to have one mounted"
        )


def _mount_tmpfs(path: str, size_bytes: int) -> None:
    options = f"size={size_bytes},mode=0700"
    # With huge pages it was read 1.5 times and filled 2.7 times as fast; a kernel may be built without.
    for data in (f"{options},huge=within_size", options):
        arguments = (owner_name().encode(), os.fsencode(path), b"tmpfs", ctypes.c_ulong(_FLAGS), data.encode())
        if _libc().mount(*arguments) == 0:
            return
        error = ctypes.get_errno()
        if error != errno.EINVAL:
            break
    if error in (errno.EPERM, errno.EACCES):
        raise ConfigurationError(
            f"tiers.ramdisk.mount: this process may not mount a tmpfs at {path} (it needs CAP_SYS_ADMIN); set "
            "mount: false and use a directory on a tmpfs, for example /dev/shm"
        )
    raise ConfigurationError(
        f"tiers.ramdisk.mount: cannot mount a tmpfs of {size_bytes} bytes at {path}: {os.strerror(error)}"
    )


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _unescape(text: str) -> str:
    """Undo the octal numbers that stand for blanks and backslashes in mountinfo."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
