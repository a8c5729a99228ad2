"""A model on the actors of a node: the order in which it comes up there, and in which it goes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from ray.exceptions import RayActorError

from raytier.actors.device import ArenaGrant
from raytier.actors.executor import RemoteExecutor, StepReporter, answer_of, cause_of
from raytier.actors.places import FilePlace, HostPlace, Place
from raytier.actors.transfers import ParameterMover, TransferManager
from raytier.checkpoint.manifest import ModelDescription, ModelManifest
from raytier.config import MIB, AppConfig
from raytier.engine.engine import Engine, EngineConfig
from raytier.engine.tokenizer import Tokenizer
from raytier.errors import EngineDeadError, RaytierError
from raytier.hardware.inventory import take_inventory
from raytier.hardware.rates import Rates
from raytier.kv.cache import KVCache
from raytier.kv.ledger import GroupShape
from raytier.planner.budgets import DeviceKind, disk_directories, planned_paths, ramdisk_directory
from raytier.planner.placement import plan_weights
from raytier.planner.plan import FILE_TIERS, Tier, TierSchemes, WeightPlan
from raytier.tiers.aligned import ALIGNMENT
from raytier.tiers.copies import TierCopy

logger = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 120.0
_LOAD_TIMEOUT_S = 3600.0
#: How often a model that is being unloaded looks whether its requests have ended.
_DRAIN_S = 0.02


class NodeActors:
    """Handles of the actors of a node; without one of the ramdisk where there is none.

    Attributes:
        kind: what the device is. host_bytes: capacity of the host pool.
    """

    def __init__(self, kind: DeviceKind, host_bytes: int, handles: Mapping[str, Any]) -> None:
        self.kind = kind
        self.host_bytes = host_bytes
        self.device, self.host, self.disk, self.kv = (handles[role] for role in ("device", "host", "disk", "kv"))
        self.ramdisk = handles.get("ramdisk")
        self._rates: dict[str, Rates] = {}

    def rates(self, config: AppConfig, manifest: ModelManifest) -> Rates:
        """Rates for a model: measured once in the life of these actors, if they are not in the cache."""
        if (known := self._rates.get(manifest.compute_dtype)) is not None:
            return known
        largest = max(manifest.files, key=lambda file: file.size).path
        asked = self.device.rates.remote(
            largest, manifest.compute_dtype, config.cache_dir, disk_directories(config), ramdisk_directory(config)
        )
        rates: Rates = answer_of(asked, _CALL_TIMEOUT_S)
        self.disk.calibrate.remote(rates.disk_read_bytes_per_s)
        if self.ramdisk is not None and rates.ramdisk_read_bytes_per_s is not None:
            self.ramdisk.calibrate.remote(rates.ramdisk_read_bytes_per_s)
        self._rates[manifest.compute_dtype] = rates
        return rates


class LoadedModel:
    """What a model has on the actors, and its engine. Made by `load`; `unload` frees everything.

    Attributes:
        rates: of the node, by which `plan` was made.
        began: when loading began (`time.monotonic`).
        engine: runs from `load` on.
        mover: moves its parameters while the engine runs.
    """

    def __init__(
        self,
        actors: NodeActors,
        transfers: TransferManager,
        description: ModelDescription,
        model_id: str,
        config: AppConfig,
        rates: Rates,
        plan: WeightPlan,
        began: float,
    ) -> None:
        self._actors = actors
        self._transfers = transfers
        self._config = config
        self.description = description
        self.model_id = model_id
        self.rates = rates
        self.plan = plan
        self.began = began
        self._unloading = False
        self._loading: Any = None  # what `device.load` will answer
        self._executor: RemoteExecutor | None = None
        self._engine: Engine | None = None
        self._places = _places(actors, model_id, description.manifest, config, plan.schemes)
        self.mover = ParameterMover(
            model_id,
            description.manifest,
            plan.tier_of,
            lambda order: answer_of(actors.device.move.remote(model_id, order)),
            self._places,
            file_tiers=[tier for tier in FILE_TIERS if getattr(config.tiers, tier).enabled],
            kind=actors.kind,
            index=plan.devices[0].index,
        )

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "`load` returns no model without an engine"
        return self._engine

    @classmethod
    def load(
        cls, actors: NodeActors, transfers: TransferManager, config: AppConfig, description: ModelDescription
    ) -> LoadedModel:
        """Plan with what the node has now, load, and start the engine; the rest is read behind its first steps.

        Raises:
            BudgetError, CheckpointError, ResourceNotAvailableError, ...: as the message says; nothing is held then.
            RayActorError: an actor is gone.
        """
        began = time.monotonic()
        config, manifest, model_id = description.configure(config), description.manifest, config.model.model_id
        answer_of(actors.disk.open_model.remote(manifest), _CALL_TIMEOUT_S)
        rates = actors.rates(config, manifest)
        inventory = take_inventory(planned_paths(config, manifest.model_dir))
        usable = _within(config, actors.host_bytes, manifest)
        plan = plan_weights(manifest, inventory, rates, usable, kind=actors.kind, started="all")
        for warning in plan.warnings:
            logger.warning("plan: %s", warning)
        model = cls(actors, transfers, description, model_id, config, rates, plan, began)
        with ExitStack() as undo:
            undo.callback(model._free)
            model._start()
            undo.pop_all()
        return model

    def _start(self) -> None:
        actors, plan, config, manifest = self._actors, self.plan, self._config, self.description.manifest
        share = plan.devices[0]
        windows = manifest.kv_windows
        shapes = [
            GroupShape(share.kv_blocks, share.block_size * manifest.kv_group_token_bytes(window)) for window in windows
        ]
        opening = actors.kv.open.remote(shapes, share.block_size)
        grants: dict[str, ArenaGrant] = {}
        copies: dict[str, TierCopy] = {}
        for place in self._places.values():
            names = [placement.name for placement in plan.placements if placement.tier is place.tier]
            if names:
                room = place.obtain(names)
                grants |= room.grants
                copies |= room.copies
        nvme = config.tiers.nvme
        self._loading = actors.device.load.remote(
            self.model_id,
            manifest,
            plan,
            grants,
            copies,
            nvme.io_threads,
            int(nvme.io_mb * MIB),
            self.description.tokenizer,
        )
        tokenizer = Tokenizer(self.description.tokenizer)  # while the device is busy
        answer_of(opening, _CALL_TIMEOUT_S)
        epoch = time.time_ns()
        kv = KVCache.of(manifest, share.block_size, config.kv)
        for group, (shape, pool) in enumerate(zip(shapes, kv.pools, strict=True)):
            # Block 0 is the null block: it is never leased.
            leasing = actors.kv.lease.remote(self.model_id, epoch, shape.num_blocks - 1, group)
            for extent in answer_of(leasing, _CALL_TIMEOUT_S):
                pool.add_extent(extent.start, extent.count)
        answer_of(self._loading, _LOAD_TIMEOUT_S)
        self._executor = RemoteExecutor(actors.device)
        self._engine = Engine(
            model_id=self.model_id,
            executor=self._executor,
            tokenizer=tokenizer,
            kv=kv,
            defaults=self.description.defaults,
            config=EngineConfig(
                config.scheduler,
                share.max_num_batched_tokens,
                share.max_mixed_tokens,
                manifest.max_context,
                manifest.vocab_size,
                epoch,
            ),
            on_step=StepReporter(self.model_id, actors.kv, actors.disk, actors.ramdisk),
        )
        self._transfers.attach(self.mover)
        logger.info(
            "%s takes requests after %.2f s: %.1f MiB resident, %.1f in the host pool, %.1f on the ramdisk, "
            "%.1f streamed per step, %d KV blocks",
            self.model_id,
            time.monotonic() - self.began,
            share.resident_bytes / MIB,
            plan.host_bytes / MIB,
            plan.ramdisk_bytes / MIB,
            plan.streamed_bytes / MIB,
            share.kv_blocks,
        )

    def wait_loaded(self) -> float:
        """Wait until everything that is to be in memory is there; seconds since loading began.

        What goes wrong ends the engine, whose requests get it as their error, and is raised.
        """
        try:
            answer_of(self._actors.device.loaded.remote())
            return time.monotonic() - self.began
        except RayActorError as error:
            failure: Exception = EngineDeadError(f"the DeviceActor died: {cause_of(error)}")
        except Exception as error:
            failure = error
        if not self._unloading:
            reason = failure.message if isinstance(failure, RaytierError) else repr(failure)
            self.engine.close(f"{self.model_id} could not be read: {reason}")
        raise failure from None

    def unload(self, cancel: threading.Event) -> None:
        """Let requests end, or end them once `cancel` is set; then free everything that the model has.

        Raises:
            EngineDeadError: an actor is gone, so what it held went with it.
        """
        self._unloading = True
        while self._busy() and not cancel.wait(_DRAIN_S):
            pass
        self.engine.close(f"{self.model_id} was unloaded")
        gone = self._free()
        if gone:
            raise EngineDeadError(f"while {self.model_id} was unloaded: {'; '.join(gone)}")

    def _busy(self) -> bool:
        stats = self.engine.stats()
        return stats.dead is None and bool(stats.running or stats.waiting)

    def _free(self) -> list[str]:
        """Give back everything that may be held; what could not be, and why."""
        failures: list[str] = []

        def attempt(free: Callable[[], object]) -> None:
            try:
                free()
            except RayActorError as error:
                failures.append(f"an actor is gone: {cause_of(error)}")
            except Exception as error:
                logger.exception("part of %s was not freed", self.model_id)
                failures.append(str(error))

        self._transfers.detach(self.model_id, f"{self.model_id} was unloaded")
        if self._executor is not None:
            self._executor.close()
        attempt(self._unload_device)
        self._transfers.settle(self.model_id)  # a move that ran has given back what it had obtained
        for place in self._places.values():
            attempt(place.give_back)
        attempt(lambda: answer_of(self._actors.kv.close.remote(), _CALL_TIMEOUT_S))
        return failures

    def _unload_device(self) -> None:
        loading, self._loading = self._loading, None
        if loading is None:
            return
        try:
            answer_of(loading, _LOAD_TIMEOUT_S)
        except RayActorError:
            raise
        except Exception:
            return  # it failed, and left nothing
        answer_of(self._actors.device.unload.remote(self.model_id), _CALL_TIMEOUT_S)


def _places(
    actors: NodeActors, model_id: str, manifest: ModelManifest, config: AppConfig, schemes: TierSchemes
) -> dict[Tier, Place]:
    """Tiers outside of the device in which room has to be obtained."""
    places: dict[Tier, Place] = {Tier.HOST: HostPlace(actors.host, model_id, manifest, schemes)}
    if actors.ramdisk is not None:
        ramdisk = schemes.by_tier.get(Tier.RAMDISK, {})
        places[Tier.RAMDISK] = FilePlace(Tier.RAMDISK, actors.ramdisk, model_id, manifest, ramdisk)
    if disk_directories(config):
        in_place, nvme = not config.tiers.nvme.paths, schemes.by_tier.get(Tier.NVME, {})
        places[Tier.NVME] = FilePlace(Tier.NVME, actors.disk, model_id, manifest, nvme, in_place=in_place)
    return places


def _within(config: AppConfig, host_bytes: int, manifest: ModelManifest) -> AppConfig:
    """`config` with no more host memory than the pool has, every parameter's range being rounded up to whole blocks."""
    usable = max(0, host_bytes - ALIGNMENT * len(manifest.parameters)) / MIB
    configured = config.tiers.host.max_mb
    host = config.tiers.host.model_copy(update={"max_mb": usable if configured is None else min(usable, configured)})
    return config.model_copy(update={"tiers": config.tiers.model_copy(update={"host": host})})
