"""Which parameters are to move to which tier: a bounded queue by priority, and the state of every transfer."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from enum import StrEnum

from raytier.errors import (
    InvalidRequestError,
    ResourceNotAvailableError,
    TransferNotFoundError,
    TransferQueueFullError,
)

logger = logging.getLogger(__name__)

#: Transfers that may wait.
CAPACITY = 200
#: Finished transfers that can still be asked for.
HISTORY = 1000
#: The first is 1, the last 10; prefetches that move parameters use 7.
PRIORITIES = range(1, 11)
DEFAULT_PRIORITY = 5


class TransferState(StrEnum):
    PENDING = "pending"
    PROCESSING = "processing"
    COMPLETED = "completed"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Transfer:
    """One transfer as it was when it was asked for; it does not change any more.

    Attributes:
        id: made by the queue, not guessable from others.
        model_id: the model that the parameters belong to.
        target: what the user asked for: the name of a parameter, or of a layer.
        names: the parameters that move, together.
        destination: the tier that they go to.
        reason: why it failed, else None.
        submitted_at, started_at, finished_at: seconds since the epoch; None while that has not happened.
        nbytes: bytes that were moved.
        seconds: that moving them took, waiting in the queue not counted.
        sources: parameter -> tier that it came from; empty until completed.
    """

    id: str
    model_id: str
    target: str
    names: tuple[str, ...]
    destination: str
    priority: int
    state: TransferState
    submitted_at: float
    started_at: float | None = None
    finished_at: float | None = None
    reason: str | None = None
    nbytes: int = 0
    seconds: float = 0.0
    sources: Mapping[str, str] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.state in (TransferState.COMPLETED, TransferState.FAILED)


@dataclass(frozen=True, slots=True)
class TransferCounts:
    """Transfers waiting and in work now; finished ones and bytes moved since the queue was made."""

    pending: int
    processing: int
    completed: int
    failed: int
    nbytes: int


class TransferQueue:
    """Transfers in the order of their work: by priority, then first come first served.

    Any thread may call anything. Whoever executes transfers takes them with `next` and ends each with `complete` or
    `fail`; the queue has no thread of its own. Callbacks and futures are called without the lock held, on the thread
    that ends the transfer.

    Invariant: a transfer is pending (and in the heap once), processing, or among the newest `history` finished ones;
    its future is done when and only when it is finished and has been announced.
    """

    def __init__(self, capacity: int = CAPACITY, history: int = HISTORY) -> None:
        if capacity < 1 or history < 1:
            raise ValueError(f"capacity {capacity}, history {history}: both must be at least 1")
        self._capacity = capacity
        self._transfers: dict[str, Transfer] = {}
        self._futures: dict[str, Future[Transfer]] = {}
        self._waiting: list[tuple[int, int, str]] = []  # heap of (priority, number, id), pending ones only
        self._processing: set[str] = set()
        self._finished: deque[str] = deque()
        self._history = history
        self._numbers = itertools.count()
        self._completed = self._failed = self._nbytes = 0
        self._closed: str | None = None
        self._changed = threading.Condition()

    def submit(
        self,
        names: Sequence[str],
        destination: str,
        priority: int = DEFAULT_PRIORITY,
        *,
        target: str,
        model_id: str,
        on_finished: Callable[[Transfer], None] | None = None,
    ) -> Transfer:
        """Let `names` wait for their move to `destination`.

        Args:
            on_finished: called once with the finished transfer; what it raises is logged.

        Raises:
            InvalidRequestError: the priority is none, or there is nothing to move.
            TransferQueueFullError: as many wait already as may wait.
            ResourceNotAvailableError: the queue is closed.
        """
        if isinstance(priority, bool) or not isinstance(priority, int) or priority not in PRIORITIES:
            raise InvalidRequestError(
                f"priority: {priority!r} is not a whole number from {PRIORITIES[0]} (first) to {PRIORITIES[-1]}",
                param="priority",
            )
        if not names:
            raise InvalidRequestError(f"{target} names no parameter: there is nothing to move")
        future: Future[Transfer] = Future()
        future.set_running_or_notify_cancel()  # one waiter that gives up must not take the result from the others
        if on_finished is not None:
            future.add_done_callback(_guarded(on_finished))
        with self._changed:
            if self._closed is not None:
                raise ResourceNotAvailableError(f"nothing can be moved: {self._closed}")
            if len(self._waiting) >= self._capacity:
                raise TransferQueueFullError(
                    f"{len(self._waiting)} transfers wait, no more may: ask again when some of them have ended"
                )
            transfer = Transfer(
                id=uuid.uuid4().hex,
                model_id=model_id,
                target=target,
                names=tuple(names),
                destination=destination,
                priority=priority,
                state=TransferState.PENDING,
                submitted_at=time.time(),
            )
            self._transfers[transfer.id] = transfer
            self._futures[transfer.id] = future
            heapq.heappush(self._waiting, (priority, next(self._numbers), transfer.id))
            self._changed.notify()
        return transfer

    def next(self, timeout: float | None = None) -> Transfer | None:
        """Take the transfer that is to be worked on now, waiting for one up to `timeout` seconds (None: for ever).

        None when none came in time, or when the queue was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed is not None, timeout)
            if not self._waiting:
                return None
            _, _, transfer_id = heapq.heappop(self._waiting)
            self._processing.add(transfer_id)
            return self._replace(transfer_id, state=TransferState.PROCESSING, started_at=time.time())

    def complete(self, transfer_id: str, *, nbytes: int, seconds: float, sources: Mapping[str, str]) -> Transfer:
        """A transfer that was taken with `next` is done; see `Transfer` for the arguments.

        Raises:
            TransferNotFoundError: the id is not known. ValueError: it is not being worked on.
        """
        with self._changed:
            if self._get(transfer_id).state is not TransferState.PROCESSING:
                raise ValueError(f"transfer {transfer_id} is {self._get(transfer_id).state}, it cannot be completed")
            self._completed += 1
            self._nbytes += nbytes
            future = self._finish(
                transfer_id,
                state=TransferState.COMPLETED,
                nbytes=nbytes,
                seconds=seconds,
                sources=dict(sources),
            )
            transfer = self._transfers[transfer_id]
        future.set_result(transfer)
        return transfer

    def fail(self, transfer_id: str, reason: str) -> Transfer:
        """A transfer, pending or processing, ends without having moved anything.

        Raises:
            TransferNotFoundError: the id is not known. ValueError: it has ended already.
        """
        with self._changed:
            if self._get(transfer_id).finished:
                raise ValueError(f"transfer {transfer_id} is {self._get(transfer_id).state}, it cannot fail any more")
            self._waiting = [entry for entry in self._waiting if entry[2] != transfer_id]
            heapq.heapify(self._waiting)
            future = self._fail(transfer_id, reason)
            transfer = self._transfers[transfer_id]
        future.set_result(transfer)
        return transfer

    def fail_pending(self, reason: str, model_id: str | None = None) -> int:
        """Fail all that wait (of one model, or all); returns how many did. What is being worked on goes on."""
        with self._changed:
            dropped = [
                transfer_id
                for _, _, transfer_id in sorted(self._waiting)
                if model_id is None or self._transfers[transfer_id].model_id == model_id
            ]
            self._waiting = [entry for entry in self._waiting if entry[2] not in set(dropped)]
            heapq.heapify(self._waiting)
            ended = [(self._fail(transfer_id, reason), self._transfers[transfer_id]) for transfer_id in dropped]
        for future, transfer in ended:
            future.set_result(transfer)
        return len(ended)

    def close(self, reason: str) -> None:
        """Take no more, fail all that wait, wake whoever waits in `next`.

        Who works on a transfer still ends it with `complete` or `fail`.
        """
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()
        self.fail_pending(reason)

    def get(self, transfer_id: str) -> Transfer:
        """The transfer as it is now; TransferNotFoundError when it is not known, or was finished long ago."""
        with self._changed:
            return self._get(transfer_id)

    def transfers(self) -> tuple[Transfer, ...]:
        """All known transfers, the oldest first."""
        with self._changed:
            return tuple(self._transfers.values())

    def counts(self) -> TransferCounts:
        with self._changed:
            pending, processing = len(self._waiting), len(self._processing)
            return TransferCounts(pending, processing, self._completed, self._failed, self._nbytes)

    def future(self, transfer_id: str) -> Future[Transfer]:
        """Becomes the finished transfer, failed or completed; `asyncio.wrap_future` makes it awaitable.

        Shared by all who wait: cancelling it has no effect.
        """
        with self._changed:
            self._get(transfer_id)
            return self._futures[transfer_id]

    def wait(self, transfer_id: str, timeout: float | None = None) -> Transfer:
        """Block until the transfer is finished and return it; TimeoutError when `timeout` seconds did not suffice."""
        return self.future(transfer_id).result(timeout)

    def check_integrity(self) -> None:
        """AssertionError unless the invariant holds."""
        with self._changed:
            waiting = [transfer_id for _, _, transfer_id in self._waiting]
            by_state: dict[TransferState, set[str]] = {state: set() for state in TransferState}
            for transfer_id, transfer in self._transfers.items():
                by_state[transfer.state].add(transfer_id)
            assert len(waiting) == len(set(waiting)) <= self._capacity
            assert set(waiting) == by_state[TransferState.PENDING]
            assert self._processing == by_state[TransferState.PROCESSING]
            ended = by_state[TransferState.COMPLETED] | by_state[TransferState.FAILED]
            assert set(self._finished) == ended
            assert len(self._finished) == len(ended) <= self._history
            assert self._futures.keys() == self._transfers.keys()
            unfinished = [*waiting, *self._processing]
            assert not any(self._futures[transfer_id].done() for transfer_id in unfinished), "told before it ended"
            assert self._closed is None or not waiting

    # The four below are called with the lock held.

    def _get(self, transfer_id: str) -> Transfer:
        try:
            return self._transfers[transfer_id]
        except KeyError:
            raise TransferNotFoundError(
                f"transfer {transfer_id!r} is not known: the last {self._history} finished ones are kept"
            ) from None

    def _replace(self, transfer_id: str, **changes: object) -> Transfer:
        transfer = self._transfers[transfer_id] = replace(self._transfers[transfer_id], **changes)  # type: ignore[arg-type]
        return transfer

    def _fail(self, transfer_id: str, reason: str) -> Future[Transfer]:
        self._failed += 1
        return self._finish(transfer_id, state=TransferState.FAILED, reason=reason)

    def _finish(self, transfer_id: str, **changes: object) -> Future[Transfer]:
        """Record the end, forget the oldest; returns the future, which the caller resolves without the lock."""
        self._replace(transfer_id, finished_at=time.time(), **changes)
        self._processing.discard(transfer_id)
        self._finished.append(transfer_id)
        future = self._futures[transfer_id]
        while len(self._finished) > self._history:
            oldest = self._finished.popleft()
            del self._transfers[oldest], self._futures[oldest]
        return future


def _guarded(callback: Callable[[Transfer], None]) -> Callable[[Future[Transfer]], None]:
    def call(future: Future[Transfer]) -> None:
        transfer = future.result()
        try:
            callback(transfer)
        except Exception:
            logger.exception("the callback of transfer %s (%s) failed", transfer.id, transfer.target)

    return call
