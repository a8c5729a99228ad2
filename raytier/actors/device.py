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
    from raytier.execution.model_runner import ModelRunner, Modules

#: Models that may be read at the same time; further ones are, and nobody waits for their end until one of these has.
_MOST_LOADING = 4


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
class HostedModel:
    """What a model that is awake has on a device. Sizes in bytes.

    Attributes:
        held_bytes: of the device's budget: resident, ring, KV and activations.
        host_bytes, kv_host_bytes: of the node's host pool, for its parameters and for its KV.
        reads_queued: read requests, nearly all of them prefetches, that wait for a thread.
        bytes_loaded, bytes_to_load: of what is to be in memory, what has been read.
    """

    resident_bytes: int
    host_bytes: int
    kv_host_bytes: int
    ring_bytes: int
    kv_bytes: int
    held_bytes: int
    bytes_read: int
    reads_queued: int
    bytes_loaded: int
    bytes_to_load: int


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """What a device holds and has done. Sizes in bytes, times in seconds.

    Attributes:
        models: what is awake. asleep: models whose modules are kept, without weights.
    """

    name: str
    pid: int
    device: str
    threads: int
    models: dict[str, HostedModel]
    asleep: tuple[str, ...]
    max_rss_bytes: int
    steps: int
    busy_s: float

    def total(self, field: str) -> int:
        """The sum of a field over the models that are awake."""
        return sum(getattr(model, field) for model in self.models.values())

    @property
    def resident_bytes(self) -> int:
        return self.total("resident_bytes")

    @property
    def host_bytes(self) -> int:
        return self.total("host_bytes")

    @property
    def kv_host_bytes(self) -> int:
        return self.total("kv_host_bytes")

    @property
    def ring_bytes(self) -> int:
        return self.total("ring_bytes")

    @property
    def kv_bytes(self) -> int:
        return self.total("kv_bytes")

    @property
    def bytes_read(self) -> int:
        return self.total("bytes_read")

    @property
    def reads_queued(self) -> int:
        return self.total("reads_queued")


@dataclass(slots=True)
class _Hosted:
    """A model on a device: awake with a runner, or asleep with the modules of its last one."""

    modules: Modules
    manifest: ModelManifest
    runner: ModelRunner | None
    began: float = 0.0
    last: tuple[int, int] = (-1, 0)


class DeviceActor:
    """Runs steps of its models, sent to `address`; engines whose steps wait take turns. One message per step: a step
    number that does not follow the last one of its model is refused.

    Models have memory of their own, ring and readers included: what one has prefetched is the beginning of its next
    sweep, and stays while others compute. Together they stay within the device's budget: what one may take is that
    less what the others hold.
    """

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
        self._hosted: dict[str, _Hosted] = {}
        self._capacity = 0
        self._arena: Arena | None = None
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
        kept: Mapping[str, ArenaGrant] | None = None,
    ) -> float:
        """Load `plan`'s share of a model, or wake it; returns the seconds until steps may run, before all is read.

        Args:
            grants: ranges of the host pool, one per host-tier parameter.
            copies: where the parameters lie that are on the ramdisk or in directories of the disk tier.
            lower: what KV goes to below the device. kv_grant: range of the host pool for it; None: memory of its own.
            kept: ranges of the host pool with copies of parameters, to be used in place of reading them.

        Raises:
            CheckpointError: a file changed or ends early. UnsupportedModelError: see the message.
        """
        from raytier.execution.model_runner import ModelRunner, build
        from raytier.execution.threads import num_threads

        asleep = self._hosted.get(model_id)
        if asleep is not None and asleep.runner is not None:
            raise RuntimeError(f"{self._name} holds {model_id} already")
        began = time.perf_counter()
        if asleep is not None and asleep.manifest == manifest:
            modules = asleep.modules
        else:
            with num_threads(1):  # beside the steps of others
                modules = build(manifest, self._device)
        others = self._held()
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
            model=modules,
            kept=self._views(kept or {}),
        )
        try:
            runner = self._compute.call(load)
        except BaseException:
            self._hosted.pop(model_id, None)
            self._give_back()
            raise
        self._hosted[model_id] = _Hosted(modules, manifest, runner, began)
        self._capacity = plan.devices[0].budget_bytes + others
        self._share_out()
        return time.perf_counter() - began

    @ray.method(concurrency_group="loading")
    def loaded(self, model_id: str) -> float:
        """Wait until all that stays in memory has been read; seconds since loading began.

        Raises:
            CheckpointError, TierError: reading failed.
        """
        self._running(model_id).wait_loaded()
        return time.perf_counter() - self._hosted[model_id].began

    @ray.method(concurrency_group="control")
    def keepable(self, model_id: str) -> dict[str, int]:
        """Parameters, and their bytes, that `sleep` can leave copies of; see `ModelRunner.keepable`."""
        return self._running(model_id).keepable()

    def sleep(self, model_id: str, grants: Mapping[str, ArenaGrant]) -> None:
        """Free all memory of a model but for its modules. Its steps and moves have ended.

        Args:
            grants: ranges of the host pool to which parameters are copied before that (`keepable`).
        """
        runner = self._running(model_id)
        runner.keep(self._views(grants))
        self._hosted[model_id].runner = None
        self._end(runner)

    @ray.method(concurrency_group="control")
    def kept_kv(self, model_id: str) -> list[list[tuple[int, bytes]]]:
        """Per KV cache group (slot, hash) of the blocks that are on disk from before."""
        return self._running(model_id).kept_kv()

    def unload(self, model_id: str) -> None:
        """Free everything of the model, awake or asleep. Its steps have ended; a move that runs fails."""
        hosted = self._hosted.pop(model_id, None)
        if hosted is not None and hosted.runner is not None:
            runner, hosted.runner = hosted.runner, None
            self._end(runner)
        del hosted
        self._give_back()

    def _end(self, runner: ModelRunner) -> None:
        self._compute.call(runner.close)
        del runner
        self._give_back()
        self._share_out()

    def _held(self) -> int:
        """Bytes of the device's budget that its models take."""
        return sum(hosted.runner.held_bytes for hosted in list(self._hosted.values()) if hosted.runner is not None)

    def _share_out(self) -> None:
        """Let every model know what the others leave."""
        held = self._held()
        for hosted in list(self._hosted.values()):
            if (runner := hosted.runner) is not None:
                runner.budget_bytes = self._capacity - held + runner.held_bytes

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
        self._share_out()
        moved = sum(p.nbytes for p in runner.parameters() if p.name in sources)
        return MoveResult(moved, time.perf_counter() - began, sources)

    @ray.method(concurrency_group="control")
    def layers(self, model_id: str) -> tuple[ParameterStatus, ...]:
        """Where every parameter of a model is now; none where it is not loaded, or asleep."""
        hosted = self._hosted.get(model_id)
        runner = hosted.runner if hosted is not None else None
        return runner.parameters() if runner is not None else ()

    def _running(self, model_id: str) -> ModelRunner:
        hosted = self._hosted.get(model_id)
        if hosted is None or hosted.runner is None:
            awake = ", ".join(name for name, each in self._hosted.items() if each.runner is not None)
            raise InvalidRequestError(f"{self._name} holds {awake or 'no model'}, not {model_id}", param="model")
        return hosted.runner

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
        if self._arena is not None and not any(hosted.runner for hosted in self._hosted.values()):
            self._arena.close()
            self._arena = None
        _trim()

    @ray.method(concurrency_group="control")
    def address(self) -> Address:
        """Where an engine of this machine sends its steps (`StepConnection`)."""
        return self._compute.address

    def _step(self, batch: StepBatch) -> StepResult:
        """Run one step of a model."""
        runner, hosted = self._running(batch.model_id), self._hosted[batch.model_id]
        epoch, last = hosted.last
        if batch.epoch < epoch or batch.step != (last + 1 if batch.epoch == epoch else 1):
            raise RuntimeError(f"step {batch.epoch}.{batch.step} does not follow {epoch}.{last}: each is sent once")
        hosted.last = (batch.epoch, batch.step)
        result = runner.step(batch)
        self._steps += 1
        self._busy_s += result.stats.wall_s
        return result

    @ray.method(concurrency_group="control")
    def ping(self) -> str:
        return self._name

    @ray.method(concurrency_group="control")
    def status(self) -> DeviceStatus:
        hosted = dict(self._hosted)
        return DeviceStatus(
            name=self._name,
            pid=os.getpid(),
            device=self._device,
            threads=self._threads,
            models={name: _status(each.runner) for name, each in hosted.items() if each.runner is not None},
            asleep=tuple(name for name, each in hosted.items() if each.runner is None),
            max_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            steps=self._steps,
            busy_s=self._busy_s,
        )


def _status(runner: ModelRunner) -> HostedModel:
    memory = runner.memory()
    loaded, to_load = runner.progress
    return HostedModel(
        resident_bytes=memory["resident"],
        host_bytes=memory["host"],
        kv_host_bytes=memory["kv_host"],
        ring_bytes=memory["ring"],
        kv_bytes=memory["kv"],
        held_bytes=runner.held_bytes,
        bytes_read=runner.bytes_read,
        reads_queued=runner.reads_queued,
        bytes_loaded=loaded,
        bytes_to_load=to_load,
    )


def _trim() -> None:
    """Let the system have what is not used any more."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def remote_device_actor() -> Any:
    """The actor class as Ray wants it: one thread that loads, unloads and puts to sleep, one that moves parameters, two
    for control, and one for each model whose end of loading is waited for."""
    groups = {"control": 2, "transfers": 1, "loading": _MOST_LOADING}
    return ray.remote(concurrency_groups=groups)(DeviceActor)  # type: ignore[call-overload]
