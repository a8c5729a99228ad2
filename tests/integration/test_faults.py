"""J1: any process of an application killed at any time. What runs ends with a clear error, Serve starts anew, nothing
is left of what was."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve

from tests.integration.application import GREEDY, Application, eventually, is_alive

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PROMPT = [5, 6, 7]
BODY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 8000} | GREEDY


@pytest.fixture
def life(served: Application, tmp_path: Path) -> Iterator[dict[str, int]]:
    """Processes of the application by role. After the test it has others, answers as before, and the old are gone."""
    wanted = served.generate(PROMPT, max_tokens=8)
    before, groups, files = served.pids(), placement_groups(), temporary_files()
    yield before
    eventually(lambda: healthy(served), seconds=120)
    assert served.generate(PROMPT, max_tokens=8) == wanted
    eventually(lambda: not [role for role, pid in before.items() if is_alive(pid)])
    after = served.pids()
    assert not set(after.values()) & set(before.values())
    eventually(lambda: len(placement_groups()) == len(groups))
    assert not placement_groups() & groups
    assert not temporary_files() - files
    assert served.idle().dead is None


def placement_groups() -> set[str]:
    table = ray.util.placement_group_table()
    return {key for key, group in table.items() if "tiny#" in group["name"] and group["state"] != "REMOVED"}


def temporary_files() -> set[str]:
    """Everything that a process of raytier could have left in shared memory or among temporary files."""
    return {str(path) for folder in ("/dev/shm", "/tmp") for path in Path(folder).glob("*raytier*")}


def healthy(served: Application) -> bool:
    """Whether a replica answers and Serve is content."""
    try:
        ok = httpx.get(f"{served.url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False
    return ok and serve.status().applications["tiny"].status == "RUNNING"


def rest_of(connection: socket.socket) -> bytes:
    """What still comes over a connection until its answer ends, or it is cut."""
    connection.settimeout(60)
    received = b""
    try:
        while not received.endswith(b"0\r\n\r\n") and (part := connection.recv(1 << 16)):
            received += part
    except ConnectionError:
        pass
    return received


def last_event(received: bytes) -> dict[str, Any]:
    lines = [line for line in received.decode().splitlines() if line.startswith("data: ")]
    assert lines[-1] != "data: [DONE]"
    event: dict[str, Any] = json.loads(lines[-1].removeprefix("data: "))
    return event


def test_a_killed_device_actor(served: Application, life: dict[str, int]) -> None:
    with ThreadPoolExecutor() as pool, served.raw_stream(**BODY) as connection:
        whole = pool.submit(httpx.post, f"{served.url}/v1/completions", json=BODY, timeout=60)
        eventually(lambda: served.stats().running == 2)
        os.kill(life["device"], signal.SIGKILL)
        killed = time.monotonic()
        error = last_event(rest_of(connection))["error"]
        assert "the DeviceActor died" in error["message"]
        assert error["type"] == "server_error"
        answer = whole.result()
        assert answer.status_code == 503
        assert "the DeviceActor died" in answer.json()["error"]["message"]
        assert time.monotonic() - killed < 20


def test_a_killed_actor_that_computes_nothing(served: Application, life: dict[str, int]) -> None:
    """The engine could go on for a while without it; it is ended, and says so, when the health check notices."""
    with served.raw_stream(**BODY) as connection:
        os.kill(life["kv"], signal.SIGKILL)
        killed = time.monotonic()
        error = last_event(rest_of(connection))["error"]
        assert "send it again" in error["message"]
        assert time.monotonic() - killed < 30


def test_a_killed_replica(served: Application, life: dict[str, int]) -> None:
    """Its actors are its children and go with it."""
    with ThreadPoolExecutor() as pool, served.raw_stream(**BODY) as connection:
        whole = pool.submit(httpx.post, f"{served.url}/v1/completions", json=BODY, timeout=60)
        eventually(lambda: served.stats().running == 2)
        os.kill(life["replica"], signal.SIGKILL)
        killed = time.monotonic()
        assert b"[DONE]" not in rest_of(connection)
        assert whole.result().status_code == 500, "what Serve's proxy says when a replica is gone"
        assert time.monotonic() - killed < 20
