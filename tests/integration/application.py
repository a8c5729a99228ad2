"""A served application as the tests see it: its URL, its handle, its processes."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import ray
from openai import OpenAI
from ray.serve.handle import DeploymentHandle

from raytier.actors.group import GroupStatus
from raytier.actors.names import NAMESPACE, actor_name
from raytier.engine.outputs import EngineStats

T = TypeVar("T")

ROLES = ("device", "host", "disk", "kv")
#: What greedy means over HTTP and over a handle.
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}


def eventually(condition: Callable[[], T], seconds: float = 60, every: float = 0.05) -> T:
    """The first value of `condition` that is true; the machine may be busy, so the deadline is generous."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"still {value!r} after {seconds} s"
        time.sleep(every)
    return value


def pid_of(actor: Any) -> int:
    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))


def repr_of(actor: Any) -> str:
    return str(ray.get(actor.__ray_call__.remote(repr)))


def actors_of(app: str, roles: Sequence[str] = ROLES) -> dict[str, Any]:
    """Actors of an application by role."""
    return {role: ray.get_actor(actor_name(app, role), NAMESPACE) for role in roles}


def ours(folder: Path) -> set[str]:
    """What lies in a directory for temporary files, but for the caches that torch makes when it is imported."""
    return {path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")}


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its parent does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def has_torch(pid: int) -> bool:
    """Whether the process has loaded torch's libraries."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


@dataclass(frozen=True)
class Application:
    """`name` in Serve, `url` without a slash at its end."""

    name: str
    url: str
    handle: DeploymentHandle[Any]

    def client(self) -> OpenAI:
        return OpenAI(api_key="none", base_url=f"{self.url}/v1", max_retries=0, timeout=120)

    def stats(self) -> EngineStats:
        result: EngineStats = self.handle.stats.remote().result(timeout_s=60)
        return result

    def status(self) -> GroupStatus:
        result: GroupStatus = self.handle.actors.remote().result(timeout_s=60)
        return result

    def generate(self, prompt: list[int], **sampling: Any) -> list[int]:
        result = self.handle.generate.remote(prompt, **GREEDY, **sampling).result(timeout_s=120)
        return list(result.token_ids)

    def idle(self) -> EngineStats:
        """Wait until nothing runs and every block is free."""
        return eventually(lambda: (s := self.stats()) and not (s.running or s.waiting or s.kv_blocks_used) and s)

    def replica(self) -> Any:
        """The replica's actor."""
        prefix = f"SERVE_REPLICA::{self.name}#LLMServer#"
        names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True) if a["name"].startswith(prefix)]
        assert len(names) == 1, names
        return ray.get_actor(names[0], "serve")

    def pids(self) -> dict[str, int]:
        """Processes by role, the replica included."""
        return {"replica": pid_of(self.replica())} | {r: pid_of(a) for r, a in actors_of(self.name).items()}

    @contextmanager
    def raw_stream(self, **body: Any) -> Iterator[socket.socket]:
        """A completion as a stream over a bare socket, its first event read."""
        address = urlsplit(self.url)
        content = json.dumps({"model": "tiny", "stream": True, **GREEDY, **body}).encode()
        head = (
            f"POST {address.path}/v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
            connection.sendall(head.encode() + content)
            received = b""
            while b"data: " not in received:
                part = connection.recv(65536)
                assert part, f"closed after {received!r}"
                received += part
            yield connection
