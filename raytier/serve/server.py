"""LLMServer: the Serve deployment that is the HTTP ingress and the home of the engines.

No torch in this process: it schedules, tokenises and talks to clients; what computes are its child actors.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, aclosing
from typing import TYPE_CHECKING, Any

import ray
from fastapi import FastAPI
from prometheus_client.core import Metric
from ray import serve
from ray.exceptions import RayActorError

from raytier.actors.describer import Describer
from raytier.actors.group import ActorGroup, GroupStatus
from raytier.catalog.control import ModelControl
from raytier.catalog.life import UnloadMode
from raytier.checkpoint.manifest import ModelDescription
from raytier.config import MIB, AppConfig
from raytier.config import Upstream as UpstreamSection
from raytier.engine.outputs import EngineStats, OutputDelta
from raytier.errors import ConflictError, DamagedError, EngineDeadError
from raytier.planner.budgets import planned_paths
from raytier.planner.plan import ResourcePlan
from raytier.serve import handles
from raytier.serve.auth import Keys
from raytier.serve.handles import ChatDelta, GenerateResult
from raytier.serve.http import build_api
from raytier.serve.runtime import Runtime
from raytier.serve.runtime_schema import (
    KVAnswer,
    Layer,
    ListedModel,
    ModelStatus,
    OperationAnswer,
    PlanAnswer,
    RegisterAnswer,
    ServerStatus,
    TransferAnswer,
    TransferStatus,
)
from raytier.serve.served import ServedModel
from raytier.sources.loader import Loaders
from raytier.sources.registry import Registry
from raytier.tiers.transfers import DEFAULT_PRIORITY

if TYPE_CHECKING:
    from raytier.serve.upstream import Upstream

logger = logging.getLogger(__name__)

#: For errors to reach their readers before Serve ends this process.
_LAST_WORDS_S = 0.5


class LLMServer:
    """One replica: engines, actors, routes.

    Everything it makes is its child and sits in its placement group, so Serve's removal of the replica, or
    its death, takes all of it away.
    """

    async def __init__(self, config: AppConfig, description: ModelDescription | None, resources: ResourcePlan) -> None:  # type: ignore[misc]
        _log_with_serve(config.log_level)
        placement_group = ray.util.get_current_placement_group()
        assert placement_group is not None, "the application builder gives every replica a placement group"
        self._config = config
        # Before anything is started: keys that are missing are a mistake.
        self._keys = Keys.of(config.api)
        self._upstream = _upstream(config.api.upstream)
        self._failure: str | None = None
        self.created = int(time.time())
        app = serve.get_replica_context().app_name
        self._group = ActorGroup(app, config, resources, placement_group)
        registry, loaders, describe = Registry.of(config), Loaders(config), Describer()
        self._control = ModelControl(
            self._group, registry, loaders, describe, config.scheduler.max_queue, config.switching
        )
        if description is not None:
            named = registry.get(registry.startup or registry.ids[0])
            describe.remember(named, description.manifest.model_dir, description)
            self._control.remember(named.model_id, description)
        disks = planned_paths(config, None if description is None else description.manifest.model_dir)
        self.runtime = Runtime(app, self._group, self._control, disks, config.api.request_timeout_s)
        startup = registry.startup is not None
        try:
            # In threads: this takes long, and Serve asks this loop for its health meanwhile.
            await asyncio.to_thread(lambda: self._group.start(with_model=startup))
            if startup:
                self._control.load(None)
                await self._control.loaded(None)
            self._control.watch_idle()
        except BaseException:
            await asyncio.to_thread(self._group.stop)
            raise

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(
            self,
            keys=self._keys,
            upstream=self._upstream,
            max_body_bytes=int(self._config.api.max_body_mb * MIB),
            echo_request_id=False,
        )

    # Backend of the HTTP layer

    def model_ids(self) -> list[str]:
        return self._control.registry.ids

    def using(self, model_id: str | None) -> AbstractAsyncContextManager[ServedModel]:
        return self.runtime.using(model_id)

    def metrics(self) -> Iterable[Metric]:
        return self.runtime.metrics()

    def health(self) -> str | None:
        """One model that failed does not keep the others from answering."""
        if self._failure is not None:
            return self._failure
        engines = self._control.engines
        dead = next((engine.dead for engine in engines.values() if engine.dead is not None), None)
        return dead or (None if engines else self._control.first_error)

    # Deployment handles: generation

    async def generate(self, prompt: str | Sequence[int], model: str | None = None, **sampling: Any) -> GenerateResult:
        """Continue a raw prompt: `await handle.generate.remote("Once upon", max_tokens=32)`.

        Args:
            prompt: text or token ids, taken raw (no chat template).
            sampling: fields of `SamplingParams`: max_tokens, temperature, top_p, seed, n, stop, logprobs, ...

        Raises:
            InvalidRequestError, ModelNotFoundError, ConflictError, QueueFullError, EngineDeadError: as over HTTP.
        """
        async with self.using(model) as served:
            return await handles.generate(served, prompt, **sampling)

    async def generate_stream(
        self, prompt: str | Sequence[int], model: str | None = None, **sampling: Any
    ) -> AsyncIterator[OutputDelta]:
        """As `generate`, while it happens: iterate `handle.options(stream=True).generate_stream.remote(...)`.

        A reader that goes away ends the request.
        """
        async with (
            self.using(model) as served,
            aclosing(handles.generate_stream(served, prompt, **sampling)) as deltas,
        ):
            async for delta in deltas:
                yield delta

    async def chat(
        self, messages: Sequence[Mapping[str, Any]], model: str | None = None, **options: Any
    ) -> GenerateResult:
        """Continue a conversation; `result.message` has content, thoughts and calls of tools.

        Args:
            messages: as OpenAI has them; the arguments of calls are objects.
            options: fields of `ChatInput` (tools, tool_choice, ...); all others are sampling's, as in `generate`.
        """
        async with self.using(model) as served:
            return await handles.chat(served, messages, **options)

    async def chat_stream(
        self, messages: Sequence[Mapping[str, Any]], model: str | None = None, **options: Any
    ) -> AsyncIterator[ChatDelta]:
        """As `chat`, while it happens."""
        async with (
            self.using(model) as served,
            aclosing(handles.chat_stream(served, messages, **options)) as deltas,
        ):
            async for delta in deltas:
                yield delta

    # Deployment handles: the runtime, see `Runtime` for what each raises

    async def load_model(
        self,
        model_name_or_path: str,
        compute_device: str = "auto",
        *,
        force_reload: bool = False,
        token: str | None = None,
    ) -> OperationAnswer:
        """Begin to load a model, or to wake it; `model_status` shows how far it is. Requests wait for it."""
        return await self.runtime.load_model(model_name_or_path, compute_device, force_reload=force_reload, token=token)

    async def wake_model(self, model: str | None = None) -> OperationAnswer:
        """Begin to wake a model that sleeps; requests do so too."""
        return await self.runtime.wake_model(model)

    async def sleep_model(self, model: str | None = None, mode: UnloadMode = "drain") -> OperationAnswer:
        """Put a model to sleep: it gives up the device. Returns when it has."""
        return await self.runtime.sleep_model(model, mode)

    async def list_models(self) -> list[ListedModel]:
        """The models of the registry, with their states."""
        return self.runtime.list_models()

    async def register_model(self, config: Mapping[str, Any], *, persist: bool = True) -> RegisterAnswer:
        """Add a model to the registry, or change what is known of one; `config` as in models.yaml."""
        return await self.runtime.register_model(config, persist=persist)

    async def unload_model(self, model: str | None = None, mode: UnloadMode = "drain") -> OperationAnswer:
        """Unload a model: drain lets requests that run end, cancel ends them. Returns when everything is freed."""
        return await self.runtime.unload_model(model, mode)

    async def model_status(self, model: str | None = None) -> ModelStatus:
        """State of a model."""
        return await self.runtime.model_status(model)

    async def layers(self, model: str | None = None) -> list[Layer]:
        """Every parameter and where it is now."""
        return await self.runtime.layers(model)

    async def transfer_layer(
        self,
        parameter: int | str | None = None,
        destination: str = "",
        priority: int = DEFAULT_PRIORITY,
        *,
        layer_index: int | None = None,
        model: str | None = None,
    ) -> TransferAnswer:
        """Queue the move of a parameter (id or name), or of the decoder layer `layer_index`, to another tier."""
        return await self.runtime.transfer_layer(parameter, destination, priority, layer_index=layer_index, model=model)

    async def transfer_status(self, transfer_id: str, *, wait: bool = False) -> TransferStatus:
        """How far a transfer is; with `wait`, how it has ended."""
        return await self.runtime.transfer_status(transfer_id, wait=wait)

    async def plan(self, model: str | None = None) -> PlanAnswer:
        """The plan of the loaded model, with the tiers in which its parameters are now."""
        return await self.runtime.plan(model)

    async def kv(self, model: str | None = None) -> KVAnswer:
        """The KV cache of the loaded model: blocks by tier, what is shared and found again."""
        return await self.runtime.kv(model)

    async def status(self) -> ServerStatus:
        """The whole server at a glance."""
        return await self.runtime.status()

    async def stats(self, model: str | None = None) -> EngineStats:
        """Counters of a model's engine, and its present load; ConflictError when it is not loaded."""
        engine = self._control.running(model)
        if engine is None:
            raise ConflictError(self._control.why_not(model))
        return engine.stats()

    async def actors(self) -> GroupStatus:
        """What every actor holds and has done.

        Raises:
            EngineDeadError: an actor died. TimeoutError: one does not answer.
        """
        return await asyncio.to_thread(self._group.status)

    # Serve's life cycle

    async def check_health(self) -> None:
        """Raise when the engine or one of its actors is gone: Serve then replaces this replica.

        Serve waits for three failures in a row, but not where an actor crashed; that is what is raised here, because
        nothing that has died comes back.
        """
        for model_id, engine in self._control.engines.items():
            if isinstance(engine.failure, DamagedError):
                await self._control.end_damaged(model_id, engine, engine.failure)
        engines = list(self._control.engines.values())
        if not any(engine.dead for engine in engines):
            try:
                await asyncio.to_thread(self._group.ping)
                return
            except EngineDeadError as error:
                self._failure = error.message
                logger.error("%s; this replica ends", error.message)
                for engine in engines:
                    await asyncio.to_thread(engine.close)  # what still runs ends with an error now
        await asyncio.sleep(_LAST_WORDS_S)
        raise RayActorError(error_msg=f"the engine does not run: {self.health()}")

    async def __del__(self) -> None:
        # Before there is a group nothing has to be ended in order.
        if getattr(self, "_group", None) is not None:
            self._control.close()
            if self._upstream is not None:
                await self._upstream.aclose()
            await asyncio.to_thread(self._group.stop)


def _upstream(section: UpstreamSection) -> "Upstream | None":
    if section.base_url is None:
        return None
    from raytier.serve.upstream import Upstream  # with httpx, 4 MiB: for those who forward

    return Upstream(section)


def _log_with_serve(level: str) -> None:
    """What raytier logs in this process goes where Serve's own lines go: the terminal and the replica's log file."""
    ours = logging.getLogger("raytier")
    ours.setLevel(level)
    ours.handlers[:] = logging.getLogger("ray.serve").handlers
    ours.propagate = False
