"""The runtime's own operations, as HTTP routes and deployment handles offer them: models, layers, transfers, plan."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

from prometheus_client.core import Metric

from raytier.actors.group import GroupStatus
from raytier.actors.names import actor_name
from raytier.actors.transfers import ParameterMover, TransferManager
from raytier.catalog.control import ModelControl
from raytier.catalog.life import Node, State, UnloadMode
from raytier.checkpoint.manifest import ModelDescription
from raytier.engine.engine import Engine
from raytier.errors import ConflictError, EngineDeadError, InvalidRequestError
from raytier.execution.parameters import ParameterStatus
from raytier.hardware.inventory import take_inventory
from raytier.hardware.rates import Rates
from raytier.planner.plan import Tier, WeightPlan
from raytier.serve import views
from raytier.serve.handles import generate
from raytier.serve.metrics import RequestMetrics, engine_families, merged
from raytier.serve.runtime_schema import (
    ActorInfo,
    GenerateAnswer,
    HardwareSummary,
    KVAnswer,
    Layer,
    LayerGroup,
    ListedModel,
    LoadProgress,
    ModelStatus,
    OperationAnswer,
    PlanAnswer,
    RegisterAnswer,
    ServerStatus,
    TransferAnswer,
    TransferStatus,
)
from raytier.serve.served import ServedModel
from raytier.sources.loader import FetchOptions
from raytier.sources.registry import parse_entry
from raytier.tiers.transfers import DEFAULT_PRIORITY

#: A status is asked for by people and by scripts that poll: better incomplete than late.
_STATUS_TIMEOUT_S = 3.0


class Loaded(Protocol):
    """What is to be known about a loaded model; `LoadedModel`, or a test's stand-in."""

    @property
    def model_id(self) -> str: ...
    @property
    def description(self) -> ModelDescription: ...
    @property
    def plan(self) -> WeightPlan: ...
    @property
    def rates(self) -> Rates: ...
    @property
    def mover(self) -> ParameterMover: ...


class RuntimeNode(Node, Protocol):
    """The node's actors; `ActorGroup`, or a test's stand-in. Methods block."""

    @property
    def pids(self) -> Mapping[str, int]: ...
    @property
    def device_budget(self) -> int | None:
        """Bytes of the device for all models; None before there is one."""
        ...

    @property
    def transfers(self) -> TransferManager: ...
    @property
    def models(self) -> Mapping[str, Loaded]: ...

    def status(self, timeout_s: float = ...) -> GroupStatus: ...

    def layers(self, model_id: str, timeout_s: float = ...) -> tuple[ParameterStatus, ...]: ...


class Runtime:
    """What can be asked and told about an application, one method per route.

    Args:
        app: name of the application.
        disk_paths: whose disks the status tells of.
        request_timeout_s: longest life of a request.
    """

    def __init__(
        self,
        app: str,
        node: RuntimeNode,
        control: ModelControl,
        disk_paths: Sequence[str] = (),
        request_timeout_s: float | None = None,
    ) -> None:
        self._app = app
        self._node = node
        self._control = control
        self._disk_paths = disk_paths
        self._timeout_s = request_timeout_s
        self._began = time.monotonic()
        self._served: dict[str, ServedModel] = {}
        control.when_gone(self._forget)
        self._requests: dict[str, RequestMetrics] = {}

    # Models

    async def load_model(
        self,
        model_name_or_path: str,
        compute_device: str = "auto",
        *,
        force_reload: bool = False,
        token: str | None = None,
    ) -> OperationAnswer:
        """Begin to load a model, or to wake it.

        Args:
            force_reload: load it anew from its files when it is loaded.
            token: for its source; never stored or logged.

        Raises:
            ModelNotFoundError, ConflictError: as their message says.
            InvalidRequestError: the application computes on another device.
        """
        model_id = self._control.resolve(model_name_or_path)
        if compute_device not in ("auto", self._node.kind):
            raise InvalidRequestError(
                f"compute_device: this application was started for {self._node.kind}, not {compute_device}; "
                "set compute.device in its configuration",
                param="compute_device",
            )
        message = self._control.load(model_id, FetchOptions(token), force_reload=force_reload)
        return await self._answer(message, model_id)

    async def wake_model(self, model: str | None = None) -> OperationAnswer:
        """Begin to wake a model that is asleep; ModelNotFoundError, ConflictError: it is not."""
        model_id = self._control.resolve(model)
        if self._control.state(model_id) not in ("sleeping", "loading", "loaded"):
            raise ConflictError(self._control.why_not(model_id))
        return await self._answer(self._control.load(model_id), model_id)

    async def sleep_model(self, model: str | None = None, mode: UnloadMode = "drain") -> OperationAnswer:
        """Put a model to sleep; returns when it is. Raises ModelNotFoundError, ConflictError."""
        model_id = self._control.resolve(model)
        return await self._answer(await self._control.sleep(model_id, mode), model_id)

    async def unload_model(self, model: str | None = None, mode: UnloadMode = "drain") -> OperationAnswer:
        """Unload a model; returns when all of it is freed. Raises ModelNotFoundError, ConflictError."""
        model_id = self._control.resolve(model)
        return await self._answer(await self._control.unload(model_id, mode), model_id)

    async def _answer(self, message: str, model_id: str) -> OperationAnswer:
        return OperationAnswer(message=message, model=await self.model_status(model_id))

    async def register_model(self, fields: Mapping[str, object], *, persist: bool = True) -> RegisterAnswer:
        """Add a model to the registry, or change what is known of one; takes effect when it is loaded next.

        Raises:
            ConfigurationError: a field is wrong, or there is no file to write to.
        """
        entry = parse_entry(fields)
        changed = await asyncio.to_thread(lambda: self._control.register(entry, persist=persist))
        return RegisterAnswer(changed=changed, model=self.listed_model(entry.model_id))

    def list_models(self) -> list[ListedModel]:
        """Every model of the registry, with its state."""
        return [self.listed_model(model_id) for model_id in self._control.registry.ids]

    def listed_model(self, model_id: str) -> ListedModel:
        """A model of the registry, with its state; ModelNotFoundError."""
        entry = self._control.registry.get(model_id)
        wanted = entry.device_preference
        return ListedModel(
            model_id=model_id,
            source_type=entry.source_type,
            status=self._control.state(model_id),
            device=self._node.kind if model_id in self._control.engines or wanted == "auto" else wanted,
            pinned=entry.pinned,
            config=entry.public(),
        )

    def state(self, model_id: str) -> State:
        """State of a model; ModelNotFoundError."""
        return self._control.state(model_id)

    async def model_status(self, model: str | None = None) -> ModelStatus:
        """State of a model; ModelNotFoundError."""
        model_id = self._control.resolve(model)
        entry, state = self._control.registry.get(model_id), self._control.state(model_id)
        loaded = self._node.models.get(model_id)
        description = loaded.description if loaded is not None else self._control.of(model_id).description
        manifest = description.manifest if description is not None else None
        return ModelStatus(
            model_name=model_id,
            model_path=entry.source_path if manifest is None else manifest.model_dir,
            architecture=None if manifest is None else manifest.architecture,
            tokenizer_name=entry.tokenizer_path or model_id,
            num_managed_layers=0 if manifest is None else len(manifest.parameters),
            compute_device=self._node.kind,
            status=state,
            progress=await self._progress(model_id) if state == "loading" else None,
            error_message=self._control.error(model_id),
        )

    async def _progress(self, model_id: str) -> LoadProgress | None:
        model = self._control.of(model_id)
        elapsed = time.monotonic() - model.began
        if model.fetched is not None:
            return views.progress_of(*model.fetched, elapsed)
        try:
            status = await asyncio.to_thread(self._node.status, _STATUS_TIMEOUT_S)
        except (EngineDeadError, TimeoutError):
            return None
        return views.progress(status, model_id, elapsed)

    async def generate_text(
        self,
        prompt: str,
        model: str | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
    ) -> GenerateAnswer:
        """Continue a raw prompt; what is None comes from the model's defaults. Raises as a completion does."""
        given = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        sampling = {name: value for name, value in given.items() if value is not None}
        async with self.using(model) as served:
            result = await generate(served, prompt, **sampling)
        return GenerateAnswer(
            prompt=prompt,
            generated_text=result.text,
            model_name=served.engine.model_id,
            tokens_generated=result.completion_tokens,
            generation_time_seconds=result.seconds,
        )

    @asynccontextmanager
    async def using(self, model: str | None = None) -> AsyncIterator[ServedModel]:
        """A model as the front sees it, which stays until the block ends; waits for one that is loading, and wakes one
        that sleeps.

        Raises:
            ModelNotFoundError, QueueFullError, ConflictError, RaytierError: as `ModelControl.use`.
        """
        async with self._control.use(model) as engine:
            served = self._served.get(engine.model_id)
            if served is None or served.engine is not engine:
                served = self._serve(engine)
            yield served

    def _serve(self, engine: Engine) -> ServedModel:
        model_id = engine.model_id
        served = ServedModel(engine, self._control.registry.get(model_id), self._timeout_s)
        engine.observe(self._requests_of(model_id).take)
        # Nothing is kept of one that was unloaded while this waited for its load.
        if self._control.running(model_id) is engine:
            self._served[model_id] = served
        return served

    def _requests_of(self, model_id: str) -> RequestMetrics:
        return self._requests.setdefault(model_id, RequestMetrics(model_id))

    def _forget(self, model_id: str) -> None:
        self._served.pop(model_id, None)

    def metrics(self) -> Iterable[Metric]:
        """What /metrics shows: requests since this replica began, and the engines as they are now."""
        engines = self._control.engines
        families: list[Metric] = []
        for model_id in self._control.registry.ids:
            engine = engines.get(model_id)
            if engine is not None or model_id in (*self._requests, self._control.registry.startup):
                families += self._requests_of(model_id).families()
            stats = None if engine is None else engine.stats()
            families += engine_families(model_id, stats, self._control.state(model_id))
        return merged(families)

    # Layers and transfers

    async def layers(self, model: str | None = None) -> list[Layer]:
        """Every parameter and where it is now. Raises ModelNotFoundError; ConflictError: the model is not loaded."""
        loaded, parameters = await self._parameters(model)
        return [views.layer(number, p, loaded.plan) for number, p in enumerate(parameters)]

    async def layer_groups(self, model: str | None = None) -> list[LayerGroup]:
        """The same summed by decoder layer, what lies outside of them last."""
        _, parameters = await self._parameters(model)
        return views.groups(parameters)

    async def layer(self, parameter: int | str, model: str | None = None) -> Layer:
        """One parameter, by its id or name; raises as `layers`, and ParameterNotFoundError."""
        loaded, parameters = await self._parameters(model)
        number = loaded.mover.parameter_id(parameter)
        return views.layer(number, parameters[number], loaded.plan)

    async def _parameters(self, model: str | None) -> tuple[Loaded, Sequence[ParameterStatus]]:
        loaded = self._loaded(model)
        parameters = await asyncio.to_thread(self._node.layers, loaded.model_id)
        if not parameters:
            raise ConflictError(f"{loaded.model_id} is not loaded any more")
        return loaded, parameters

    async def transfer_layer(
        self,
        parameter: int | str | None = None,
        destination: str = "",
        priority: int = DEFAULT_PRIORITY,
        *,
        layer_index: int | None = None,
        model: str | None = None,
    ) -> TransferAnswer:
        """Queue the move of a parameter (id or name), or of a decoder layer, to another tier.

        Args:
            destination: cpu or host, gpu:N or device:N, ramdisk, nvme.
            priority: 1 (first) to 10.

        Raises:
            ParameterNotFoundError, InvalidRequestError: what is to move, or where to, does not exist or cannot be.
            TransferQueueFullError: too many wait. ConflictError: the model is not loaded.
        """
        mover = self._loaded(model).mover
        target = mover.target(parameter, layer=layer_index)
        tier = mover.destination(destination)
        source = mover.places_of(target.names)
        transfer = self._node.transfers.submit(mover.model_id, target, tier, priority)
        return TransferAnswer(
            transfer_id=transfer.id,
            message=f"{target.label} is to be moved from {source} to {tier}",
            layer_id=mover.parameter_id(target.label) if layer_index is None else None,
            source=source,
            destination=str(tier),
            priority=priority,
        )

    async def transfer_status(self, transfer_id: str, *, wait: bool = False) -> TransferStatus:
        """How far a transfer is, or with `wait` how it has ended; TransferNotFoundError."""
        transfers = self._node.transfers
        transfer = await asyncio.wrap_future(transfers.future(transfer_id)) if wait else transfers.get(transfer_id)
        loaded = self._node.models.get(transfer.model_id)
        now = loaded.mover.places_of(transfer.names) if loaded is not None else "nowhere: the model is not loaded"
        description = loaded.description if loaded is not None else self._control.of(transfer.model_id).description
        assert description is not None, "what was loaded once has been described"
        manifest = description.manifest
        return views.transfer_status(transfer, manifest, now)

    async def plan(self, model: str | None = None) -> PlanAnswer:
        """The plan of the loaded model, with the tiers in which its parameters are now. Raises as `layers`."""
        loaded = self._loaded(model)
        return views.plan(loaded.model_id, loaded.plan, loaded.description.manifest, loaded.mover.tier_of)

    async def kv(self, model: str | None = None) -> KVAnswer:
        """The KV cache of the loaded model; the ledger's part is left out where its actor does not answer. Raises as
        `layers`."""
        loaded, engine = self._loaded(model), self._control.running(model)
        assert engine is not None
        try:
            ledger = (await asyncio.to_thread(self._node.status, _STATUS_TIMEOUT_S)).kv.get(loaded.model_id)
        except (EngineDeadError, TimeoutError):
            ledger = None
        return views.kv(engine, loaded.description.manifest, loaded.plan, ledger)

    def _loaded(self, model: str | None) -> Loaded:
        model_id = self._control.resolve(model)
        loaded = self._node.models.get(model_id)
        if loaded is None or self._control.running(model_id) is None:
            raise ConflictError(self._control.why_not(model_id))
        return loaded

    # Server

    async def status(self) -> ServerStatus:
        """The whole server at a glance; what does not answer is left out."""
        healthy, actors = True, GroupStatus()
        try:
            actors = await asyncio.to_thread(self._node.status, _STATUS_TIMEOUT_S)
        except (EngineDeadError, TimeoutError):
            healthy = False
        engines = self._control.engines
        loaded = [model for model_id, model in list(self._node.models.items()) if model_id in engines]
        inventory = await asyncio.to_thread(take_inventory, self._disk_paths)
        counts = self._node.transfers.counts()
        in_place = sum(model.mover.nbytes(Tier.NVME) for model in loaded)
        statuses = [await self.model_status(model_id) for model_id in self._control.registry.ids]
        return ServerStatus(
            server_status="running" if healthy and not any(e.dead for e in engines.values()) else "unavailable",
            uptime_seconds=time.monotonic() - self._began,
            model_status=statuses[0] if len(statuses) == 1 else statuses,
            hardware_summary=HardwareSummary(
                inventory=inventory,
                rates=loaded[0].rates if loaded else None,
                tiers=views.health(actors, self._node.device_budget, in_place),
            ),
            layer_transfer_queue_size=counts.pending + counts.processing,
            prefetch_job_queue_size=actors.device.reads_queued if actors.device is not None else 0,
            active_actors=[
                ActorInfo(name=actor_name(self._app, role), role=role, pid=pid) for role, pid in self._node.pids.items()
            ],
            log_file_path=_log_file(),
        )


def _log_file() -> str | None:
    """Where this process logs to, if that is a file."""
    for handler in logging.getLogger("raytier").handlers:
        target = getattr(handler, "target", handler)  # Serve buffers what it writes
        if (path := getattr(target, "baseFilename", None)) is not None:
            return str(path)
    return None
