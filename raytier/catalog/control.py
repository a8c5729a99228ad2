"""Which models are loaded, and what may be done about them now: the states of spec E7 and the moves between them.

What a load starts must not be a child of the request that asked for it, because Ray cancels the children of a cancelled
request: operations run as tasks of their own and on threads. Methods are called on one event loop; they do not block.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Literal, TypeVar

from raytier.catalog.life import Describe, Model, Node, State, UnloadMode, at_once, cancelled_here, look_at, works
from raytier.catalog.resources import check_resources
from raytier.catalog.room import LOOK_S, Room
from raytier.checkpoint.manifest import ModelDescription
from raytier.config import Switching
from raytier.engine.engine import Engine
from raytier.errors import ConflictError, DamagedError, QueueFullError
from raytier.model_entry import ModelEntry
from raytier.sources.loader import FetchOptions, Loaders
from raytier.sources.registry import Registry

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How often it is looked for models that have been idle for long.
_PATROL_S = 0.5


class ModelControl:
    """The states of the models of an application.

    Args:
        registry: the models that there are.
        loaders: bring their files here.
        describe: what a model in a directory is made of; called on a thread, before every load.
        max_waiting: requests that may wait for one model.
    """

    def __init__(
        self,
        node: Node,
        registry: Registry,
        loaders: Loaders,
        describe: Describe,
        max_waiting: int,
        switching: Switching | None = None,
    ) -> None:
        self._node = node
        self.registry = registry
        self._loaders = loaders
        self._describe = describe
        self._max_waiting = max_waiting
        self._switching = Switching() if switching is None else switching
        self._models: dict[str, Model] = {}
        self._gone: list[Callable[[str], None]] = []
        self._turn = asyncio.Lock()  # who needs room on the node, one after the other
        self._node_lock = asyncio.Lock()  # one operation on the node at a time
        self._room = Room(registry, self._models, self._switching, self._on_node, self._put_to_sleep)
        self._patrol: asyncio.Task[None] | None = None
        # One for the operation, and one for each model whose end of loading is waited for.
        self._threads = ThreadPoolExecutor(32, thread_name_prefix="model-control")

    # ---- what there is -------------------------------------------------------------------------

    def resolve(self, name: str | None) -> str:
        """Id of the model that `name` means, see `Registry.resolve`; ModelNotFoundError."""
        return self.registry.resolve(name)

    def of(self, name: str | None) -> Model:
        """How a model is now; to be looked at only. ModelNotFoundError."""
        model_id = self.resolve(name)
        return self._models.setdefault(model_id, Model(model_id))

    def running(self, name: str | None = None) -> Engine | None:
        """The engine that takes requests now, if there is one; ModelNotFoundError."""
        return self.of(name).engine

    @property
    def engines(self) -> dict[str, Engine]:
        """The engines that take requests now."""
        return {model.model_id: model.engine for model in self._models.values() if model.engine is not None}

    def state(self, name: str | None = None) -> State:
        return self.of(name).state

    def error(self, name: str | None = None) -> str | None:
        """What the last operation on a model failed with."""
        return self.of(name).error

    @property
    def first_error(self) -> str | None:
        """Of a model that is in error."""
        return next((model.error for model in self._models.values() if model.error is not None), None)

    def remember(self, model_id: str, description: ModelDescription) -> None:
        """What a model was found to be when the application was built."""
        self.of(model_id).description = description

    def when_gone(self, call: Callable[[str], None]) -> None:
        """Have `call` called with the id whenever an engine takes no more requests: who holds it lets go of it then."""
        self._gone.append(call)

    def why_not(self, name: str | None = None) -> str:
        """Why a model cannot take requests now, and what to do."""
        model = self.of(name)
        how = f'POST /api/models/load with {{"model_name_or_path": "{model.model_id}"}}'
        if model.state == "unloading":
            return f"{model.model_id} is being unloaded; load it again with {how}"
        if model.state == "error":
            return f"{model.model_id} could not be loaded: {model.error}; when that is mended, {how}"
        if model.state == "sleeping":
            return f"{model.model_id} is asleep; wake it with POST /api/models/wake, or by a request"
        return f"{model.model_id} is not loaded; load it with {how}"

    # ---- requests ------------------------------------------------------------------------------

    @asynccontextmanager
    async def use(self, name: str | None) -> AsyncIterator[Engine]:
        """The engine of a model, which does not leave meanwhile unless it is told to; waits for it in order while it is
        loading, and wakes it.

        Raises:
            ModelNotFoundError, QueueFullError: as they say. ConflictError: it is not loaded; says how to load it.
            RaytierError: what the load that this waited for failed with.
        """
        model = self.of(name)
        engine = await self._await_engine(model)
        model.uses += 1
        try:
            yield engine
        finally:
            model.uses -= 1
            model.used = time.monotonic()

    async def _await_engine(self, model: Model) -> Engine:
        while model.engine is None:
            if model.loading is None:
                wakes = model.state == "sleeping"
                if not wakes and not (self._switching.on_request == "load" and model.state == "no_model_loaded"):
                    raise ConflictError(self.why_not(model.model_id))
                self._check_places(model)
                self._begin(model)
            else:
                self._check_places(model)
            assert model.loading is not None
            model.waiting += 1
            try:
                await asyncio.shield(model.loading)
            except asyncio.CancelledError:
                if model.loading is None and model.state == "no_model_loaded" and not cancelled_here():
                    raise ConflictError(f"{model.model_id}: its loading was cancelled") from None
                raise
            finally:
                model.waiting -= 1
        return model.engine

    def _check_places(self, model: Model) -> None:
        if model.waiting >= self._max_waiting:
            raise QueueFullError(
                f"{model.waiting} requests wait for {model.model_id} to be loaded, as many as may (scheduler.max_queue)"
            )

    # ---- operations ----------------------------------------------------------------------------

    def load(self, name: str | None, options: FetchOptions | None = None, *, force_reload: bool = False) -> str:
        """Begin to load a model, or to wake it; returns what happens now. Loading what is loaded, or loading already,
        does nothing.

        Args:
            force_reload: load it anew from its files when it is loaded; requests that run end first, others wait.

        Raises:
            ModelNotFoundError: no such model. ConflictError: it is being unloaded.
        """
        model = self.of(name)
        if model.state == "loading":
            return f"{model.model_id} is being loaded already"
        if model.state == "unloading":
            raise ConflictError(f"{model.model_id} is being unloaded; load it when GET /api/models/status says so")
        if model.state == "loaded" and not force_reload:
            return f"{model.model_id} is loaded already"
        verb = "woken" if model.state == "sleeping" and not force_reload else "loaded"
        self._begin(model, options, reload=force_reload)
        return f"{model.model_id} is being {verb}; GET /api/models/status shows the progress"

    async def loaded(self, name: str | None) -> Engine:
        """Wait for a load that has begun, as `use` does, without using the model."""
        async with self.use(name) as engine:
            return engine

    async def sleep(self, name: str | None, mode: UnloadMode = "drain") -> str:
        """Put a model to sleep; returns when it is, which a caller who goes away does not stop. A request wakes it.

        Raises:
            ModelNotFoundError: no such model. ConflictError: it is not loaded, or not yet, or pinned.
        """
        model = self.of(name)
        if model.state == "sleeping":
            if model.leaving is not None:
                self._hurry(model, mode)
                await asyncio.shield(model.leaving)
            return f"{model.model_id} is asleep"
        if model.engine is None:
            raise ConflictError(self._not_yet(model))
        if self.registry.get(model.model_id).pinned:
            raise ConflictError(
                f"{model.model_id} is pinned, it never sleeps: unload it, or register it without `pinned`"
            )
        await self._leave(model, "sleeping", mode)
        return f"{model.model_id} is asleep"

    async def unload(self, name: str | None, mode: UnloadMode = "drain") -> str:
        """Unload a model; returns when everything of it is freed, which a caller who goes away does not stop.

        Args:
            mode: drain lets requests that run end; cancel ends them with an error, also while they are drained, and
                ends a load that is under way.

        Raises:
            ModelNotFoundError: no such model. ConflictError: it is not loaded, or not yet.
        """
        model = self.of(name)
        done = f"{model.model_id} is unloaded"
        if model.state == "loading" and model.engine is None and mode == "cancel":
            await self._cancel_load(model)
            if not model.on_node:
                model.state, model.error = "no_model_loaded", None
                return done
        if model.state == "sleeping" and model.leaving is not None:
            self._hurry(model, mode)
            await asyncio.wait([model.leaving])
        if model.leaving is not None:
            self._hurry(model, mode)
            await asyncio.shield(model.leaving)
        elif model.on_node:
            await self._leave(model, "unloading", mode)
        elif model.state == "error":
            model.state, model.error = "no_model_loaded", None
            return f"{model.model_id} was not loaded; its error is cleared"
        else:
            raise ConflictError(self._not_yet(model))
        return done

    def _not_yet(self, model: Model) -> str:
        if model.state == "loading":
            return f"{model.model_id} is being loaded; try again when GET /api/models/status says that it is loaded"
        return f"{model.model_id} is not loaded"

    def register(self, entry: ModelEntry, *, persist: bool) -> bool:
        """Add a model or change what is known of one, see `Registry.put`; takes effect when it is loaded next.

        Raises:
            ConfigurationError: its source is not known, or the file cannot be written.
        """
        self._loaders.of(entry)
        return self.registry.put(entry, persist=persist)

    def watch_idle(self) -> None:
        """From now on put models to sleep that have been idle for long, where that is configured."""
        if self._switching.idle_sleep_s is not None and self._patrol is None:
            self._patrol = asyncio.ensure_future(self._patrolling(self._switching.idle_sleep_s))

    def close(self) -> None:
        """Let the threads go; whoever ends the node does the rest."""
        if self._patrol is not None:
            self._patrol.cancel()
        for model in self._models.values():
            model.cancel.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # ---- loading -------------------------------------------------------------------------------

    def _begin(self, model: Model, options: FetchOptions | None = None, *, reload: bool = False) -> None:
        model.state, model.error, model.began = "loading", None, time.monotonic()
        model.interruptible = True
        leaving = self._dismiss(model) if reload else model.leaving
        model.loading = asyncio.ensure_future(self._load(model, options or FetchOptions(), leaving, reload))
        model.loading.add_done_callback(look_at)

    async def _load(
        self, model: Model, options: FetchOptions, leaving: asyncio.Task[None] | None, reload: bool
    ) -> Engine:
        try:
            if leaving is not None:
                await asyncio.wait([leaving])
            description = await self._fetch(model, options)
            async with self._turn:
                model_id = model.model_id
                plan = await self._room.make(
                    model, lambda without: self._node.plan_model(model_id, description, without)
                )
                model.interruptible = False
                if reload and model.on_node:
                    await self._on_node(lambda: self._node.unload_model(model_id, at_once()))
                    model.on_node = False
                engine = await self._on_node(
                    lambda: self._node.load_model(model_id, description, None if reload else plan)
                )
        except asyncio.CancelledError:
            model.state = "sleeping" if model.on_node else "no_model_loaded"
            raise
        except BaseException as error:
            model.on_node = model.on_node and model.interruptible  # on the node a load that fails leaves nothing
            model.failed(error)
            raise
        finally:
            model.loading = model.fetched = None
            model.interruptible = False
        model.engine, model.on_node, model.used = engine, True, time.monotonic()
        asyncio.ensure_future(self._watch(model, engine)).add_done_callback(look_at)
        return engine

    async def _fetch(self, model: Model, options: FetchOptions) -> ModelDescription:
        """Bring the model's files here, and find out what it is made of."""
        entry = self.registry.get(model.model_id)
        await self._in_thread(lambda: check_resources(entry, self._node.kind))

        def progress(here: int, total: int) -> None:
            model.fetched = here, total

        directory = await self._loaders.of(entry).load(entry, progress, options)
        model.fetched = None
        model.description = await self._in_thread(lambda: self._describe(entry, directory))
        return model.description

    async def _watch(self, model: Model, engine: Engine) -> None:
        """Wait for the rest of the model; what cannot be read ends it."""
        try:
            seconds = await self._in_thread(lambda: self._node.wait_loaded(model.model_id))
        except Exception as error:
            if model.engine is engine:  # it was not unloaded meanwhile
                await self._end(model, error)
            return
        if model.engine is engine:
            model.state = "loaded"
            logger.info("all of %s was read after %.1f s", model.model_id, seconds)

    async def end_damaged(self, model_id: str, engine: Engine, error: DamagedError) -> None:
        """Give up the model of an engine that died because its files are damaged: it would find them so again."""
        model = self.of(model_id)
        if model.engine is engine:
            await self._end(model, error)

    async def _end(self, model: Model, error: BaseException) -> None:
        self._let_go(model)
        model.failed(error)
        await self._on_node(lambda: self._node.unload_model(model.model_id, at_once()))
        model.on_node = False

    async def _cancel_load(self, model: Model) -> None:
        """End a load: at once where only files were fetched or room was waited for, else when it is through."""
        loading = model.loading
        if loading is None:
            return
        if model.interruptible:
            loading.cancel()
        await asyncio.wait([loading])

    # ---- leaving -------------------------------------------------------------------------------

    async def _leave(self, model: Model, state: Literal["sleeping", "unloading"], mode: UnloadMode) -> None:
        """Have a model sleep, or go."""
        model.state = state
        leaving = self._dismiss(model, state)
        self._hurry(model, mode)
        await asyncio.shield(leaving)

    def _dismiss(self, model: Model, state: State = "loading") -> asyncio.Task[None]:
        """Take the engine away from new requests, and begin what `state` says with it."""
        model.cancel.clear()
        engine = model.engine
        self._let_go(model)
        model.leaving = asyncio.ensure_future(self._left(model, engine, state))
        model.leaving.add_done_callback(look_at)
        return model.leaving

    async def _left(self, model: Model, engine: Engine | None, state: State) -> None:
        try:
            while engine is not None and not model.cancel.is_set() and (model.uses or works(engine)):  # noqa: ASYNC110
                await asyncio.sleep(LOOK_S)  # what ends in engines tells nobody
            if state == "loading":  # it is loaded anew: the load goes on from here
                return
            if state == "sleeping":
                await self._on_node(lambda: self._node.sleep_model(model.model_id, at_once()))
            else:
                await self._on_node(lambda: self._node.unload_model(model.model_id, at_once()))
                model.on_node = False
        except BaseException as error:
            model.on_node = False
            model.failed(error)
            raise
        else:
            if state == "unloading":
                model.state = "no_model_loaded"
                await self._give_up_files(model)
                logger.info("unloaded %s", model.model_id)
        finally:
            model.leaving = None

    def _hurry(self, model: Model, mode: UnloadMode) -> None:
        if mode == "cancel":
            model.cancel.set()

    async def _give_up_files(self, model: Model) -> None:
        entry = self.registry.get(model.model_id)
        try:
            await self._loaders.of(entry).unload(entry)
        except Exception:
            logger.exception("the loader of %s could not give up its files", model.model_id)

    def _let_go(self, model: Model) -> None:
        model.engine = None
        for call in self._gone:
            call(model.model_id)

    async def _patrolling(self, after_s: float) -> None:
        while True:
            await asyncio.sleep(min(_PATROL_S, after_s))
            since = time.monotonic() - after_s
            for model in list(self._models.values()):
                pinned = self.registry.get(model.model_id).pinned
                if model.state == "loaded" and not pinned and not model.busy and model.used < since:
                    with suppress(Exception):  # it is logged, and shown in the model's status
                        await self._leave(model, "sleeping", "drain")

    async def _put_to_sleep(self, model: Model) -> None:
        await self._leave(model, "sleeping", "drain")

    async def _on_node(self, call: Callable[[], T]) -> T:
        """Run what blocks on the node, one after the other."""
        async with self._node_lock:
            return await self._in_thread(call)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)
