"""What every test shares: one Ray per run, GPU tests skipped with a reason, and nothing left behind at the end."""

from __future__ import annotations

import os

# Before anything imports Ray or torch: no telemetry, and one thread per process, so that results do not depend on
# the machine's cores and parallel test runs do not slow each other down.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["OMP_NUM_THREADS"] = "1"

import socket
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

# Ray asks for a token by default and would write one into the home directory.
os.environ.setdefault("RAY_AUTH_TOKEN", uuid.uuid4().hex)

# Inherited by every process that a test starts, however far down and even when its parent has died.
_MARK = "RAYTIER_TEST_RUN"
os.environ[_MARK] = uuid.uuid4().hex


@pytest.fixture(scope="session", autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Fail the run when it leaves processes or shared memory. First fixture in, last one out."""
    before = _shared_memory()
    yield
    processes = _wait_until_empty(_processes_of_this_run)
    assert not processes, "processes left by the tests:\n  " + "\n  ".join(processes)
    segments = sorted(_shared_memory() - before)
    assert not segments, f"left in /dev/shm by the tests: {segments}"


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("*raytier*")}


def _processes_of_this_run() -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            # multiprocessing's resource tracker lives as long as the process that it watches: this one.
            if process.environ().get(_MARK) == os.environ[_MARK] and "resource_tracker" not in str(process.cmdline()):
                found.append(f"{process.pid}: {' '.join(process.cmdline())[:200]}")
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
    return found


def _wait_until_empty(look: Callable[[], list[str]], seconds: float = 10) -> list[str]:
    deadline = time.monotonic() + seconds
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return found


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A Ray of this run with two CPUs. Tests delete the Serve applications that they start."""
    import ray
    from ray import serve

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def free_port() -> int:
    """A TCP port of localhost that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # here, so that a run without GPU tests can do without torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device, or a torch built without CUDA")
