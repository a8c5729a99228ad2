"""Directories that belong to one process, and are removed by whoever finds them after its death."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from raytier.errors import ConfigurationError, ResourceNotAvailableError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"raytier-(\d+)-(\d+)")
_LOCK = "lock"


def owner_name(pid: int | None = None) -> str:
    """`raytier-<pid>-<start time>` of a process (None: this one): no other process ever has the same.

    Raises:
        ProcessLookupError: there is no such process, or nobody has waited for it since it died.
    """
    pid = os.getpid() if pid is None else pid
    try:
        line = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(f"there is no process {pid}") from None
    fields = line[line.rindex(")") + 2 :].split()  # the command, in parentheses, may hold anything
    state, start_time = fields[0], fields[19]
    if state in "ZX" and not _has_threads(pid):
        raise ProcessLookupError(f"process {pid} is dead")
    return f"raytier-{pid}-{start_time}"


def _has_threads(pid: int) -> bool:
    """Whether threads of a process go on whose first one has ended: they still hold its files and locks."""
    try:
        return len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


def is_owner_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def is_alive(owner: str) -> bool:
    """Whether the process of an `owner_name` lives; ValueError when it is none."""
    match = _NAME.fullmatch(owner)
    if match is None:
        raise ValueError(f"{owner!r} is no owner name")
    try:
        return owner_name(int(match[1])) == owner
    except ProcessLookupError:
        return False


class OwnedDirectory:
    """A new directory `<parent>/<owner>` for this process alone.

    A lock in it says that it is in use also to those who do not see this process: other containers with the same disk.

    Raises:
        ConfigurationError: `parent` is no directory, or nothing can be written there.
        ResourceNotAvailableError: this process has one there already.
    """

    def __init__(self, parent: str, owner: str) -> None:
        self.parent = parent
        self.path = os.path.join(parent, owner)
        if not os.path.isdir(parent):
            raise ConfigurationError(f"{parent} is no directory: create it, or mount what belongs there")
        try:
            os.mkdir(self.path, 0o700)
        except FileExistsError:
            raise ResourceNotAvailableError(f"{self.path} exists: {parent} is used twice by one process") from None
        except OSError as error:
            raise ConfigurationError(f"cannot write to {parent}: {error.strerror} (errno {error.errno})") from error
        try:
            self._lock = os.open(
                os.path.join(self.path, _LOCK), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            os.rmdir(self.path)
            raise ConfigurationError(f"cannot write to {parent}: {error.strerror} (errno {error.errno})") from error
        with contextlib.suppress(OSError):  # a filesystem without locks: the process has to be seen
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def files(self) -> set[str]:
        """Names of all files in it."""
        return set(os.listdir(self.path)) - {_LOCK}

    def close(self, *, remove: bool = True) -> None:
        """Remove it with everything in it, or leave it to whoever comes next. A second call does nothing."""
        if self._lock < 0:
            return
        os.close(self._lock)
        self._lock = -1
        if remove:
            _remove(self.path)


class KeptDirectory:
    """The directory `<parent>/raytier-store`, made where it is missing: for files that outlive processes.

    Raises:
        ConfigurationError: it cannot be made, or nothing can be written there.
    """

    def __init__(self, parent: str) -> None:
        self.parent = parent
        self.path = os.path.join(parent, "raytier-store")
        try:
            os.makedirs(self.path, 0o700, exist_ok=True)
            self._lock = os.open(os.path.join(self.path, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigurationError(f"cannot write to {parent}: {error.strerror} (errno {error.errno})") from error

    def files(self) -> set[str]:
        """Names of all files in it."""
        return set(os.listdir(self.path)) - {_LOCK}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other process changes what is there, and keep it so."""
        with contextlib.suppress(OSError):  # a filesystem without locks
            fcntl.flock(self._lock, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def remove_unfinished(self) -> None:
        """Remove what a process has not finished; call it while nobody else writes (`locked`)."""
        for name in self.files():
            if name.endswith(".new"):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(self.path, name))

    def close(self, *, remove: bool = True) -> None:
        """Let go of it; its files stay. A second call does nothing."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_leftovers(parent: str) -> list[str]:
    """Remove directories below `parent` whose owners have died; returns their paths.

    Only real directories of this user are touched: `parent` may be open to everyone, as /dev/shm is.
    """
    removed = []
    try:
        with os.scandir(parent) as entries:
            candidates = [entry.path for entry in entries if is_owner_name(entry.name)]
    except OSError as error:
        logger.warning("cannot look for leftovers in %s: %s", parent, error)
        return []
    for path in candidates:
        try:
            status = os.lstat(path)
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            continue
        if not is_alive(os.path.basename(path)) and not _locked(path) and _remove(path):
            removed.append(path)
    return removed


def _locked(path: str) -> bool:
    """Whether a process holds the lock of an owned directory; it may be one of another container."""
    try:
        fd = os.open(os.path.join(path, _LOCK), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
    return False


def _remove(path: str) -> bool:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        logger.warning("cannot remove %s: %s", path, error)
        return False
    return True
