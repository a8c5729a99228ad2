"""Which model is loaded, and what may be done about that now: the states of spec E7 and the moves between them.

One operation at a time, on threads of its own: what a load starts must not be a child of the request that asked for
it, because Ray cancels the children of a cancelled request. Methods are called on one event loop; they do not block.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Protocol, TypeVar

from raytier.checkpoint.manifest import ModelDescription
from raytier.config import ModelEntry
from raytier.engine.engine import Engine
from raytier.errors import ConflictError, DamagedError, ModelNotFoundError, QueueFullError, RaytierError

logger = logging.getLogger(__name__)

T = TypeVar("T")
State = Literal["no_model_loaded", "loading", "loaded", "unloading", "sleeping", "error"]
UnloadMode = Literal["drain", "cancel"]


class Node(Protocol):
    """What a model is loaded into; `ActorGroup`, or a test's stand-in. Calls block."""

    def load_model(self, description: ModelDescription) -> Engine:
        """Load and return the engine as soon as it can take requests; on an error nothing is left."""
        ...

    def wait_loaded(self) -> float:
        """Wait until all of the model is in place; its seconds, or the error that stopped it."""
        ...

    def unload_model(self, cancel: threading.Event) -> None:
        """Let what runs end, or end it once `cancel` is set; then free everything of the model."""
        ...


class ModelControl:
    """The state of the one model of an application.

    Args:
        entry: the model that may be loaded.
        describe: what it is made of; called on a thread, before every load.
        max_waiting: requests that may wait for a load.

    Attributes:
        entry: the model.
        error: what the last load or unload failed with.
        began: when the last load began (`time.monotonic`).
    """

    def __init__(
        self, node: Node, entry: ModelEntry, describe: Callable[[], ModelDescription], max_waiting: int
    ) -> None:
        self._node = node
        self.entry = entry
        self._describe = describe
        self._max_waiting = max_waiting
        self._waiting = 0
        self._engine: Engine | None = None
        self._gone: list[Callable[[], None]] = []
        self._loading: asyncio.Task[Engine] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._unloading: asyncio.Task[None] | None = None
        self._cancel = threading.Event()
        self._node_lock = asyncio.Lock()  # one operation on the node at a time
        # Two: unloading may have to interrupt what `wait_loaded` waits for.
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="model-control")
        self.state: State = "no_model_loaded"
        self.error: str | None = None
        self.began = 0.0

    @property
    def running(self) -> Engine | None:
        """The engine that takes requests now, if there is one."""
        return self._engine

    def when_gone(self, call: Callable[[], None]) -> None:
        """Have `call` called whenever the engine takes no more requests: whoever holds it lets go of it then."""
        self._gone.append(call)

    def _let_go(self) -> None:
        self._engine = None
        for call in self._gone:
            call()

    def resolve(self, name: str | None) -> str:
        """Id of the model that `name` (an id, a path, or None for the only one) means.

        Raises:
            ModelNotFoundError: names the known ones.
        """
        entry = self.entry
        if name in (None, entry.model_id, entry.source_path) or name == entry.directory():
            return entry.model_id
        raise ModelNotFoundError(f"model {name!r} is not served here; served are: {entry.model_id}")

    async def engine(self, name: str | None) -> Engine:
        """The engine of a model; while the model is loading, this waits for it.

        Raises:
            ModelNotFoundError, QueueFullError: as they say. ConflictError: it is not loaded; says how to load it.
            RaytierError: what the load that this waited for failed with.
        """
        model_id = self.resolve(name)
        if self._engine is not None:
            return self._engine
        if self._loading is None:
            raise ConflictError(self.why_not(model_id))
        if self._waiting >= self._max_waiting:
            raise QueueFullError(
                f"{self._waiting} requests wait for {model_id} to be loaded, as many as may (scheduler.max_queue)"
            )
        self._waiting += 1
        try:
            return await asyncio.shield(self._loading)
        finally:
            self._waiting -= 1

    def load(self, name: str | None) -> str:
        """Begin to load a model; returns what happens now. Loading what is loaded, or loading already, does nothing.

        Raises:
            ModelNotFoundError: no such model. ConflictError: it is being unloaded.
        """
        model_id = self.resolve(name)
        if self.state == "loaded":
            return f"{model_id} is loaded already"
        if self.state == "loading":
            return f"{model_id} is being loaded already"
        if self.state == "unloading":
            raise ConflictError(f"{model_id} is being unloaded; load it when GET /api/models/status says so")
        self.state, self.error, self.began = "loading", None, time.monotonic()
        self._loading = asyncio.ensure_future(self._load(model_id))
        self._loading.add_done_callback(_look_at)
        return f"{model_id} is being loaded; GET /api/models/status shows the progress"

    async def unload(self, name: str | None, mode: UnloadMode = "drain") -> str:
        """Unload a model; returns when everything of it is freed, which a caller who goes away does not stop.

        Args:
            mode: drain lets requests that run end; cancel ends them with an error, also while they are drained.

        Raises:
            ModelNotFoundError: no such model. ConflictError: it is not loaded, or not yet.
        """
        model_id = self.resolve(name)
        if self._unloading is None:
            if self.state == "error":
                self.state, self.error = "no_model_loaded", None
                return f"{model_id} was not loaded; its error is cleared"
            if self._engine is None:
                raise ConflictError(
                    f"{model_id} is not loaded"
                    if self.state == "no_model_loaded"
                    else f"{model_id} is being loaded; unload it when GET /api/models/status says that it is loaded"
                )
            self.state = "unloading"
            self._let_go()
            self._cancel.clear()
            self._unloading = asyncio.ensure_future(self._unload(model_id))
            self._unloading.add_done_callback(_look_at)
        if mode == "cancel":
            self._cancel.set()
        await asyncio.shield(self._unloading)
        return f"{model_id} is unloaded"

    def close(self) -> None:
        """Let the threads go; whoever ends the node does the rest."""
        self._cancel.set()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def why_not(self, model_id: str) -> str:
        how = f'POST /api/models/load with {{"model_name_or_path": "{model_id}"}}'
        if self.state == "unloading":
            return f"{model_id} is being unloaded; load it again with {how}"
        if self.state == "error":
            return f"{model_id} could not be loaded: {self.error}; when that is mended, {how}"
        return f"{model_id} is not loaded; load it with {how}"

    async def _load(self, model_id: str) -> Engine:
        try:
            async with self._node_lock:
                engine = await self._in_thread(lambda: self._node.load_model(self._describe()))
        except BaseException as error:
            self._failed(model_id, error)
            raise
        finally:
            self._loading = None
        self._engine = engine
        self._reading = asyncio.ensure_future(self._watch(model_id, engine))
        return engine

    async def _watch(self, model_id: str, engine: Engine) -> None:
        """Wait for the rest of the model; what cannot be read ends it."""
        try:
            seconds = await self._in_thread(self._node.wait_loaded)
        except Exception as error:
            if self._engine is not engine:  # it was unloaded meanwhile
                return
            await self._end(model_id, error)
            return
        if self._engine is engine:
            self.state = "loaded"
            logger.info("all of %s was read after %.1f s", model_id, seconds)

    async def end_damaged(self, engine: Engine, error: DamagedError) -> None:
        """Give up the model of an engine that died because its files are damaged: it would find them so again."""
        if self._engine is engine:
            await self._end(engine.model_id, error)

    async def _end(self, model_id: str, error: BaseException) -> None:
        self._let_go()
        self._failed(model_id, error)
        at_once = threading.Event()
        at_once.set()
        async with self._node_lock:
            await self._in_thread(lambda: self._node.unload_model(at_once))

    async def _unload(self, model_id: str) -> None:
        try:
            async with self._node_lock:
                await self._in_thread(lambda: self._node.unload_model(self._cancel))
        except BaseException as error:
            self._failed(model_id, error)
            raise
        else:
            self.state = "no_model_loaded"
            logger.info("unloaded %s", model_id)
        finally:
            self._unloading = None

    def _failed(self, model_id: str, error: BaseException) -> None:
        self.state = "error"
        self.error = error.message if isinstance(error, RaytierError) else f"{type(error).__name__}: {error}"
        logger.error("%s: %s", model_id, self.error, exc_info=None if isinstance(error, RaytierError) else error)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def _look_at(task: asyncio.Task[Engine] | asyncio.Task[None]) -> None:
    """Take note of a failure that nobody may be waiting for; it is logged already."""
    if not task.cancelled():
        task.exception()
