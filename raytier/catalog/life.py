"""The life of one model: its states (spec E7), and what it lives on."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal, Protocol

from raytier.checkpoint.manifest import ModelDescription
from raytier.engine.engine import Engine
from raytier.errors import RaytierError
from raytier.model_entry import ModelEntry
from raytier.planner.budgets import DeviceKind
from raytier.planner.plan import WeightPlan

logger = logging.getLogger(__name__)

State = Literal["no_model_loaded", "loading", "loaded", "unloading", "sleeping", "error"]
UnloadMode = Literal["drain", "cancel"]

Describe = Callable[[ModelEntry, str], ModelDescription]


class Node(Protocol):
    """What models are loaded into; `ActorGroup`, or a test's stand-in. Calls block; they come one at a time, but for
    `wait_loaded`."""

    @property
    def kind(self) -> DeviceKind: ...

    def plan_model(self, model_id: str, description: ModelDescription, without: Collection[str]) -> WeightPlan:
        """The plan that a model would get while the models of `without` are asleep; BudgetError."""
        ...

    def load_model(self, model_id: str, description: ModelDescription, plan: WeightPlan | None = None) -> Engine:
        """Load or wake a model and return the engine as soon as it can take requests; on an error nothing is left."""
        ...

    def wait_loaded(self, model_id: str) -> float:
        """Wait until all of the model is in place; its seconds, or the error that stopped it."""
        ...

    def sleep_model(self, model_id: str, cancel: threading.Event) -> None:
        """Let what runs end, or end it once `cancel` is set; then give up the device. On an error nothing is left."""
        ...

    def unload_model(self, model_id: str, cancel: threading.Event) -> None:
        """Let what runs end, or end it once `cancel` is set; then free everything of the model."""
        ...


@dataclass(eq=False, slots=True)
class Model:
    """The life of one model.

    Invariants: it has an engine if and only if requests may be submitted to it; `on_node` if and only if the node holds
    something of it, and no operation of it is under way.
    """

    model_id: str
    state: State = "no_model_loaded"
    error: str | None = None
    began: float = 0.0  # of the last load (`time.monotonic`)
    used: float = 0.0  # when a request had it last
    engine: Engine | None = None
    on_node: bool = False
    uses: int = 0  # requests that have its engine
    waiting: int = 0  # requests that wait for it
    description: ModelDescription | None = None  # as it was found last
    fetched: tuple[int, int] | None = None  # bytes that are here, and all, while files are fetched
    loading: asyncio.Task[Engine] | None = None
    interruptible: bool = False  # the load has not begun on the node
    leaving: asyncio.Task[None] | None = None
    cancel: threading.Event = field(default_factory=threading.Event)

    @property
    def busy(self) -> bool:
        if self.uses or self.waiting:
            return True
        return self.engine is not None and works(self.engine)

    def failed(self, error: BaseException) -> None:
        """Show an error, and log it."""
        known = isinstance(error, RaytierError)
        self.state = "error"
        self.error = error.message if isinstance(error, RaytierError) else f"{type(error).__name__}: {error}"
        logger.error("%s: %s", self.model_id, self.error, exc_info=None if known else error)


def works(engine: Engine) -> bool:
    """Whether an engine has requests."""
    stats = engine.stats()
    return stats.dead is None and bool(stats.running or stats.waiting)


def at_once() -> threading.Event:
    """For operations that are not to wait for requests."""
    event = threading.Event()
    event.set()
    return event


def cancelled_here() -> bool:
    """Whether the task that runs was cancelled itself."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def look_at(task: asyncio.Task[Engine] | asyncio.Task[None]) -> None:
    """Take note of a failure that nobody may be waiting for; it is logged already."""
    if not task.cancelled():
        task.exception()
