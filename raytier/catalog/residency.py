"""Which idle models sleep so that another one runs well. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from raytier.errors import BudgetError
from raytier.planner.plan import WeightPlan

#: A plan whose predicted step takes at most so much longer than the best one's is as good.
AS_GOOD = 1.1


def who_sleeps(
    plan: Callable[[Collection[str]], WeightPlan], idle: Sequence[str]
) -> tuple[tuple[str, ...], WeightPlan]:
    """The fewest of `idle` that have to sleep for a model to run about as fast as if all of them did, and its plan.

    Idle models cost nothing but their memory, so a model that would have to stream for lack of it takes it; one that
    runs as fast beside them leaves them awake.

    Args:
        plan: the plan of the model while some others sleep; raises BudgetError where it does not fit then.
        idle: models that may sleep, in the order in which they should.

    Raises:
        BudgetError: it does not fit even while all of them sleep.
    """
    best = plan(idle)
    for count in range(len(idle)):
        try:
            found = plan(idle[:count])
        except BudgetError:
            continue
        if _step_seconds(found) <= AS_GOOD * _step_seconds(best):
            return tuple(idle[:count]), found
    return tuple(idle), best


def _step_seconds(plan: WeightPlan) -> float:
    return plan.predictions[0].seconds
