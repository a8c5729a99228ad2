"""What joins an engine to its actors: steps to the DeviceActor, reports to the ledger and the file tiers."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from raytier.actors.compute import StepConnection
from raytier.engine.outputs import StepReport
from raytier.engine.step import StepBatch, StepResult
from raytier.errors import EngineDeadError, ModelLoadingError

_CALL_TIMEOUT_S = 30.0


class RemoteExecutor:
    """A `StepExecutor` that sends steps to a DeviceActor of this machine.

    Raises:
        RayActorError: the actor is gone. ModelLoadingError: it is on another machine.
    """

    def __init__(self, device: Any) -> None:
        self._device = device
        try:
            self._connection = StepConnection(answer_of(device.address.remote(), _CALL_TIMEOUT_S))
        except ConnectionError as error:
            raise ModelLoadingError(f"the DeviceActor cannot be reached: {error}") from None

    def step(self, batch: StepBatch) -> StepResult:
        """Run one step; EngineDeadError when the actor is gone, else the error that the step raised."""
        try:
            return self._connection.step(batch)
        except ConnectionError:
            raise EngineDeadError(f"the DeviceActor died during step {batch.step}: {self._cause()}") from None

    def close(self) -> None:
        """No step runs any more: let the device have its end of the connection back."""
        self._connection.close()

    def _cause(self) -> str:
        """What Ray knows of the actor's end."""
        try:
            ray.get(self._device.ping.remote(), timeout=_CALL_TIMEOUT_S)
        except (RayActorError, GetTimeoutError) as error:
            return cause_of(error)
        return "its connection ended"


class StepReporter:
    """Tells the KVBlockActor and the file tiers what steps did; never waits for them.

    At most one call per actor and step: ledger deltas at once, read counters once a second and when the work is done.
    """

    def __init__(self, engine_id: str, kv: Any, disk: Any, ramdisk: Any | None, flush_s: float = 1.0) -> None:
        self._engine_id = engine_id
        self._report = kv.report
        self._records = [disk.record] + ([ramdisk.record] if ramdisk is not None else [])
        self._flush_s = flush_s
        self._since = time.monotonic()
        self._counts = [(0, 0, 0)] * len(self._records)  # reads, bytes, damaged

    def __call__(self, report: StepReport) -> None:
        if report.kv:
            self._report.remote(self._engine_id, report.epoch, report.step, report.kv)
        if (stats := report.stats) is not None:
            ramdisk = (stats.reads_ramdisk, stats.bytes_read_ramdisk, stats.damaged_ramdisk)
            disk = (stats.reads - ramdisk[0], stats.bytes_read - ramdisk[1], stats.damaged - ramdisk[2])
            news = (disk, ramdisk)
            self._counts = [
                (r + dr, b + db, d + dd) for (r, b, d), (dr, db, dd) in zip(self._counts, news, strict=False)
            ]
        now = time.monotonic()
        idle = not (report.num_running or report.num_waiting)
        if any(reads for reads, _, _ in self._counts) and (idle or now - self._since >= self._flush_s):
            for record, (reads, nbytes, damaged) in zip(self._records, self._counts, strict=True):
                if reads:
                    record.remote(reads, nbytes, now - self._since, damaged)
            self._counts = [(0, 0, 0)] * len(self._records)
            self._since = now


def answer_of(ref: Any, timeout: float | None = None) -> Any:
    """What an actor answers, or the error that it raised itself, without Ray's wrapping.

    Raises:
        RayActorError: the actor is gone. GetTimeoutError: it has not answered in `timeout` seconds.
    """
    try:
        return ray.get(ref, timeout=timeout)
    except RayTaskError as error:
        raise error.cause from None


def cause_of(error: BaseException) -> str:
    """What matters of an error of Ray's, whose texts go on for pages: the first line, or what a constructor raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1] if "creation task" in lines[0] else lines[0]
