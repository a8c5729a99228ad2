"""D5: the queue of transfers: order, bounds, states, and that whoever waits is told."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from raytier.errors import (
    InvalidRequestError,
    ResourceNotAvailableError,
    TransferNotFoundError,
    TransferQueueFullError,
)
from raytier.tiers.transfers import Transfer, TransferQueue, TransferState


def submit(queue: TransferQueue, name: str, priority: int = 5, model_id: str = "m") -> Transfer:
    return queue.submit((name,), "host", priority, target=name, model_id=model_id)


def test_priority_first_then_first_come_first_served() -> None:
    queue = TransferQueue()
    for name, priority in [("a", 7), ("b", 5), ("c", 1), ("d", 5), ("e", 10), ("f", 1)]:
        submit(queue, name, priority)
    taken = [queue.next(0) for _ in range(6)]
    assert [transfer.target for transfer in taken if transfer] == ["c", "f", "b", "d", "a", "e"]
    assert queue.next(0) is None


@pytest.mark.parametrize("priority", [0, 11, -1, 5.0, True, "5", None])
def test_a_priority_that_is_none_names_the_range(priority: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"priority: .* from 1 \(first\) to 10") as caught:
        TransferQueue().submit(("a",), "host", priority, target="a", model_id="m")  # type: ignore[arg-type]
    assert caught.value.param == "priority"


def test_nothing_to_move_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="layer 3 names no parameter"):
        TransferQueue().submit((), "host", target="layer 3", model_id="m")


def test_two_hundred_may_wait_and_no_more() -> None:
    queue = TransferQueue()
    for number in range(200):
        submit(queue, str(number))
    with pytest.raises(TransferQueueFullError, match="200 transfers wait") as caught:
        submit(queue, "one more", priority=1)
    assert caught.value.http_status == 503
    assert queue.next(0) is not None  # what is being worked on does not wait
    submit(queue, "one more")
    queue.check_integrity()


def test_a_transfer_from_beginning_to_end() -> None:
    queue = TransferQueue()
    before = time.time()
    asked = queue.submit(("a", "b"), "nvme", 3, target="layer 0", model_id="m")
    assert (asked.state, asked.names, asked.target, asked.destination) == ("pending", ("a", "b"), "layer 0", "nvme")
    working = queue.next()
    assert working == queue.get(asked.id)
    assert working is not None and working.state is TransferState.PROCESSING
    done = queue.complete(asked.id, nbytes=12, seconds=0.5, sources={"a": "host", "b": "device"})
    assert done.state is TransferState.COMPLETED and done.finished
    assert (done.nbytes, done.seconds, done.sources, done.reason) == (12, 0.5, {"a": "host", "b": "device"}, None)
    assert done.started_at is not None and done.finished_at is not None
    assert before <= done.submitted_at <= done.started_at <= done.finished_at <= time.time()
    assert asked.state is TransferState.PENDING, "what was handed out does not change"
    counts = queue.counts()
    assert (counts.pending, counts.processing, counts.completed, counts.failed, counts.nbytes) == (0, 0, 1, 0, 12)


def test_a_failed_one_says_why_and_can_end_before_it_began() -> None:
    queue = TransferQueue()
    first, second = submit(queue, "a"), submit(queue, "b")
    assert queue.fail(second.id, "the model was unloaded").reason == "the model was unloaded"
    taken = queue.next(0)
    assert taken is not None and taken.id == first.id
    assert queue.fail(first.id, "host is full").state is TransferState.FAILED
    assert queue.next(0) is None
    assert queue.counts().failed == 2
    for end in (
        lambda: queue.fail(first.id, "again"),
        lambda: queue.complete(first.id, nbytes=0, seconds=0, sources={}),
    ):
        with pytest.raises(ValueError, match="is failed"):
            end()
    with pytest.raises(ValueError, match="is pending"):
        queue.complete(submit(queue, "c").id, nbytes=0, seconds=0, sources={})
    queue.check_integrity()


def test_unknown_ids_and_those_long_gone() -> None:
    queue = TransferQueue(history=2)
    ids = [submit(queue, str(number)).id for number in range(3)]
    for each in ids:
        queue.fail(each, "no")
    queue.check_integrity()
    assert [queue.get(each).id for each in ids[1:]] == ids[1:]
    for unknown in (ids[0], "nonsense"):
        for ask in (queue.get, queue.future, queue.wait, lambda unknown: queue.fail(unknown, "x")):
            with pytest.raises(TransferNotFoundError, match="the last 2 finished ones are kept"):
                ask(unknown)
    assert TransferNotFoundError.http_status == 404
    assert [transfer.id for transfer in queue.transfers()] == ids[1:]
    assert queue.counts().failed == 3, "counted although forgotten"


def test_next_waits_for_work() -> None:
    queue = TransferQueue()
    began = time.monotonic()
    assert queue.next(0.05) is None
    assert time.monotonic() - began >= 0.05
    taken: list[Transfer | None] = []
    worker = threading.Thread(target=lambda: taken.append(queue.next(30)))
    worker.start()
    asked = submit(queue, "a")
    worker.join(10)
    assert [each and each.id for each in taken] == [asked.id]


def test_wait_returns_what_came_of_it() -> None:
    queue = TransferQueue()
    asked = submit(queue, "a")
    with pytest.raises(TimeoutError):
        queue.wait(asked.id, 0.01)
    ended = threading.Timer(0.05, queue.fail, (asked.id, "no room"))
    ended.start()
    assert queue.wait(asked.id, 10).reason == "no room"
    assert queue.wait(asked.id, 0).reason == "no room"
    ended.join()


async def test_awaited_by_many_and_one_gives_up() -> None:
    queue = TransferQueue()
    asked = submit(queue, "a")
    impatient, patient = (asyncio.wrap_future(queue.future(asked.id)) for _ in range(2))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(impatient, 0.01)
    queue.next(0)
    threading.Timer(0.02, lambda: queue.complete(asked.id, nbytes=7, seconds=1, sources={})).start()
    assert (await asyncio.wait_for(patient, 10)).nbytes == 7


def test_callbacks_come_once_without_the_lock_and_their_errors_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    queue = TransferQueue()
    told: list[tuple[str, str | None]] = []

    def callback(transfer: Transfer) -> None:
        other = threading.Thread(target=queue.counts)  # would never come back if the lock were held
        other.start()
        other.join(5)
        assert not other.is_alive()
        told.append((queue.get(transfer.id).state, transfer.reason))
        raise RuntimeError("the callback's own error")

    with caplog.at_level(logging.ERROR):
        asked = queue.submit(("a",), "host", target="a", model_id="m", on_finished=callback)
        queue.fail(asked.id, "no")
    assert told == [("failed", "no")]
    assert f"the callback of transfer {asked.id} (a) failed" in caplog.text
    assert queue.wait(asked.id, 0).reason == "no", "who waits is told all the same"


def test_the_pending_ones_of_a_model_end_with_it() -> None:
    queue = TransferQueue()
    running = submit(queue, "running", 1)
    queue.next(0)
    gone = [submit(queue, name) for name in "ab"]
    stays = submit(queue, "c", model_id="other")
    assert queue.fail_pending("unloaded", "m") == 2
    queue.check_integrity()
    assert [queue.get(each.id).reason for each in gone] == ["unloaded", "unloaded"]
    assert [queue.get(each.id).state for each in (running, stays)] == ["processing", "pending"]


def test_close_fails_what_waits_wakes_the_worker_and_refuses_more() -> None:
    queue = TransferQueue()
    running, waiting = submit(queue, "a", 1), submit(queue, "b")
    queue.next(0)
    queue.close("the application is being stopped")
    queue.close("again")
    assert queue.wait(waiting.id, 0).reason == "the application is being stopped"
    assert queue.next() is None, "does not wait"
    with pytest.raises(ResourceNotAvailableError, match="the application is being stopped"):
        submit(queue, "c")
    assert queue.complete(running.id, nbytes=1, seconds=1, sources={}).finished
    queue.check_integrity()

    idle = TransferQueue()
    answers: list[Transfer | None] = []
    worker = threading.Thread(target=lambda: answers.append(idle.next()))
    worker.start()
    idle.close("end")
    worker.join(10)
    assert answers == [None]


def test_every_transfer_is_taken_once_by_many_threads() -> None:
    queue = TransferQueue(capacity=1000)
    taken: list[str] = []

    def work() -> None:
        while (transfer := queue.next(5)) is not None:
            taken.append(transfer.id)
            queue.complete(transfer.id, nbytes=1, seconds=0, sources={})

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    asked = [submit(queue, str(number), 1 + number % 10).id for number in range(400)]
    for each in asked:
        queue.wait(each, 10)
    queue.close("done")
    for worker in workers:
        worker.join(10)
    assert sorted(taken) == sorted(asked)
    assert queue.counts().nbytes == 400
    queue.check_integrity()


class QueueMachine(RuleBasedStateMachine):
    """Against a model that is a sorted list."""

    CAPACITY, HISTORY = 4, 3

    def __init__(self) -> None:
        super().__init__()
        self.queue = TransferQueue(self.CAPACITY, self.HISTORY)
        self.waiting: list[tuple[int, int, str]] = []
        self.processing: list[str] = []
        self.finished: list[str] = []
        self.told: list[str] = []
        self.number = 0

    @rule(priority=st.integers(1, 10), model_id=st.sampled_from("mn"))
    def submit(self, priority: int, model_id: str) -> None:
        def ask() -> Transfer:
            return self.queue.submit(
                ("p",), "host", priority, target="p", model_id=model_id, on_finished=lambda t: self.told.append(t.id)
            )

        if len(self.waiting) == self.CAPACITY:
            with pytest.raises(TransferQueueFullError):
                ask()
            return
        self.number += 1
        self.waiting.append((priority, self.number, ask().id))
        self.waiting.sort()

    @rule()
    def next(self) -> None:
        taken = self.queue.next(0)
        if not self.waiting:
            assert taken is None
            return
        assert taken is not None
        assert taken.id == self.waiting.pop(0)[2]
        self.processing.append(taken.id)

    @precondition(lambda self: self.processing)
    @rule(data=st.data(), success=st.booleans())
    def end(self, data: st.DataObject, success: bool) -> None:
        chosen = data.draw(st.sampled_from(self.processing))
        if success:
            self.queue.complete(chosen, nbytes=1, seconds=0, sources={})
        else:
            self.queue.fail(chosen, "no")
        self.processing.remove(chosen)
        self.finished.append(chosen)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(self.waiting))
        self.queue.fail(chosen[2], "cancelled")
        self.waiting.remove(chosen)
        self.finished.append(chosen[2])

    @rule(model_id=st.sampled_from(["m", "n", None]))
    def drop(self, model_id: str | None) -> None:
        dropped = [entry for entry in self.waiting if model_id in (None, self.queue.get(entry[2]).model_id)]
        assert self.queue.fail_pending("unloaded", model_id) == len(dropped)
        self.waiting = [entry for entry in self.waiting if entry not in dropped]
        self.finished += [entry[2] for entry in dropped]

    @invariant()
    def agrees(self) -> None:
        self.queue.check_integrity()
        counts = self.queue.counts()
        assert (counts.pending, counts.processing) == (len(self.waiting), len(self.processing))
        assert counts.completed + counts.failed == len(self.finished)
        assert self.told == self.finished
        kept = self.finished[-self.HISTORY :]
        known = {transfer.id for transfer in self.queue.transfers()}
        assert known == {*kept, *self.processing, *(entry[2] for entry in self.waiting)}


QueueMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
test_queue_matches_its_model = QueueMachine.TestCase
