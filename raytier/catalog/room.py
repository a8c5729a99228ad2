"""Making room on the node for a model: who sleeps for it, and who has to end for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping

from raytier.catalog.life import Model
from raytier.catalog.residency import who_sleeps
from raytier.config import Switching
from raytier.errors import BudgetError
from raytier.planner.plan import WeightPlan
from raytier.sources.registry import Registry

#: How often it is looked whether a model has become idle.
LOOK_S = 0.02

Plan = Callable[[Collection[str]], WeightPlan]
#: Models that have to sleep, and the plan of the one that they sleep for.
Choice = tuple[tuple[str, ...], WeightPlan]


class Room:
    """Room on a node for one model at a time.

    Args:
        models: all of them, by id.
        on_node: runs a call that blocks as an operation on the node.
        put_to_sleep: has a model sleep when its requests have ended; returns when it does.
    """

    def __init__(
        self,
        registry: Registry,
        models: Mapping[str, Model],
        switching: Switching,
        on_node: Callable[[Callable[[], Choice]], Awaitable[Choice]],
        put_to_sleep: Callable[[Model], Awaitable[None]],
    ) -> None:
        self._registry = registry
        self._models = models
        self._switching = switching
        self._on_node = on_node
        self._put_to_sleep = put_to_sleep

    async def make(self, model: Model, plan: Plan) -> WeightPlan:
        """Let others sleep until a model fits, the idle ones first, the one used longest ago before the others.

        Where it fits only when a busy one sleeps, it waits for one of them to be idle, and after `switch_after_s` lets
        the one that has been awake longest come to its end.

        Args:
            plan: of the model, while some others sleep; blocks, and raises BudgetError.

        Returns:
            Its plan now.

        Raises:
            BudgetError: it does not fit, whoever sleeps.
        """
        patience = time.monotonic() + self._switching.switch_after_s
        while True:
            others = self._others(model)
            idle = [each.model_id for each in others if not each.busy]
            try:
                sleepers, chosen = await self._on_node(lambda: who_sleeps(plan, idle))  # noqa: B023
            except BudgetError:
                if leaving := [each.leaving for each in self._models.values() if each.leaving is not None]:
                    await asyncio.wait(leaving)
                    continue
                busy = [each for each in others if each.busy]
                if len(idle) == len(others):
                    raise
                if not busy:
                    continue  # the last of them has become idle meanwhile
                everybody = [each.model_id for each in others]
                await self._on_node(lambda: ((), plan(everybody)))  # noqa: B023 - else this is the error
                if time.monotonic() <= patience:
                    await asyncio.sleep(LOOK_S)
                    continue
                await self._put_to_sleep(min(busy, key=lambda each: each.began))
                patience = time.monotonic() + self._switching.switch_after_s
                continue
            if await self._all_sleep(sleepers):
                return chosen

    async def _all_sleep(self, model_ids: Collection[str]) -> bool:
        """Put idle models to sleep; False when one is not idle any more."""
        for model_id in model_ids:
            model = self._models[model_id]
            if model.engine is not None:
                if model.busy:
                    return False
                await self._put_to_sleep(model)
        return True

    def _others(self, model: Model) -> list[Model]:
        """Models that could sleep in favour of `model`, the one used longest ago first."""
        awake = [each for each in self._models.values() if each is not model and each.engine is not None]
        movable = [each for each in awake if not self._registry.get(each.model_id).pinned]
        return sorted(movable, key=lambda each: each.used)
