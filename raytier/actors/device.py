"""DeviceActor: one GPU, or the CPU cores of a node as one compute device.

A thin shell over `raytier.execution`: it owns resident parameters, the ring, the KV tensors and the
sampler of the models it runs. `step` has a thread of its own, so that a sweep of seconds does not keep
`status` waiting. torch is imported when the actor starts, never by importing this module.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray

from raytier.checkpoint.manifest import ModelManifest
from raytier.engine.step import StepBatch, StepResult
from raytier.hardware.rates import Rates
from raytier.planner.plan import WeightPlan
from raytier.tiers.arena import ArenaHandle

if TYPE_CHECKING:
    from raytier.execution.model_runner import ModelRunner


@dataclass(frozen=True, slots=True)
class ArenaGrant:
    """A range of the node's host pool that a device may fill with a model's host-tier parameters."""

    handle: ArenaHandle
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """What a device holds and has done. Sizes in bytes, times in seconds."""

    name: str
    pid: int
    device: str
    threads: int
    model_id: str | None
    resident_bytes: int
    host_bytes: int
    ring_bytes: int
    kv_bytes: int
    max_rss_bytes: int
    steps: int
    busy_s: float
    bytes_read: int


class DeviceActor:
    """Runs steps. At most one call per step: a step number that does not follow the last is refused."""

    def __init__(self, name: str, kind: str, threads: int) -> None:
        # All that computing needs, so that what the process takes without a model is known before it loads one.
        from raytier.execution import model_runner  # noqa: F401
        from raytier.execution.device import use_device

        self._name = name
        self._threads = threads
        self._device = use_device(kind, threads)
        self._runner: ModelRunner | None = None
        self._model_id: str | None = None
        self._last: tuple[int, int] = (-1, 0)
        self._steps = 0
        self._busy_s = 0.0

    def __repr__(self) -> str:
        return f"DeviceActor({self._device}, {self._threads} threads)"

    def rates(self, path: str, dtype: str, cache_dir: str) -> Rates:
        """Rates of this node with the disk of `path`: cached, else measured here in about two seconds."""
        from raytier.execution.rates import node_rates

        kind = self._device.partition(":")[0]
        return node_rates(path, dtype=dtype, threads=self._threads, cache_dir=cache_dir, kind=kind)

    def load(
        self,
        model_id: str,
        manifest: ModelManifest,
        plan: WeightPlan,
        arena: ArenaGrant | None,
        io_threads: int,
        io_bytes: int,
    ) -> float:
        """Load `plan`'s share of a model; returns the seconds it took.

        Raises:
            CheckpointError: a file changed or ends early. UnsupportedModelError: see the message.
        """
        from raytier.execution.model_runner import ModelRunner

        if self._runner is not None:
            raise RuntimeError(f"{self._name} holds {self._model_id} already")
        began = time.perf_counter()
        self._runner = ModelRunner.load(
            manifest,
            plan,
            device=self._device,
            arena=None if arena is None else (arena.handle, arena.offset, arena.nbytes),
            io_threads=io_threads,
            io_bytes=io_bytes,
        )
        self._model_id = model_id
        self._last = (-1, 0)
        return time.perf_counter() - began

    def step(self, batch: StepBatch) -> StepResult:
        """Run one step of the loaded model."""
        if self._runner is None or batch.model_id != self._model_id:
            raise RuntimeError(f"{self._name} holds {self._model_id}, not {batch.model_id}")
        epoch, last = self._last
        if batch.epoch < epoch or batch.step != (last + 1 if batch.epoch == epoch else 1):
            raise RuntimeError(f"step {batch.epoch}.{batch.step} does not follow {epoch}.{last}: one call per step")
        self._last = (batch.epoch, batch.step)
        result = self._runner.step(batch)
        self._steps += 1
        self._busy_s += result.stats.wall_s
        return result

    @ray.method(concurrency_group="control")
    def ping(self) -> str:
        return self._name

    @ray.method(concurrency_group="control")
    def status(self) -> DeviceStatus:
        memory = self._runner.memory() if self._runner is not None else {}
        return DeviceStatus(
            name=self._name,
            pid=os.getpid(),
            device=self._device,
            threads=self._threads,
            model_id=self._model_id,
            resident_bytes=memory.get("resident", 0),
            host_bytes=memory.get("host", 0),
            ring_bytes=memory.get("ring", 0),
            kv_bytes=memory.get("kv", 0),
            max_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            steps=self._steps,
            busy_s=self._busy_s,
            bytes_read=self._runner.bytes_read if self._runner is not None else 0,
        )


def remote_device_actor() -> Any:
    """The actor class as Ray wants it; one compute thread, two for control."""
    return ray.remote(concurrency_groups={"control": 2})(DeviceActor)  # type: ignore[call-overload]
