"""T13: the memory of the running application while it holds no model.

What runs: `serve run` of serve_configs/llm.yaml with `startup_model: null`, on a port of its own. It starts Ray with
its dashboard, the Serve controller and proxy, and the LLMServer replica with whatever actors it keeps before a model is
loaded.

- T13: PSS (proportional set size: private pages, plus each shared page divided by the processes that map it), summed
  over the whole tree of processes below `serve run`: the driver, GCS, raylet, dashboard, agents, idle workers, Serve's
  actors, the replica and its children. Median of the samples, taken after the tree and its size have come to rest.

Why it is fair: nothing is left out and nothing is subtracted; the shared memory of Ray's object store counts where it
was touched. PSS would be too low if another Ray of the same installation ran beside it (they share the pages of its
libraries), so for root the pages of the tree are also counted one by one ("distinct pages"), each once, whoever
else maps it. The larger of both counts.

The limit that raytier cannot go below on this Ray is measured too (not with `--quick`): the same with a bare FastAPI
application of one route in place of raytier.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "serve_configs" / "llm.yaml"
GIB, MIB = 2**30, 2**20
PAGE = os.sysconf("SC_PAGE_SIZE")
START_TIMEOUT_S = 120
#: The tree has come to rest when neither its processes nor its size (by more than 1 %) change for this long.
QUIET_S = 6.0
_PR_SET_CHILD_SUBREAPER = 36
BARE_APP = """
from fastapi import FastAPI
from ray import serve

api = FastAPI()


@serve.deployment
@serve.ingress(api)
class Bare:
    @api.get("/v1/models")
    def models(self) -> dict:
        return {}


app = Bare.bind()
"""


@dataclass(frozen=True)
class Usage:
    """Memory of one process in bytes: `shared` is its part of pages that others map too."""

    pid: int
    name: str
    pss: int
    uss: int
    anonymous: int
    file: int
    shmem: int

    @property
    def shared(self) -> int:
        return self.pss - self.uss


def read_usage(process: psutil.Process) -> Usage | None:
    """None when the process has just ended."""
    try:
        values = {}
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]:
            key, _, rest = line.partition(":")
            values[key] = int(rest.split()[0]) * 1024
        return Usage(
            process.pid,
            title(process),
            values["Pss"],
            values["Private_Clean"] + values["Private_Dirty"],
            values["Pss_Anon"],
            values["Pss_File"],
            values["Pss_Shmem"],
        )
    except (OSError, KeyError, psutil.Error):
        return None


def title(process: psutil.Process) -> str:
    """What the process is: Ray's workers set their title, its daemons are told by their command."""
    words = process.cmdline()
    line = " ".join(words)
    for mark, name in (
        ("gcs_server", "gcs_server"),
        ("raylet/raylet", "raylet"),
        ("dashboard/dashboard.py", "dashboard"),
        ("dashboard/agent.py", "dashboard agent"),
        ("runtime_env/agent/main.py", "runtime env agent"),
        ("log_monitor.py", "log monitor"),
        ("autoscaler/_private/monitor.py", "autoscaler monitor"),
        ("forkserver", "python forkserver"),
        ("resource_tracker", "python resource tracker"),
        ("spawn_main", "dashboard module (spawned)"),
    ):
        if mark in line:
            return name
    if any(word.endswith("/serve") for word in words[:3]):
        return "serve run"
    return line[:60] or process.name()


def tree() -> list[psutil.Process]:
    """Every process below this one: orphans come back to it, see `adopt_orphans`."""
    return [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]


def adopt_orphans() -> None:
    """Daemons whose parent ends become children of this process, so that none is missed."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def distinct_pages(pids: list[int]) -> int | None:
    """Bytes of memory that the processes map, each page once; None where page numbers are hidden (not root)."""
    frames: list[np.ndarray] = []
    for pid in pids:
        try:
            maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
            with open(f"/proc/{pid}/pagemap", "rb", buffering=0) as pagemap:
                for line in maps:
                    start, end = (int(part, 16) for part in line.split(" ", 1)[0].split("-"))
                    if line.endswith("[vsyscall]"):
                        continue
                    # In pieces: Ray maps its whole object store, most of it never touched.
                    for first in range(start // PAGE, end // PAGE, 2**20):
                        count = min(2**20, end // PAGE - first)
                        raw = os.pread(pagemap.fileno(), 8 * count, 8 * first)
                        entries = np.frombuffer(raw, dtype=np.uint64)
                        present = entries[(entries >> np.uint64(63)) == 1] & np.uint64(2**55 - 1)
                        frames.append(np.unique(present))
        except OSError:
            continue
    if not frames:
        return None
    numbers = np.unique(np.concatenate(frames))
    if numbers.size <= 1:  # without CAP_SYS_ADMIN every number reads as 0
        return None
    return int(numbers.size) * PAGE


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def raytier_config(config: Path, startup: str) -> dict[str, Any]:
    """The Serve configuration `config` with another startup model ("null": none)."""
    document: dict[str, Any] = yaml.safe_load(config.read_text())
    document["applications"][0]["args"]["startup_model"] = None if startup == "null" else startup
    return document


def bare_config(directory: Path) -> dict[str, Any]:
    """A Serve application of one FastAPI route, its code in `directory`."""
    (directory / "bare_app.py").write_text(BARE_APP)
    application = {"name": "bare", "route_prefix": "/", "import_path": "bare_app:app"}
    return {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1"}, "applications": [application]}


@contextmanager
def running(document: dict[str, Any], directory: Path, extra: dict[str, str]) -> Iterator[int]:
    """`serve run` of a configuration, started in `directory`; yields its port when the application answers there."""
    port = document["http_options"]["port"] = free_port()
    served, log = directory / "served.yaml", directory / "serve.log"
    served.write_text(yaml.safe_dump(document))
    # As a user has it: no settings of Ray's left over, and compiled modules kept (compiling leaves memory behind).
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONDONTWRITEBYTECODE"}
    environ |= {"RAY_USAGE_STATS_ENABLED": "0"} | extra
    command = [str(Path(sys.executable).with_name("serve")), "run", str(served)]
    with open(log, "wb") as output:
        process = subprocess.Popen(command, cwd=directory, env=environ, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while ask(port, "/v1/models") != "200":
            text = log.read_text(errors="replace")
            if process.poll() is not None or "DEPLOY_FAILED" in text or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(command)} did not come up:\n{text[-4000:]}")
            time.sleep(0.3)
        yield port
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        end_rest()


def end_rest(patience_s: float = 15.0) -> None:
    """Wait until Ray's daemons have gone with the driver; end what has not."""
    deadline = time.monotonic() + patience_s
    while left := tree():
        if time.monotonic() > deadline:
            for process in left:
                process.kill()
        psutil.wait_procs(left, timeout=0.5)
    while True:  # orphans that came to this process and have ended
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                break
        except ChildProcessError:
            break


def ask(port: int, path: str) -> str:
    """The HTTP status of a GET, or what went wrong."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return f"{answer.status}"
    except urllib.error.HTTPError as error:
        return f"{error.code}"
    except OSError as error:
        return str(error)


def sample() -> list[Usage]:
    return [usage for process in tree() if (usage := read_usage(process)) is not None]


def settle(limit_s: float) -> float:
    """Wait until the tree is at rest, at most `limit_s`; returns the seconds waited."""
    began = time.monotonic()
    pids: set[int] = set()
    size = 0
    since = began
    while time.monotonic() - began < limit_s:
        now = sample()
        total = sum(usage.pss for usage in now)
        if {usage.pid for usage in now} != pids or abs(total - size) > size / 100:
            pids, size, since = {usage.pid for usage in now}, total, time.monotonic()
        elif time.monotonic() - since > QUIET_S:
            break
        time.sleep(1)
    return time.monotonic() - began


def show(console: Console, usages: list[Usage]) -> None:
    table = Table(title="memory by process, MiB (last sample)")
    for column in ("process", "pid", "PSS", "USS", "shared part", "anonymous", "file", "shmem"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for u in sorted(usages, key=lambda usage: -usage.pss):
        table.add_row(
            u.name, str(u.pid), *(f"{x / MIB:.1f}" for x in (u.pss, u.uss, u.shared, u.anonymous, u.file, u.shmem))
        )
    total = [sum(getattr(u, key) for u in usages) for key in ("pss", "uss", "shared", "anonymous", "file", "shmem")]
    table.add_section()
    table.add_row(f"{len(usages)} processes", "", *(f"{x / MIB:.1f}" for x in total))
    console.print(table)


@dataclass(frozen=True)
class Footprint:
    """Medians of the samples in bytes (`distinct` None where page numbers are hidden), and the last sample."""

    pss: int
    distinct: int | None
    usages: list[Usage]

    @property
    def value(self) -> int:
        return max(self.pss, self.distinct or 0)

    def __str__(self) -> str:
        distinct = "" if self.distinct is None else f", distinct pages {self.distinct / GIB:.3f} GiB"
        return f"PSS {self.pss / GIB:.3f} GiB{distinct}"


def measure(quick: bool) -> Footprint:
    """Sample the tree once it is at rest."""
    settle(12 if quick else 60)
    samples, distinct = [], []
    for _ in range(5):
        samples.append(sample())
        pages = distinct_pages([usage.pid for usage in samples[-1]])
        if pages is not None:
            distinct.append(pages)
        time.sleep(0.5 if quick else 2)
    pss = median(sum(usage.pss for usage in usages) for usages in samples)
    return Footprint(int(pss), int(median(distinct)) if distinct else None, samples[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="T13: memory of the running application without a model.")
    parser.add_argument("--quick", action="store_true", help="less waiting, without the bare application")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--config", type=Path, default=CONFIG, help="the application to run")
    parser.add_argument("--startup-model", default="null", help="a model to load all the same, to see what it adds")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a setting to try")
    arguments = parser.parse_args()
    console = Console(width=130)
    console.print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} CPUs at the start")
    adopt_orphans()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    extra = dict(pair.split("=", 1) for pair in arguments.env)
    with tempfile.TemporaryDirectory(prefix="raytier-footprint-", ignore_cleanup_errors=True) as name:
        directory = Path(name)
        with running(raytier_config(arguments.config, arguments.startup_model), directory, extra):
            ours = measure(arguments.quick)
        show(console, ours.usages)
        console.print(f"raytier, startup_model {arguments.startup_model}: {ours}")
        if not arguments.quick:
            with running(bare_config(directory), directory, extra):
                console.print(f"Ray Serve with a bare FastAPI application: {measure(arguments.quick)}")
    row = {"value": round(ours.value / GIB, 3), "gate": 1.3, "goal": 0.9, "unit": "GiB", "lower_is_better": True}
    console.print(f"T13: {row['value']} GiB (gate at most {row['gate']}, goal at most {row['goal']})")
    console.print(f"load average {os.getloadavg()[0]:.2f} at the end")
    if arguments.json:
        print(json.dumps({"T13": row}))


if __name__ == "__main__":
    main()
