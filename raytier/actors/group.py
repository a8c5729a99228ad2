"""The actors of one node, made inside a placement group, and the models that they hold."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from raytier.actors.device import DeviceStatus, remote_device_actor
from raytier.actors.disk import DiskStatus, remote_disk_actor, remove_leftovers
from raytier.actors.executor import cause_of
from raytier.actors.host import HostPoolActor, HostStatus
from raytier.actors.kv_blocks import KVBlockActor
from raytier.actors.model import LoadedModel
from raytier.actors.names import NAMESPACE, actor_name
from raytier.actors.node import NodeActors
from raytier.actors.transfers import TransferManager
from raytier.checkpoint.manifest import ModelDescription
from raytier.config import AppConfig, NvmeTier, RamdiskTier
from raytier.engine.engine import Engine
from raytier.errors import EngineDeadError, ModelLoadingError, ResourceNotAvailableError
from raytier.execution.parameters import ParameterStatus
from raytier.hardware.inventory import take_inventory
from raytier.kv.ledger import KVStats
from raytier.planner.budgets import DeviceKind, disk_directories, node_budgets, planned_paths, store_directories
from raytier.planner.plan import ResourcePlan, WeightPlan

logger = logging.getLogger(__name__)

#: A name stays taken until Ray has buried the actor that had it: after a killed replica, a moment.
_NAME_TIMEOUT_S = 60.0
_START_TIMEOUT_S = 120.0
#: Removing the copies of a tier.
_CLOSE_TIMEOUT_S = 10.0
#: Of the process that computes. Memory that its threads have freed can be given back only where they share one pool of
#: it: of the pools that glibc makes for threads it keeps up to 64 MB each. Threads that compute spin for some two
#: milliseconds: enough from one operation to the next; libgomp's default of ten times that takes a core from reading.
_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1", "GOMP_SPINCOUNT": "30000"}
_STATUS_METHODS = {"device": "status", "host": "status", "disk": "status", "ramdisk": "status", "kv": "stats"}


@dataclass(frozen=True, slots=True)
class GroupStatus:
    """Live status of the actors of a node; None for one that is not there, as most are before the first model.

    `kv`: by model, of those that are loaded and awake.
    """

    device: DeviceStatus | None = None
    host: HostStatus | None = None
    disk: DiskStatus | None = None
    ramdisk: DiskStatus | None = None
    kv: Mapping[str, KVStats] = field(default_factory=dict)


class ActorGroup:
    """The actors of one node. They live until `stop`, models come and go.

    Every actor is a child of the process that calls `start` and sits in its placement group, so that it
    goes when that process goes, however it goes.

    Attributes:
        kind: what the device is.
        pids: process of each actor that has come up, by role.
        transfers: what moves, or waits to, of the models.
        models: what is loaded now, by id; some of it may be asleep.
    """

    def __init__(self, app: str, config: AppConfig, resources: ResourcePlan, placement_group: PlacementGroup) -> None:
        self._app = app
        self._config = config
        self._resources = resources
        self._placement_group = placement_group
        self._actors: dict[str, Any] = {}
        self._node: NodeActors | None = None  # once all actors are there
        self._stopped = False
        self.kind: DeviceKind = "cuda" if "GPU" in self._bundle("device") else "cpu"
        self.pids: dict[str, int] = {}
        self.transfers = TransferManager()
        self.models: dict[str, LoadedModel] = {}

    def start(self, *, with_model: bool) -> None:
        """Create the actors.

        Args:
            with_model: all of them, because a model comes next. Else only owners of directories, which may not be to be
                had: the others are not needed before the first model, and their processes take memory.

        Raises:
            ResourceNotAvailableError, ModelLoadingError: as the message says; nothing made so far is left.
        """
        try:
            self._create_missing(with_model=with_model)
        except BaseException:
            self.stop()
            raise

    def load_model(self, model_id: str, description: ModelDescription, plan: WeightPlan | None = None) -> Engine:
        """Load a model, or wake it, and return its engine, which runs; blocks until it can take requests.

        Args:
            plan: from `plan_model`, when all of `without` are asleep; None: it is planned here.

        Raises:
            BudgetError, CheckpointError, ResourceNotAvailableError, ...: as the message says; nothing of it is held.
            ModelLoadingError: an actor is gone or does not answer.
        """
        model = self.models.get(model_id)
        if model is not None and model.awake:
            raise RuntimeError(f"{model_id} is loaded already")
        self._create_missing(with_model=True)
        assert self._node is not None
        try:
            if model is not None and model.description is description:
                try:
                    model.wake(plan)
                except BaseException:
                    del self.models[model_id]
                    raise
            else:
                if model is not None:  # its files have changed while it slept
                    self.unload_model(model_id, threading.Event())
                model = LoadedModel.load(self._node, self.transfers, model_id, description, plan)
                self.models[model_id] = model
        except (RayActorError, GetTimeoutError) as error:
            raise ModelLoadingError(f"an actor is gone or does not answer: {cause_of(error)}") from error
        return model.engine

    def plan_model(self, model_id: str, description: ModelDescription, without: Collection[str]) -> WeightPlan:
        """The plan that a model would get while the models of `without` are asleep.

        Raises:
            BudgetError: it would not fit. ModelLoadingError: an actor is gone or does not answer.
        """
        self._create_missing(with_model=True)
        assert self._node is not None
        try:
            return self._node.plan(model_id, description, without)
        except (RayActorError, GetTimeoutError) as error:
            raise ModelLoadingError(f"an actor is gone or does not answer: {cause_of(error)}") from error

    def wait_loaded(self, model_id: str) -> float:
        """Wait until all of a model is in place, see `LoadedModel.wait_loaded`."""
        return self._loaded(model_id).wait_loaded()

    def sleep_model(self, model_id: str, cancel: threading.Event) -> None:
        """Put a model to sleep, see `LoadedModel.sleep`; one for which that fails is unloaded."""
        model = self._loaded(model_id)
        try:
            model.sleep(cancel)
        except BaseException:
            del self.models[model_id]
            raise

    def unload_model(self, model_id: str, cancel: threading.Event) -> None:
        """Unload a model, awake or asleep, see `LoadedModel.unload`; the actors stay."""
        model = self._loaded(model_id)
        try:
            model.unload(cancel)
        finally:
            del self.models[model_id]

    def _loaded(self, model_id: str) -> LoadedModel:
        if model_id not in self.models:
            raise RuntimeError(f"{model_id} is not loaded in {self._app}")
        return self.models[model_id]

    def status(self, timeout_s: float = 10.0) -> GroupStatus:
        """Ask every actor once; raises as `ping`."""
        return GroupStatus(**self._ask(_STATUS_METHODS, timeout_s))

    def layers(self, model_id: str, timeout_s: float = 10.0) -> tuple[ParameterStatus, ...]:
        """Where every parameter of a model is now, in the manifest's order, none while it sleeps; raises as `ping`."""
        answers = self._ask({"device": "layers"}, timeout_s, model_id)
        parameters: tuple[ParameterStatus, ...] = answers.get("device", ())
        return parameters

    @property
    def device_budget(self) -> int | None:
        """Bytes of the device for all models; None before there is one."""
        return None if self._node is None else self._node.budgets.device_bytes

    def ping(self, timeout_s: float = 10.0) -> None:
        """Hear from every actor.

        Raises:
            EngineDeadError: names an actor that has died.
            TimeoutError: names an actor that does not answer in time.
        """
        self._ask(dict.fromkeys(_STATUS_METHODS, "ping"), timeout_s)

    def _ask(self, methods: Mapping[str, str], timeout_s: float, *args: Any) -> dict[str, Any]:
        """Call a method of each role's actor that has come up, all at once; answers by role."""
        if self._stopped:
            raise EngineDeadError(f"the actors of {self._app} have ended")
        roles = [role for role in self.pids if role in methods]
        refs = {role: getattr(self._actors[role], methods[role]).remote(*args) for role in roles}
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
        """End the engine and every actor, and remove what they have made; a second call does nothing."""
        self._stopped = True
        actors, self._actors = self._actors, {}
        pids, self.pids = self.pids, {}
        self.transfers.close(f"{self._app} is being stopped")
        for model in list(self.models.values()):
            if model.awake:
                model.engine.close()
        owners: dict[str, NvmeTier | RamdiskTier] = {"ramdisk": self._config.tiers.ramdisk}
        if disk_directories(self._config):
            owners["disk"] = self._config.tiers.nvme
        owners = {role: section for role, section in owners.items() if role in pids}
        closing = [actors[role].close.remote() for role in owners]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_CLOSE_TIMEOUT_S)
        for actor in actors.values():
            ray.kill(actor, no_restart=True)
        for role, section in owners.items():  # had one died before, or not ended in time
            remove_leftovers(section, [pids[role]])

    def _create_missing(self, *, with_model: bool) -> None:
        """Create the actors that are not there yet, all at once, and wait until they are up.

        Raises:
            ResourceNotAvailableError, ModelLoadingError: one did not come up; none of the new ones is left.
        """
        tiers, kind = self._config.tiers, self.kind
        wanted: dict[str, tuple[Any, ...]] = {}
        if with_model and self._node is None:
            budgets = node_budgets(take_inventory(planned_paths(self._config)), self._config, kind, started="ray")
            threads = self._config.compute.resolve_threads(len(os.sched_getaffinity(0)))
            wanted["device"] = (remote_device_actor(), kind, threads, self._config.cache_dir)  # first: it takes longest
            wanted["host"] = (ray.remote(HostPoolActor), budgets.host_bytes)
            wanted["kv"] = (ray.remote(KVBlockActor),)
        if with_model or tiers.nvme.paths:
            wanted["disk"] = (remote_disk_actor(), tiers.nvme, store_directories(self._config), self._config.cache_dir)
        if tiers.ramdisk.enabled:
            wanted["ramdisk"] = (remote_disk_actor(), tiers.ramdisk, (), self._config.cache_dir)
        new = [role for role in wanted if role not in self._actors]
        try:
            for role in new:
                self._create(role, *wanted[role])
            pids = ray.get([self._actors[role].__ray_call__.remote(_pid) for role in new], timeout=_START_TIMEOUT_S)
        except BaseException as error:
            for actor in [self._actors.pop(role) for role in new if role in self._actors]:
                ray.kill(actor, no_restart=True)
            if isinstance(error, (RayActorError, GetTimeoutError)):
                raise ModelLoadingError(f"an actor did not come up: {cause_of(error)}") from error
            raise
        self.pids = self.pids | dict(zip(new, pids, strict=True))
        if with_model and self._node is None:
            self._node = NodeActors(kind, self._config, budgets, self._actors)

    def _bundle(self, role: str) -> dict[str, float]:
        return self._resources.bundles[self._resources.roles.index(role)]

    def _create(self, role: str, actor_class: Any, *args: Any) -> None:
        """Begin to create the actor of `role` in its bundle; what is asked of it first waits for that."""
        name = actor_name(self._app, role)
        place = role if role in self._resources.roles else "disk"
        bundle = self._bundle(role) if place == role else {}
        options = {
            "name": name,
            "namespace": NAMESPACE,
            "num_cpus": bundle.get("CPU", 0),
            "num_gpus": bundle.get("GPU", 0),
            "memory": bundle.get("memory"),
            "max_restarts": 0,
            "runtime_env": {"env_vars": _ENVIRONMENT} if role == "device" else None,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._placement_group, placement_group_bundle_index=self._resources.roles.index(place)
            ),
        }
        deadline = time.monotonic() + _NAME_TIMEOUT_S
        while True:
            try:
                self._actors[role] = actor_class.options(**options).remote(name, *args)
                return
            except ValueError as error:
                if "already taken" not in str(error):
                    raise
                if time.monotonic() > deadline:
                    raise ResourceNotAvailableError(
                        f"the actor name {name} is taken: another application of the name {self._app!r} is running"
                    ) from None
                time.sleep(0.2)


def _pid(_: object) -> int:
    return os.getpid()
