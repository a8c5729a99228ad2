"""LLMServer: the Serve deployment that is the HTTP ingress and the home of the engines.

No torch in this process: it schedules, tokenises and talks to clients; what computes are its child actors.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError

from raytier.actors.group import ActorGroup, GroupStatus
from raytier.checkpoint.manifest import ModelDescription
from raytier.config import AppConfig
from raytier.engine.engine import Engine
from raytier.engine.outputs import EngineStats, OutputDelta
from raytier.errors import EngineDeadError, ModelNotFoundError
from raytier.planner.plan import ResourcePlan
from raytier.serve import generate
from raytier.serve.generate import GenerateResult
from raytier.serve.http import build_api

logger = logging.getLogger(__name__)

#: For errors to reach their readers before Serve ends this process.
_LAST_WORDS_S = 0.5


class LLMServer:
    """One replica: engines, actors, routes.

    Everything it makes is its child and sits in its placement group, so Serve's removal of the replica, or
    its death, takes all of it away.
    """

    async def __init__(self, config: AppConfig, description: ModelDescription, resources: ResourcePlan) -> None:  # type: ignore[misc]
        _log_with_serve(config.log_level)
        placement_group = ray.util.get_current_placement_group()
        assert placement_group is not None, "the application builder gives every replica a placement group"
        self._config = config
        self._failure: str | None = None
        self.created = int(time.time())
        app = serve.get_replica_context().app_name
        self._group = ActorGroup(app, config, resources, placement_group)
        # In a thread: loading takes long, and Serve asks this loop for its health meanwhile. The engine's own
        # thread starts here too, never in a request, whose cancellation Ray would pass on to its children.
        self._engine = await asyncio.to_thread(self._group.start, description)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_api(self, echo_request_id=False)

    # Backend of the HTTP layer

    def model_ids(self) -> list[str]:
        return [entry.model_id for entry in self._config.models]

    def engine(self, model_id: str | None) -> Engine:
        if model_id is not None and model_id not in self.model_ids():
            raise ModelNotFoundError(
                f"model {model_id!r} is not served here; served are: {', '.join(self.model_ids())}"
            )
        return self._engine

    def health(self) -> str | None:
        return self._failure or self._engine.dead

    # Deployment handles

    async def generate(self, prompt: str | Sequence[int], model: str | None = None, **sampling: Any) -> GenerateResult:
        """Continue a raw prompt: `await handle.generate.remote("Once upon", max_tokens=32)`.

        Args:
            prompt: text or token ids, taken raw (no chat template).
            sampling: fields of a completion request: max_tokens, temperature, top_p, top_k, seed, stop, ...

        Raises:
            InvalidRequestError, ModelNotFoundError, QueueFullError, EngineDeadError: as over HTTP.
        """
        return await generate.generate(self.engine(model), prompt, **sampling)

    async def generate_stream(
        self, prompt: str | Sequence[int], model: str | None = None, **sampling: Any
    ) -> AsyncIterator[OutputDelta]:
        """As `generate`, while it happens: iterate `handle.options(stream=True).generate_stream.remote(...)`.

        A reader that goes away ends the request.
        """
        async with aclosing(generate.generate_stream(self.engine(model), prompt, **sampling)) as deltas:
            async for delta in deltas:
                yield delta

    async def chat(
        self, messages: Sequence[Mapping[str, str]], model: str | None = None, **sampling: Any
    ) -> GenerateResult:
        """Continue a conversation of `{"role": ..., "content": ...}`; otherwise as `generate`."""
        return await generate.chat(self.engine(model), messages, **sampling)

    async def chat_stream(
        self, messages: Sequence[Mapping[str, str]], model: str | None = None, **sampling: Any
    ) -> AsyncIterator[OutputDelta]:
        """As `chat`, while it happens."""
        async with aclosing(generate.chat_stream(self.engine(model), messages, **sampling)) as deltas:
            async for delta in deltas:
                yield delta

    async def stats(self) -> EngineStats:
        """Counters of the engine, and its present load."""
        return self._engine.stats()

    async def status(self) -> GroupStatus:
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
        if self._engine.dead is None:
            try:
                await asyncio.to_thread(self._group.ping)
                return
            except EngineDeadError as error:
                self._failure = error.message
                logger.error("%s; this replica ends", error.message)
                await asyncio.to_thread(self._engine.close)  # what still runs ends with an error now
        await asyncio.sleep(_LAST_WORDS_S)
        raise RayActorError(error_msg=f"the engine does not run: {self.health()}")

    async def __del__(self) -> None:
        # Before there is an engine nothing has to be ended in order: the actors go with this process.
        if getattr(self, "_engine", None) is not None:
            await asyncio.to_thread(self._group.stop)


def _log_with_serve(level: str) -> None:
    """What raytier logs in this process goes where Serve's own lines go: the terminal and the replica's log file."""
    ours = logging.getLogger("raytier")
    ours.setLevel(level)
    ours.handlers[:] = logging.getLogger("ray.serve").handlers
    ours.propagate = False
