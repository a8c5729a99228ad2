"""What an engine that ends leaves on disk for the next one."""

from __future__ import annotations

import logging
import time

from raytier.engine.scheduler import Scheduler
from raytier.engine.step import StepExecutor
from raytier.errors import RaytierError
from raytier.kv.cache import KVCache

logger = logging.getLogger(__name__)

#: The end of an engine is not delayed by more.
_MOST_S = 10.0


def keep_kv(kv: KVCache, scheduler: Scheduler, executor: StepExecutor) -> None:
    """Write what is worth it, and is not on disk yet, where the disk's files are kept; nothing runs any more."""
    if kv.lower is None or not kv.lower.shape.persist:
        return
    deadline = time.monotonic() + _MOST_S
    try:
        while time.monotonic() < deadline and (batch := scheduler.schedule_moves(keep=True)) is not None:
            scheduler.apply(executor.step(batch))
    except RaytierError as error:
        logger.warning("part of the KV cache is not kept: %s", error.message)
