"""The runtime's own operations, as HTTP routes and deployment handles offer them: models, layers, transfers, plan."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from prometheus_client.core import Metric

from raytier.actors.group import GroupStatus
from raytier.actors.names import actor_name
from raytier.actors.transfers import ParameterMover, TransferManager
from raytier.checkpoint.manifest import ModelDescription
from raytier.errors import ConflictError, EngineDeadError, InvalidRequestError
from raytier.execution.parameters import ParameterStatus
from raytier.hardware.inventory import take_inventory
from raytier.hardware.rates import Rates
from raytier.planner.budgets import DeviceKind
from raytier.planner.plan import Tier, WeightPlan
from raytier.serve import views
from raytier.serve.control import ModelControl, Node, UnloadMode
from raytier.serve.handles import generate
from raytier.serve.metrics import RequestMetrics, engine_families
from raytier.serve.runtime_schema import (
    ActorInfo,
    GenerateAnswer,
    HardwareSummary,
    KVAnswer,
    Layer,
    LayerGroup,
    LoadProgress,
    ModelStatus,
    OperationAnswer,
    PlanAnswer,
    ServerStatus,
    TransferAnswer,
    TransferStatus,
)
from raytier.serve.served import ServedModel
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
    def kind(self) -> DeviceKind: ...
    @property
    def pids(self) -> Mapping[str, int]: ...
    @property
    def transfers(self) -> TransferManager: ...
    @property
    def model(self) -> Loaded | None: ...

    def status(self, timeout_s: float = ...) -> GroupStatus: ...

    def layers(self, timeout_s: float = ...) -> tuple[ParameterStatus, ...]: ...


class Runtime:
    """What can be asked and told about an application, one method per route.

    Args:
        app: name of the application.
        description: of the model, from when the application was built; a loaded one has its own.
        disk_paths: whose disks the status tells of.
        request_timeout_s: longest life of a request.
    """

    def __init__(
        self,
        app: str,
        node: RuntimeNode,
        control: ModelControl,
        description: ModelDescription,
        disk_paths: Sequence[str] = (),
        request_timeout_s: float | None = None,
    ) -> None:
        self._app = app
        self._node = node
        self._control = control
        self._description = description
        self._disk_paths = disk_paths
        self._timeout_s = request_timeout_s
        self._began = time.monotonic()
        self._served: ServedModel | None = None
        control.when_gone(self._forget)
        self._requests = RequestMetrics(control.entry.model_id)

    # Models

    async def load_model(self, model_name_or_path: str, compute_device: str = "auto") -> OperationAnswer:
        """Begin to load a model.

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
        return await self._answer(self._control.load(model_id))

    async def unload_model(self, model: str | None = None, mode: UnloadMode = "drain") -> OperationAnswer:
        """Unload a model; returns when all of it is freed. Raises ModelNotFoundError, ConflictError."""
        return await self._answer(await self._control.unload(model, mode))

    async def _answer(self, message: str) -> OperationAnswer:
        return OperationAnswer(message=message, model=await self.model_status())

    async def model_status(self, model: str | None = None) -> ModelStatus:
        """State of a model; ModelNotFoundError."""
        model_id = self._control.resolve(model)
        loaded = self._node.model
        description = loaded.description if loaded is not None else self._description
        progress = await self._progress() if self._control.state == "loading" else None
        manifest = description.manifest
        return ModelStatus(
            model_name=model_id,
            model_path=manifest.model_dir,
            architecture=manifest.architecture,
            tokenizer_name=model_id,
            num_managed_layers=len(manifest.parameters),
            compute_device=self._node.kind,
            status=self._control.state,
            progress=progress,
            error_message=self._control.error,
        )

    async def _progress(self) -> LoadProgress | None:
        try:
            status = await asyncio.to_thread(self._node.status, _STATUS_TIMEOUT_S)
        except (EngineDeadError, TimeoutError):
            return None
        return views.progress(status, time.monotonic() - self._control.began)

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
        served = await self.served(model)
        given = {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
        result = await generate(served, prompt, **{name: value for name, value in given.items() if value is not None})
        return GenerateAnswer(
            prompt=prompt,
            generated_text=result.text,
            model_name=served.engine.model_id,
            tokens_generated=result.completion_tokens,
            generation_time_seconds=result.seconds,
        )

    async def served(self, model: str | None = None) -> ServedModel:
        """A model as the front sees it, waiting for it while it is being loaded.

        Raises:
            ModelNotFoundError, QueueFullError, ConflictError, RaytierError: as `ModelControl.engine`.
        """
        engine = await self._control.engine(model)
        served = self._served
        if served is None or served.engine is not engine:
            served = ServedModel(engine, self._control.entry, self._timeout_s)
            engine.observe(self._requests.take)
            # Nothing is kept of one that was unloaded while this waited for its load.
            self._served = served if self._control.running is engine else None
        return served

    def _forget(self) -> None:
        self._served = None

    def metrics(self) -> Iterable[Metric]:
        """What /metrics shows: requests since this replica began, and the engine as it is now."""
        engine = self._control.running
        stats = None if engine is None else engine.stats()
        yield from self._requests.families()
        yield from engine_families(self._control.entry.model_id, stats, self._control.state)

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
        parameters = await asyncio.to_thread(self._node.layers)
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
        loaded = self._node.model
        now = loaded.mover.places_of(transfer.names) if loaded is not None else "nowhere: the model is not loaded"
        manifest = (self._description if loaded is None else loaded.description).manifest
        return views.transfer_status(transfer, manifest, now)

    async def plan(self, model: str | None = None) -> PlanAnswer:
        """The plan of the loaded model, with the tiers in which its parameters are now. Raises as `layers`."""
        loaded = self._loaded(model)
        return views.plan(loaded.model_id, loaded.plan, loaded.description.manifest, loaded.mover.tier_of)

    async def kv(self, model: str | None = None) -> KVAnswer:
        """The KV cache of the loaded model; the ledger's part is left out where its actor does not answer. Raises as
        `layers`."""
        loaded, engine = self._loaded(model), self._control.running
        assert engine is not None
        try:
            ledger = (await asyncio.to_thread(self._node.status, _STATUS_TIMEOUT_S)).kv
        except (EngineDeadError, TimeoutError):
            ledger = None
        return views.kv(engine, loaded.description.manifest, loaded.plan, ledger)

    def _loaded(self, model: str | None) -> Loaded:
        model_id = self._control.resolve(model)
        loaded = self._node.model
        if loaded is None or self._control.running is None:
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
        loaded, engine = self._node.model, self._control.running
        inventory = await asyncio.to_thread(take_inventory, self._disk_paths)
        counts = self._node.transfers.counts()
        in_place = 0 if loaded is None else loaded.mover.nbytes(Tier.NVME)
        return ServerStatus(
            server_status="running" if healthy and (engine is None or engine.dead is None) else "unavailable",
            uptime_seconds=time.monotonic() - self._began,
            model_status=await self.model_status(),
            hardware_summary=HardwareSummary(
                inventory=inventory,
                rates=loaded.rates if loaded is not None else None,
                tiers=views.health(actors, None if loaded is None else loaded.plan, in_place),
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
