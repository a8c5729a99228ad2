"""The actors of one node, made inside a placement group, and the order in which a model comes up in them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytier.actors.device import DeviceStatus, remote_device_actor
from raytier.actors.disk import DiskStatus, DiskTierActor
from raytier.actors.executor import RemoteExecutor, StepReporter, cause_of
from raytier.actors.host import HostPoolActor, HostStatus
from raytier.actors.kv_blocks import KVBlockActor
from raytier.actors.names import NAMESPACE, actor_name
from raytier.checkpoint.manifest import ModelDescription
from raytier.config import MIB, AppConfig
from raytier.engine.engine import Engine, EngineConfig
from raytier.engine.tokenizer import Tokenizer
from raytier.errors import EngineDeadError, ModelLoadingError, ResourceNotAvailableError
from raytier.execution.layout import host_units
from raytier.hardware.inventory import take_inventory
from raytier.hardware.rates import Rates
from raytier.kv.block_pool import BlockPool
from raytier.kv.ledger import KVStats
from raytier.planner.budgets import DeviceKind
from raytier.planner.placement import plan_weights
from raytier.planner.plan import ResourcePlan, WeightPlan

logger = logging.getLogger(__name__)

#: A name stays taken until Ray has buried the actor that had it: after a killed replica, a moment.
_NAME_TIMEOUT_S = 60.0
_START_TIMEOUT_S = 120.0
_LOAD_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """Live status of every actor of a node."""

    device: DeviceStatus
    host: HostStatus
    disk: DiskStatus
    kv: KVStats


class ActorGroup:
    """The actors of one node and the model they hold.

    Every actor is a child of the process that calls `start` and sits in its placement group, so that it
    goes when that process goes, however it goes.
    """

    def __init__(self, app: str, config: AppConfig, resources: ResourcePlan, placement_group: PlacementGroup) -> None:
        self._app = app
        self._config = config
        self._resources = resources
        self._placement_group = placement_group
        self._actors: dict[str, Any] = {}
        self.plan: WeightPlan | None = None
        self.engine: Engine | None = None

    def start(self, description: ModelDescription) -> Engine:
        """Create the actors, plan with what the node has now, load the model and start its engine.

        Blocks until the model is loaded. On any error everything made so far is ended.

        Raises:
            BudgetError, CheckpointError, UnsupportedModelError, ResourceNotAvailableError: as their message says.
        """
        try:
            return self._start(description)
        except (RayActorError, GetTimeoutError) as error:
            self.stop()
            raise ModelLoadingError(f"an actor did not come up: {cause_of(error)}") from error
        except BaseException:
            self.stop()
            raise

    def _start(self, description: ModelDescription) -> Engine:
        config, manifest = description.configure(self._config), description.manifest
        kind: DeviceKind = "cuda" if "GPU" in self._bundle("device") else "cpu"
        device = self._create("device", remote_device_actor(), kind, self._threads())
        disk = self._create("disk", ray.remote(DiskTierActor))
        self._get(disk.open_model.remote(manifest))

        largest = max(manifest.files, key=lambda file: file.size).path
        rates: Rates = self._get(device.rates.remote(largest, manifest.compute_dtype, config.cache_dir))
        disk.calibrate.remote(rates.disk_read_bytes_per_s)
        inventory = take_inventory([manifest.model_dir])
        plan = plan_weights(manifest, inventory, rates, config, kind=kind)
        self.plan = plan
        for warning in plan.warnings:
            logger.warning("plan: %s", warning)
        share = plan.devices[0]

        host_bytes = sum(unit.nbytes for unit in host_units(manifest, plan.tier_of))
        host = self._create("host", ray.remote(HostPoolActor), host_bytes)
        block_bytes = share.kv_bytes // share.kv_blocks
        kv = self._create("kv", ray.remote(KVBlockActor), share.kv_blocks, share.block_size, block_bytes)
        model_id = config.model.model_id
        arena = self._get(host.allocate.remote(model_id, host_bytes)) if host_bytes else None
        nvme = config.tiers.nvme
        loading = device.load.remote(model_id, manifest, plan, arena, nvme.io_threads, int(nvme.io_mb * MIB))
        self._get([host.ping.remote(), kv.ping.remote()])
        seconds = self._get(loading, timeout=_LOAD_TIMEOUT_S)
        logger.info(
            "loaded %s in %.1f s: %.1f MiB resident, %.1f in the host pool, %.1f streamed per step, %d KV blocks",
            model_id,
            seconds,
            share.resident_bytes / MIB,
            host_bytes / MIB,
            plan.streamed_bytes / MIB,
            share.kv_blocks,
        )

        epoch = time.time_ns()
        pool = BlockPool(share.block_size)
        # Block 0 is the null block: it is never leased.
        for extent in self._get(kv.lease.remote(model_id, epoch, share.kv_blocks - 1)):
            pool.add_extent(extent.start, extent.count)
        self.engine = Engine(
            model_id=model_id,
            executor=RemoteExecutor(device),
            tokenizer=Tokenizer(description.tokenizer),
            block_pool=pool,
            defaults=description.defaults,
            config=EngineConfig(
                config.scheduler, share.max_num_batched_tokens, manifest.max_context, manifest.vocab_size, epoch
            ),
            on_step=StepReporter(model_id, kv, disk),
        )
        return self.engine

    def status(self, timeout_s: float = 10.0) -> GroupStatus:
        """Ask every actor once; raises as `ping`."""
        roles = {"device": "status", "host": "status", "disk": "status", "kv": "stats"}
        return GroupStatus(**self._ask(roles, timeout_s))

    def ping(self, timeout_s: float = 10.0) -> None:
        """Hear from every actor.

        Raises:
            EngineDeadError: names an actor that has died.
            TimeoutError: names an actor that does not answer in time.
        """
        self._ask(dict.fromkeys(self._actors, "ping"), timeout_s)

    def _ask(self, methods: Mapping[str, str], timeout_s: float) -> dict[str, Any]:
        """Call a method of each role's actor, all at once; answers by role."""
        actors = self._actors
        if not actors:
            raise EngineDeadError(f"the actors of {self._app} have ended")
        refs = {role: getattr(actors[role], method).remote() for role, method in methods.items()}
        deadline = time.monotonic() + timeout_s
        answers = {}
        for role, ref in refs.items():
            try:
                answers[role] = ray.get(ref, timeout=max(0.0, deadline - time.monotonic()))
            except (GetTimeoutError, ActorUnavailableError):
                raise TimeoutError(f"{actor_name(self._app, role)} has not answered for {timeout_s:g} s") from None
            except RayActorError as error:
                raise EngineDeadError(f"{actor_name(self._app, role)} is gone: {cause_of(error)}") from None
        return answers

    def stop(self) -> None:
        """End the engine and every actor; a second call does nothing."""
        if self.engine is not None:
            self.engine.close()
        actors, self._actors = self._actors, {}
        for actor in actors.values():
            ray.kill(actor, no_restart=True)

    def _threads(self) -> int:
        return self._config.compute.resolve_threads(len(os.sched_getaffinity(0)))

    def _bundle(self, role: str) -> dict[str, float]:
        return self._resources.bundles[self._resources.roles.index(role)]

    def _create(self, role: str, actor_class: Any, *args: Any) -> Any:
        """Begin to create the actor of `role` in its bundle; what is asked of it first waits for that."""
        name = actor_name(self._app, role)
        bundle = self._bundle(role)
        options = {
            "name": name,
            "namespace": NAMESPACE,
            "num_cpus": bundle.get("CPU", 0),
            "num_gpus": bundle.get("GPU", 0),
            "memory": bundle.get("memory"),
            "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._placement_group, placement_group_bundle_index=self._resources.roles.index(role)
            ),
        }
        deadline = time.monotonic() + _NAME_TIMEOUT_S
        while True:
            try:
                actor = actor_class.options(**options).remote(name, *args)
                break
            except ValueError as error:
                if "already taken" not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise ResourceNotAvailableError(
                        f"the actor name {name} is taken: another application of the name {self._app!r} is running"
                    ) from None
                time.sleep(0.2)
        self._actors[role] = actor
        return actor

    def _get(self, ref: Any, timeout: float = _START_TIMEOUT_S) -> Any:
        try:
            return ray.get(ref, timeout=timeout)
        except RayTaskError as error:
            raise error.cause from None
