"""A model on the actors of a node: the order in which it comes up there, sleeps, wakes and goes."""

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
from raytier.actors.node import CALL_TIMEOUT_S, NodeActors
from raytier.actors.places import FilePlace, HostPlace, Place
from raytier.actors.transfers import ParameterMover, TransferManager
from raytier.checkpoint.manifest import ModelDescription, ModelManifest
from raytier.config import MIB, AppConfig
from raytier.engine.config import EngineConfig
from raytier.engine.engine import Engine
from raytier.engine.kv_setup import attach_lower, host_bytes, lower_shape
from raytier.engine.tokenizer import Tokenizer
from raytier.errors import EngineDeadError, RaytierError
from raytier.kv.cache import KVCache
from raytier.kv.ledger import GroupShape
from raytier.planner.budgets import disk_directories, store_directories
from raytier.planner.plan import FILE_TIERS, Tier, TierSchemes, WeightPlan
from raytier.tiers.copies import TierCopy

logger = logging.getLogger(__name__)

_LOAD_TIMEOUT_S = 3600.0
#: Under that name KV has its range of the host pool; no parameter is called so.
_KV_OWNER = "KV blocks"
#: How often a model that is being unloaded looks whether its requests have ended.
_DRAIN_S = 0.02


class LoadedModel:
    """What a model has on the actors, and its engine. Made by `load`; `unload` frees everything.

    Asleep it has no engine, no KV and nothing on the device but its modules; the host pool keeps copies of its
    parameters as long as nobody else needs the room.

    Attributes:
        rates: of the node, by which `plan` was made.
        plan: by which it was loaded, or woken, last.
        began: when that began (`time.monotonic`).
        awake: it has an engine.
        mover: moves its parameters while the engine runs.
    """

    def __init__(
        self,
        actors: NodeActors,
        transfers: TransferManager,
        model_id: str,
        description: ModelDescription,
        plan: WeightPlan,
    ) -> None:
        self._actors = actors
        self._transfers = transfers
        self.model_id = model_id
        self.description = description
        self._config = description.configure(actors.config)
        self.rates, self.plan = actors.rates(description.manifest), plan
        self.began = time.monotonic()
        self.awake = False
        self._unloading = False
        self._loading: Any = None  # what `device.load` will answer
        self._stored: dict[Tier, dict[str, TierCopy]] = {}  # copies that it has in files of tiers
        self._executor: RemoteExecutor | None = None
        self._engine: Engine | None = None
        self._tokenizer: Tokenizer | None = None
        self._places: dict[Tier, Place] = {}
        self.mover = self._new_mover()

    def _new_mover(self) -> ParameterMover:
        actors, model_id, config = self._actors, self.model_id, self._config
        self._places = _places(actors, model_id, self.description.manifest, config, self.plan.schemes)
        return ParameterMover(
            model_id,
            self.description.manifest,
            self.plan.tier_of,
            lambda order: answer_of(actors.device.move.remote(model_id, order)),
            self._places,
            schemes=self.plan.schemes,
            on_rounding=self._weights_changed,
            file_tiers=[tier for tier in FILE_TIERS if getattr(config.tiers, tier).enabled],
            kind=actors.kind,
            index=self.plan.devices[0].index,
        )

    def _weights_changed(self) -> None:
        engine = self._engine
        if engine is not None:  # else its blocks are gone with it
            engine.clear_prefix_cache()

    @property
    def engine(self) -> Engine:
        assert self._engine is not None, "`load` returns no model without an engine"
        return self._engine

    @classmethod
    def load(
        cls,
        actors: NodeActors,
        transfers: TransferManager,
        model_id: str,
        description: ModelDescription,
        plan: WeightPlan | None = None,
    ) -> LoadedModel:
        """Plan with what the node has left now (where there is no plan yet), load, and start the engine; the rest is
        read behind its first steps.

        Raises:
            BudgetError, CheckpointError, ResourceNotAvailableError, ...: as the message says; nothing is held then.
            RayActorError: an actor is gone.
        """
        answer_of(actors.disk.open_model.remote(description.manifest), CALL_TIMEOUT_S)
        plan = actors.plan(model_id, description) if plan is None else plan
        model = cls(actors, transfers, model_id, description, plan)
        with ExitStack() as undo:
            undo.callback(model._free)
            model._start({})
            undo.pop_all()
        return model

    def wake(self, plan: WeightPlan | None = None) -> None:
        """Load again what `sleep` has given up, from copies in the host pool as far as there are any.

        Raises:
            BudgetError, CheckpointError, ResourceNotAvailableError, ...: as `load`; nothing of the model is held then.
        """
        actors, manifest = self._actors, self.description.manifest
        self.began = time.monotonic()
        with ExitStack() as undo:
            undo.callback(self._free)
            answer_of(actors.disk.open_model.remote(manifest), CALL_TIMEOUT_S)
            self.plan = actors.plan(self.model_id, self.description) if plan is None else plan
            self.mover = self._new_mover()
            kept = answer_of(actors.host.kept.remote(self.model_id), CALL_TIMEOUT_S)
            self._start({name: grant for name, grant in kept.items() if self._suits(name, grant)})
            undo.pop_all()

    def _suits(self, name: str, copy: ArenaGrant) -> bool:
        """Whether the copy of a parameter can be what the plan has of it."""
        tier, plain = self.plan.tier_of[name], copy.nbytes == self.description.manifest.by_name[name].nbytes
        if tier is Tier.HOST:
            return plain and self.plan.schemes.of(name, tier).plain
        return tier is Tier.DEVICE and (plain or self.plan.schemes.of(name, tier).form is not None)

    def _start(self, kept: Mapping[str, ArenaGrant]) -> None:
        actors, plan, config, manifest = self._actors, self.plan, self._config, self.description.manifest
        for warning in plan.warnings:
            logger.warning("plan of %s: %s", self.model_id, warning)
        self._unloading = False
        share = plan.devices[0]
        shapes = [
            GroupShape(share.kv_blocks, share.block_size * manifest.kv_group_token_bytes(window))
            for window in manifest.kv_windows
        ]
        opening = actors.kv.open.remote(self.model_id, shapes, share.block_size)
        if store := store_directories(config):
            answer_of(actors.disk.open_store.remote(store), CALL_TIMEOUT_S)
        grants, copies = self._obtain()
        kv = KVCache.of(manifest, share.block_size, config.kv)
        lower = lower_shape(manifest, plan, config, kv)
        kv_grant = None
        if lower is not None and not plan.kv_below.private:
            kv_grant = self._reserve_kv(host_bytes(lower))
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
            lower,
            kv_grant,
            kept,
        )
        if self._tokenizer is None:
            self._tokenizer = Tokenizer(self.description.tokenizer)  # while the device is busy
        answer_of(opening, CALL_TIMEOUT_S)
        epoch = time.time_ns()
        for group, (shape, pool) in enumerate(zip(shapes, kv.pools, strict=True)):
            # Block 0 is the null block: it is never leased.
            leasing = actors.kv.lease.remote(self.model_id, epoch, shape.num_blocks - 1, group)
            for extent in answer_of(leasing, CALL_TIMEOUT_S):
                pool.add_extent(extent.start, extent.count)
        answer_of(self._loading, _LOAD_TIMEOUT_S)
        if lower is not None:
            on_disk = answer_of(actors.device.kept_kv.remote(self.model_id), CALL_TIMEOUT_S)
            attach_lower(kv, lower, on_disk, plan, self.rates, config)
        self._executor = RemoteExecutor(actors.device)
        self._engine = Engine(
            model_id=self.model_id,
            executor=self._executor,
            tokenizer=self._tokenizer,
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
        self.awake = True
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

    def _obtain(self) -> tuple[dict[str, ArenaGrant], dict[str, TierCopy]]:
        """Room in the tiers outside of the device by the plan; copies in files from before are used where they suit."""
        grants: dict[str, ArenaGrant] = {}
        copies: dict[str, TierCopy] = {}
        for tier, place in self._places.items():
            names = [placement.name for placement in self.plan.placements if placement.tier is tier]
            stored = self._stored.get(tier, {})
            if stale := [name for name in stored if name not in names]:
                place.give_back(stale)
            copies |= {name: copy for name, copy in stored.items() if name in names}
            if missing := [name for name in names if name not in stored]:
                room = place.obtain(missing)
                grants |= room.grants
                copies |= room.copies
        self._stored = {
            tier: {name: copy for name, copy in copies.items() if self.plan.tier_of[name] is tier}
            for tier in FILE_TIERS
        }
        return grants, copies

    def _reserve_kv(self, nbytes: int) -> ArenaGrant:
        """A range of the host pool, given back with those of the parameters."""
        grants = answer_of(self._actors.host.reserve.remote(self.model_id, {_KV_OWNER: nbytes}), CALL_TIMEOUT_S)
        grant: ArenaGrant = grants[_KV_OWNER]
        return grant

    def wait_loaded(self) -> float:
        """Wait until everything that is to be in memory is there; seconds since loading began.

        What goes wrong ends the engine, whose requests get it as their error, and is raised.
        """
        try:
            answer_of(self._actors.device.loaded.remote(self.model_id))
            return time.monotonic() - self.began
        except RayActorError as error:
            failure: Exception = EngineDeadError(f"the DeviceActor died: {cause_of(error)}")
        except Exception as error:
            failure = error
        finally:
            self._actors.host.unpin.remote(self.model_id)
        if not self._unloading:
            reason = failure.message if isinstance(failure, RaytierError) else repr(failure)
            self.engine.close(f"{self.model_id} could not be read: {reason}")
        raise failure from None

    def sleep(self, cancel: threading.Event) -> None:
        """Let requests end, or end them once `cancel` is set; then give up the device, and leave copies in the host
        pool as far as there is room.

        Raises:
            EngineDeadError, ModelLoadingError, ...: it cannot be done; everything of the model is freed then.
        """
        began = time.monotonic()
        actors, model_id = self._actors, self.model_id
        with ExitStack() as undo:
            undo.callback(self._free)
            self.wait_loaded()
            self._end_engine(cancel, f"{model_id} was put to sleep")
            self._transfers.settle(model_id)
            sizes: dict[str, int] = answer_of(actors.device.keepable.remote(model_id), CALL_TIMEOUT_S)
            known = answer_of(actors.host.kept.remote(model_id), CALL_TIMEOUT_S)
            on_host = {
                p.name: p.nbytes
                for p in self.description.manifest.parameters
                if self.mover.tier_of[p.name] is Tier.HOST and self.plan.schemes.of(p.name, Tier.HOST).plain
            }
            keeping = actors.host.keep.remote(model_id, on_host | sizes)
            grants: dict[str, ArenaGrant] = answer_of(keeping, CALL_TIMEOUT_S)
            # What it holds in another form there is made anew.
            held = [name for name, tier in self.mover.tier_of.items() if tier is Tier.HOST and name not in on_host]
            self._places[Tier.HOST].give_back(held)
            new = {name: grant for name, grant in grants.items() if name in sizes and name not in known}
            answer_of(actors.device.sleep.remote(model_id, new), _LOAD_TIMEOUT_S)
            self._places[Tier.HOST].give_back([_KV_OWNER])
            answer_of(actors.host.unpin.remote(model_id), CALL_TIMEOUT_S)
            answer_of(actors.kv.close.remote(model_id), CALL_TIMEOUT_S)
            undo.pop_all()
        kept = sum(grant.nbytes for grant in grants.values())
        logger.info(
            "%s sleeps after %.2f s: %.1f MiB of it are kept in the host pool",
            model_id,
            time.monotonic() - began,
            kept / MIB,
        )

    def unload(self, cancel: threading.Event) -> None:
        """Let requests end, or end them once `cancel` is set; then free everything that the model has.

        Raises:
            EngineDeadError: an actor is gone, so what it held went with it.
        """
        self._end_engine(cancel, f"{self.model_id} was unloaded")
        gone = self._free()
        if gone:
            raise EngineDeadError(f"while {self.model_id} was unloaded: {'; '.join(gone)}")

    def _end_engine(self, cancel: threading.Event, why: str) -> None:
        self._unloading = True
        while self._busy() and not cancel.wait(_DRAIN_S):
            pass
        self._transfers.detach(self.model_id, why)
        if self._engine is not None:
            self._engine.close(why)
        if self._executor is not None:
            self._executor.close()
        self._engine = self._executor = None
        self.awake = False

    def _busy(self) -> bool:
        if self._engine is None:
            return False
        stats = self._engine.stats()
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

        at_once = threading.Event()
        at_once.set()
        self._end_engine(at_once, f"{self.model_id} was unloaded")
        attempt(self._unload_device)
        self._transfers.settle(self.model_id)  # a move that ran has given back what it had obtained
        for place in self._places.values():
            attempt(place.give_back)
        self._stored = {}
        attempt(lambda: answer_of(self._actors.host.unpin.remote(self.model_id), CALL_TIMEOUT_S))
        attempt(lambda: answer_of(self._actors.kv.close.remote(self.model_id), CALL_TIMEOUT_S))
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
        answer_of(self._actors.device.unload.remote(self.model_id), CALL_TIMEOUT_S)


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
