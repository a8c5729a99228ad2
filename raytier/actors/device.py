"""DeviceActor: one GPU, or the CPU cores of a node as one compute device.

A thin shell over `raytier.execution`: it owns resident parameters, the ring, the KV tensors and the
sampler of the models it runs. Everything that computes with several threads runs in one (`compute`), steps
among it, so that a sweep of seconds does not keep `status` waiting. torch is imported when the actor starts,
never by importing this module.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import ray

from raytier.actors.compute import Address, ComputeThread
from raytier.checkpoint.manifest import ModelManifest, TokenizerSpec
from raytier.engine.step import StepBatch, StepResult
from raytier.errors import InvalidRequestError
from raytier.execution.parameters import ParameterStatus
from raytier.hardware.rates import Rates
from raytier.kv.orders import LowerShape
from raytier.planner.plan import Tier, WeightPlan
from raytier.tiers.arena import Arena, ArenaHandle
from raytier.tiers.copies import TierCopy

if TYPE_CHECKING:
    from raytier.execution.model_runner import ModelRunner


@dataclass(frozen=True, slots=True)
class ArenaGrant:
    """A range of the node's host pool that a device may fill with one parameter."""

    handle: ArenaHandle
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Move:
    """Parameters that are to change their tier, all together.

    Attributes:
        grants: for HOST, the range of the arena for each of `names`.
        copies: for RAMDISK, and for NVME with directories of its own, where each has been copied to. Without a copy,
            NVME means the checkpoint's files.
    """

    names: tuple[str, ...]
    destination: Tier
    grants: Mapping[str, ArenaGrant] = field(default_factory=dict)
    copies: Mapping[str, TierCopy] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class MoveResult:
    """Bytes that moved, seconds it took, and the tier that each parameter came from (those that were there: none)."""

    nbytes: int
    seconds: float
    sources: dict[str, Tier]


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """What a device holds and has done. Sizes in bytes, times in seconds.

    Attributes:
        host_bytes, kv_host_bytes: of the host pool, for parameters and for KV.
        reads_queued: read requests, nearly all of them prefetches, that wait for a thread.
        bytes_loaded, bytes_to_load: of what is to be in memory, what has been read.
    """

    name: str
    pid: int
    device: str
    threads: int
    model_id: str | None
    resident_bytes: int
    host_bytes: int
    kv_host_bytes: int
    ring_bytes: int
    kv_bytes: int
    max_rss_bytes: int
    steps: int
    busy_s: float
    bytes_read: int
    reads_queued: int
    bytes_loaded: int
    bytes_to_load: int


class DeviceActor:
    """Runs steps, sent to `address`. One message per step: a step number that does not follow the last is refused."""

    def __init__(self, name: str, kind: str, threads: int, cache_dir: str) -> None:
        # First touch of small pages is the dearest part of filling memory; torch reads this when it is imported.
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        # All that computing needs, so that what the process takes without a model is known before it loads one.
        from raytier.execution import model_runner  # noqa: F401
        from raytier.execution.device import use_device

        self._name = name
        self._threads = threads
        self._compute = ComputeThread(self._step)
        self._device = self._compute.call(lambda: use_device(kind, threads, cache_dir))
        self._runner: ModelRunner | None = None
        self._model_id: str | None = None
        self._arena: Arena | None = None
        self._kv_host_bytes = 0
        self._began = 0.0
        self._last: tuple[int, int] = (-1, 0)
        self._steps = 0
        self._busy_s = 0.0

    def __repr__(self) -> str:
        return f"DeviceActor({self._device}, {self._threads} threads)"

    def rates(
        self, path: str, dtype: str, cache_dir: str, nvme_paths: Sequence[str] = (), ramdisk: str | None = None
    ) -> Rates:
        """Rates of this node with the disk of `path`, or of the tiers' directories: cached, else measured here in a few
        seconds."""
        from raytier.execution.rates import node_rates

        measure = partial(
            node_rates,
            path,
            dtype=dtype,
            threads=self._threads,
            cache_dir=cache_dir,
            kind=self._device.partition(":")[0],
            nvme_paths=nvme_paths,
            ramdisk=ramdisk,
        )
        try:
            return self._compute.call(measure)
        finally:
            _trim()

    def load(
        self,
        model_id: str,
        manifest: ModelManifest,
        plan: WeightPlan,
        grants: Mapping[str, ArenaGrant],
        copies: Mapping[str, TierCopy],
        io_threads: int,
        io_bytes: int,
        tokenizer: TokenizerSpec,
        lower: LowerShape | None = None,
        kv_grant: ArenaGrant | None = None,
    ) -> float:
        """Load `plan`'s share of a model; returns the seconds until steps may run, which is before all is read.

        Args:
            grants: ranges of the host pool, one per host-tier parameter.
            copies: where the parameters lie that are on the ramdisk or in directories of the disk tier.
            lower: what KV goes to below the device. kv_grant: range of the host pool for it; None: memory of its own.

        Raises:
            CheckpointError: a file changed or ends early. UnsupportedModelError: see the message.
        """
        from raytier.execution.model_runner import ModelRunner

        if self._runner is not None:
            raise RuntimeError(f"{self._name} holds {self._model_id} already")
        self._began = time.perf_counter()
        load = partial(
            ModelRunner.load,
            manifest,
            plan,
            device=self._device,
            host_views=self._views(grants),
            copies=copies,
            io_threads=io_threads,
            io_bytes=io_bytes,
            tokenizer=tokenizer,
            lower=lower,
            kv_memory=None if kv_grant is None else self._views({"": kv_grant})[""],
        )
        try:
            self._runner = self._compute.call(load)
        except BaseException:
            self._give_back()
            raise
        self._model_id = model_id
        self._kv_host_bytes = 0 if kv_grant is None else kv_grant.nbytes
        self._last = (-1, 0)
        return time.perf_counter() - self._began

    @ray.method(concurrency_group="control")
    def loaded(self) -> float:
        """Wait until all that stays in memory has been read; seconds since loading began.

        Raises:
            CheckpointError, TierError: reading failed.
        """
        self._running(self._model_id).wait_loaded()
        return time.perf_counter() - self._began

    @ray.method(concurrency_group="control")
    def kept_kv(self) -> list[list[tuple[int, bytes]]]:
        """Per KV cache group (slot, hash) of the blocks that are on disk from before."""
        return self._running(self._model_id).kept_kv()

    def unload(self, model_id: str) -> None:
        """Free everything of the model. Its steps have ended; a move that runs fails."""
        runner = self._running(model_id)
        self._runner = self._model_id = None
        self._compute.call(runner.close)
        del runner
        self._give_back()

    @ray.method(concurrency_group="transfers")
    def move(self, model_id: str, move: Move) -> MoveResult:
        """Move parameters to another tier, beside running steps; the change is made between two of them.

        Raises:
            InvalidRequestError: a parameter is unknown or cannot move. ResourceNotAvailableError: the device is full.
            TierError, CheckpointError: reading failed. In all cases nothing has changed.
        """
        began = time.perf_counter()
        runner = self._running(model_id)
        sources = runner.move(move.names, move.destination, self._views(move.grants), move.copies)
        moved = sum(p.nbytes for p in runner.parameters() if p.name in sources)
        return MoveResult(moved, time.perf_counter() - began, sources)

    @ray.method(concurrency_group="control")
    def layers(self) -> tuple[ParameterStatus, ...]:
        """Where every parameter of the loaded model is now; none without a model."""
        runner = self._runner
        return runner.parameters() if runner is not None else ()

    def _running(self, model_id: str | None) -> ModelRunner:
        runner = self._runner
        if runner is None or model_id != self._model_id:
            raise InvalidRequestError(f"{self._name} holds {self._model_id}, not {model_id}", param="model")
        return runner

    def _views(self, grants: Mapping[str, ArenaGrant]) -> dict[str, memoryview]:
        """The granted memory by name."""
        views = {}
        for name, grant in grants.items():
            if self._arena is None:
                self._arena = Arena.attach(grant.handle)
            views[name] = self._arena.view[grant.offset : grant.offset + grant.nbytes]
        return views

    def _give_back(self) -> None:
        """Let the system have what a model held; allocators would keep part of it."""
        self._kv_host_bytes = 0
        if self._arena is not None:
            self._arena.close()
            self._arena = None
        _trim()

    @ray.method(concurrency_group="control")
    def address(self) -> Address:
        """Where an engine of this machine sends its steps (`StepConnection`)."""
        return self._compute.address

    def _step(self, batch: StepBatch) -> StepResult:
        """Run one step of the loaded model."""
        runner = self._running(batch.model_id)
        epoch, last = self._last
        if batch.epoch < epoch or batch.step != (last + 1 if batch.epoch == epoch else 1):
            raise RuntimeError(f"step {batch.epoch}.{batch.step} does not follow {epoch}.{last}: each is sent once")
        self._last = (batch.epoch, batch.step)
        result = runner.step(batch)
        self._steps += 1
        self._busy_s += result.stats.wall_s
        return result

    @ray.method(concurrency_group="control")
    def ping(self) -> str:
        return self._name

    @ray.method(concurrency_group="control")
    def status(self) -> DeviceStatus:
        runner = self._runner
        memory = runner.memory() if runner is not None else {}
        loaded, to_load = runner.progress if runner is not None else (0, 0)
        return DeviceStatus(
            name=self._name,
            pid=os.getpid(),
            device=self._device,
            threads=self._threads,
            model_id=self._model_id,
            resident_bytes=memory.get("resident", 0),
            host_bytes=memory.get("host", 0),
            kv_host_bytes=self._kv_host_bytes,
            ring_bytes=memory.get("ring", 0),
            kv_bytes=memory.get("kv", 0),
            max_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            steps=self._steps,
            busy_s=self._busy_s,
            bytes_read=runner.bytes_read if runner is not None else 0,
            reads_queued=runner.reads_queued if runner is not None else 0,
            bytes_loaded=loaded,
            bytes_to_load=to_load,
        )


def _trim() -> None:
    """Let the system have what is not used any more."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def remote_device_actor() -> Any:
    """The actor class as Ray wants it: one thread that loads and unloads, one that moves parameters, three for control,
    of which one may wait for the end of loading."""
    return ray.remote(concurrency_groups={"control": 3, "transfers": 1})(DeviceActor)  # type: ignore[call-overload]
