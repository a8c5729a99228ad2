"""A memory limit around a tree of processes: a cgroup of its own (version 1 or 2), made and removed by root."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")


class NoMemoryLimit(Exception):
    """This machine or user cannot make one; the message says why."""


@dataclass(frozen=True)
class MemoryLimit:
    """A cgroup with a limit. `command` puts a command into it; everything that it starts stays inside."""

    path: Path
    nbytes: int
    version: int

    def command(self, command: list[str]) -> list[str]:
        """`command`, in the cgroup, seeing it where a container would see its own: at the mount of the controller.

        So whoever looks for a limit there (Ray does, and its memory monitor) finds this one.
        """
        mount = _MOUNT / "memory" if self.version == 1 else _MOUNT
        enter = 'echo $$ > "$0/cgroup.procs" && '
        show = f'mount --bind "$0" {mount} && ' if shutil.which("unshare") else ""
        inside = ["sh", "-c", f'{enter}{show}exec "$@"', str(self.path), *command]
        return ["unshare", "--mount", *inside] if show else inside

    def peak_bytes(self) -> int:
        """The most that was ever charged, page cache included."""
        return _number(self.path / ("memory.max_usage_in_bytes" if self.version == 1 else "memory.peak")) or 0

    def unreclaimable_bytes(self) -> int:
        """Anonymous and shared memory charged now: what no reclaim can free."""
        stat = _table(self.path / "memory.stat")
        if self.version == 1:
            return stat["total_rss"] + stat["total_shmem"] if "total_shmem" in stat else stat["total_rss"]
        return stat["anon"] + stat["shmem"]

    def kills(self) -> int:
        """Processes that the kernel has killed for this limit."""
        name = "memory.oom_control" if self.version == 1 else "memory.events"
        return _table(self.path / name).get("oom_kill", 0)

    def pids(self) -> list[int]:
        return [int(line) for line in (self.path / "cgroup.procs").read_text().split()]


@contextmanager
def memory_limit(name: str, nbytes: int) -> Iterator[MemoryLimit]:
    """A cgroup `name` with a limit of `nbytes`, no swap; at the end what is left in it is killed and it is removed.

    Raises:
        NoMemoryLimit: not root, or no memory controller.
    """
    path, version = _create(f"{name}-{os.getpid()}")
    limit = MemoryLimit(path, nbytes, version)
    try:
        if version == 1:
            (path / "memory.limit_in_bytes").write_text(str(nbytes))
            swap = path / "memory.memsw.limit_in_bytes"
            if swap.exists():
                swap.write_text(str(nbytes))
        else:
            (path / "memory.max").write_text(str(nbytes))
            (path / "memory.swap.max").write_text("0")
        yield limit
    finally:
        _remove(limit)


def _create(name: str) -> tuple[Path, int]:
    tried = []
    for parent, version in _parents():
        path = parent / name
        try:
            path.mkdir()
        except OSError as error:
            tried.append(f"{path}: {error.strerror}")
            continue
        if (path / ("memory.limit_in_bytes" if version == 1 else "memory.max")).exists():
            return path, version
        path.rmdir()
        tried.append(f"{path}: no memory controller")
    raise NoMemoryLimit("; ".join(tried) or "no cgroup with a memory controller is mounted")


def _parents() -> Iterator[tuple[Path, int]]:
    """Where a cgroup with the memory controller can be made, best first: below this process's own, else beside it."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            yield _existing(_MOUNT / "memory", path), 1
        elif controllers == "":
            mount = _MOUNT if (_MOUNT / "cgroup.controllers").exists() else _MOUNT / "unified"
            own = _existing(mount, path)
            yield own, 2
            if own != mount:
                yield own.parent, 2


def _existing(mount: Path, path: str) -> Path:
    """In a container `path` may be the host's and not exist below the mount, which then is the own cgroup."""
    own = mount / path.lstrip("/")
    return own if own.is_dir() else mount


def _remove(limit: MemoryLimit) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            limit.path.rmdir()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        for pid in limit.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _table(path: Path) -> dict[str, int]:
    return {key: int(value) for key, value in (line.split() for line in path.read_text().splitlines())}
