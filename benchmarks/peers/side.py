"""One side of a comparison: a process that holds a system, asked in turn with the others and stopped in between."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import psutil

from peers.memory_limit import MemoryLimit
from peers.protocol import Decoded

HERE = Path(__file__).resolve().parent
#: Ray's own default is nice 15 for its workers, the peers run at 0.
ENVIRONMENT = {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}


#: What a side's daemons have put off while it was stopped is done before it is asked.
SETTLE_S = 0.25


class SideError(Exception):
    """A side ended, failed or did not answer in time; the message says which, and the end of its log."""


class Side:
    """A process that runs `script` of this directory.

    Its processes are stopped (SIGSTOP) except while it answers, so that neither its threads nor its daemons take time
    from the side that is measured.

    Args:
        limit: the memory cgroup that it runs in, or None.
        log: where its output goes.
    """

    def __init__(
        self,
        name: str,
        python: Path | str,
        script: str,
        log: Path,
        *,
        limit: MemoryLimit | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.limit = limit
        self._log = log
        command = [str(python), str(HERE / script)]
        self._output: IO[bytes] = open(log, "wb")  # noqa: SIM115 - closed in `close`
        self._process = subprocess.Popen(
            limit.command(command) if limit is not None else command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            env=os.environ | ENVIRONMENT | (environment or {}),
            text=True,
        )
        self._stopped = False

    def call(self, method: str, *, timeout_s: float = 600.0, **arguments: Any) -> Any:
        """Let the side run `method`.

        Raises:
            SideError: it failed, ended or took longer than `timeout_s`.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        if self._stopped:
            self._signal(signal.SIGCONT)
            time.sleep(SETTLE_S)
        try:
            self._process.stdin.write(json.dumps({"method": method, **arguments}) + "\n")
            self._process.stdin.flush()
            if not select.select([self._process.stdout], [], [], timeout_s)[0]:
                raise SideError(f"{self.name}: {method} took longer than {timeout_s:.0f} s")
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
            killed = ", killed for its memory limit" if self.limit is not None and self.limit.kills() else ""
            raise SideError(f"{self.name} ended during {method}{killed}:\n{self.log_end()}")
        reply = json.loads(line)
        if "error" in reply:
            raise SideError(f"{self.name}: {method} failed: {reply['error']}\n{self.log_end()}")
        self._signal(signal.SIGSTOP)
        return reply["result"]

    def decode(self, batch: int, prompt: int, warm_up: int, steps: int, **arguments: Any) -> Decoded:
        """Greedy decoding of `batch` sequences, see `protocol.Decoded`."""
        return Decoded(**self.call("decode", batch=batch, prompt=prompt, warm_up=warm_up, steps=steps, **arguments))

    def log_end(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-15:])

    def processes(self) -> list[psutil.Process]:
        try:
            process = psutil.Process(self._process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, number: signal.Signals) -> None:
        """To every process of the side: parents are stopped first and continued last, so that none is missed anew."""
        stop = number == signal.SIGSTOP
        if stop == self._stopped:
            return
        everyone = self.processes()
        for process in everyone if stop else reversed(everyone):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
        self._stopped = stop

    def close(self) -> None:
        """End the side and all of its processes."""
        self._signal(signal.SIGCONT)
        everyone = self.processes()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # it reads the end of its orders and leaves
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        deadline = time.monotonic() + 10
        while (left := [p for p in everyone if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]) and (
            time.monotonic() < deadline
        ):
            time.sleep(0.2)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._output.close()


@contextmanager
def side(*args: Any, **kwargs: Any) -> Iterator[Side]:
    """A `Side` that is closed at the end."""
    one = Side(*args, **kwargs)
    try:
        yield one
    finally:
        one.close()
