"""J1: what a process leaves behind is found and removed; what belongs to one that lives is not touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raytier.errors import ConfigurationError, ResourceNotAvailableError
from raytier.tiers.owners import OwnedDirectory, is_alive, is_owner_name, owner_name, remove_leftovers

OWNER = """
import sys, time
from raytier.tiers.owners import OwnedDirectory, owner_name
directory = OwnedDirectory(sys.argv[1], owner_name())
open(directory.path + "/bytes", "w").write("x")
print(directory.path, flush=True)
time.sleep(60)
"""


HALF_DEAD = """
import ctypes, sys, threading, time
from raytier.tiers.owners import OwnedDirectory, owner_name
directory = OwnedDirectory(sys.argv[1], owner_name())
threading.Thread(target=lambda: (sys.stdin.read(), directory.close(remove=False))).start()
print(directory.path, flush=True)
ctypes.CDLL(None).pthread_exit(None)
"""


def start_owner(parent: Path) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", OWNER, str(parent)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_process_lives_as_long_as_one_of_its_threads(tmp_path: Path) -> None:
    """A killed process of many threads looks like this for a moment, and holds its lock for so long."""
    command = [sys.executable, "-c", HALF_DEAD, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            path = Path(process.stdout.readline().strip())
            deadline = time.monotonic() + 30
            while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                assert time.monotonic() < deadline, "the first thread goes on"
                time.sleep(0.01)
            assert is_alive(path.name)
            assert remove_leftovers(str(tmp_path)) == []
        finally:
            process.kill()
    assert not is_alive(path.name)
    assert remove_leftovers(str(tmp_path)) == [str(path)]


def test_a_killed_owner_is_cleaned_up_after_and_a_living_one_is_not(tmp_path: Path) -> None:
    process, path = start_owner(tmp_path)
    try:
        assert (path / "bytes").exists()
        assert is_alive(path.name)
        assert remove_leftovers(str(tmp_path)) == []
        assert (path / "bytes").exists()
        os.kill(process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not waited for yet
        assert not is_alive(path.name)
        assert remove_leftovers(str(tmp_path)) == [str(path)]
        assert list(tmp_path.iterdir()) == []
    finally:
        process.kill()
        process.communicate()


def test_another_process_of_the_same_number_is_another_owner(tmp_path: Path) -> None:
    own = owner_name()
    reused = own.rpartition("-")[0] + "-1"
    assert is_alive(own) and not is_alive(reused)
    (tmp_path / reused).mkdir()
    (tmp_path / own).mkdir()
    assert remove_leftovers(str(tmp_path)) == [str(tmp_path / reused)]
    assert (tmp_path / own).is_dir()


def test_an_owner_that_cannot_be_seen_keeps_its_lock(tmp_path: Path) -> None:
    """A process of another container that shares the disk: its number means nothing here."""
    directory = OwnedDirectory(str(tmp_path), "raytier-4194305-1")  # above any pid that Linux gives
    assert not is_alive("raytier-4194305-1")
    assert remove_leftovers(str(tmp_path)) == []
    assert os.path.isdir(directory.path)
    directory.close(remove=False)
    assert remove_leftovers(str(tmp_path)) == [directory.path]


def test_only_what_looks_like_ours_and_is_a_directory_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    parent = tmp_path / "parent"
    for name in ("raytier-x-1", "raytier-4194305", "raytier-4194305-1-", "models", "xraytier-4194305-1"):
        (parent / name).mkdir(parents=True)
    (parent / "raytier-4194305-2").symlink_to(outside)
    (parent / "raytier-4194305-3").write_text("a file")
    dead = parent / "raytier-4194305-4"
    dead.mkdir()
    (dead / "link").symlink_to(outside)
    before = {path.name for path in parent.iterdir()}
    assert remove_leftovers(str(parent)) == [str(dead)]
    assert {path.name for path in parent.iterdir()} == before - {dead.name}
    assert (outside / "precious").exists()
    assert not caplog.records, "nothing else was tried"


def test_of_another_user_nothing_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "raytier-4194305-1").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert remove_leftovers(str(tmp_path)) == []


def test_a_directory_is_private_exclusive_and_gone_after_close(tmp_path: Path) -> None:
    directory = OwnedDirectory(str(tmp_path), owner_name())
    assert os.stat(directory.path).st_mode & 0o777 == 0o700
    with pytest.raises(ResourceNotAvailableError, match="used twice by one process"):
        OwnedDirectory(str(tmp_path), owner_name())
    Path(directory.path, "bytes").write_text("x")
    assert directory.files() == {"bytes"}
    directory.close()
    directory.close()
    assert list(tmp_path.iterdir()) == []
    OwnedDirectory(str(tmp_path), owner_name()).close()


def test_a_missing_parent_is_named_and_never_made(tmp_path: Path) -> None:
    missing = tmp_path / "not mounted"
    with pytest.raises(ConfigurationError, match="not mounted is no directory: create it"):
        OwnedDirectory(str(missing), owner_name())
    assert not missing.exists()
    assert remove_leftovers(str(missing)) == []


def test_a_parent_that_cannot_be_written_to_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"cannot write to /proc: .* \(errno \d+\)"):
        OwnedDirectory("/proc", owner_name())


def test_names_of_owners() -> None:
    assert is_owner_name(owner_name())
    assert owner_name().startswith(f"raytier-{os.getpid()}-")
    with pytest.raises(ValueError, match="is no owner name"):
        is_alive("raytier-1")
    with pytest.raises(ProcessLookupError):
        owner_name(4194305)
