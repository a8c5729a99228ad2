"""D4: steps reach a device as messages, run in its one computing thread, and end clearly when either side goes."""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from raytier.actors.compute import Address, ComputeThread, StepConnection
from raytier.engine.step import SequenceChunk, StepBatch, StepResult, StepStats
from raytier.errors import TierError


class Device:
    """Answers steps with the sums of their tokens, and remembers in which threads it did."""

    def __init__(self) -> None:
        self.threads: set[int] = set()
        self.entered = threading.Event()
        self.go = threading.Event()
        self.go.set()

    def step(self, batch: StepBatch) -> StepResult:
        self.threads.add(threading.get_ident())
        self.entered.set()
        assert self.go.wait(10)
        if batch.step == 13:
            raise TierError("the disk is gone")
        if batch.step == 15:
            raise Panic("rust")
        if batch.step == 14:
            raise Unpicklable(1, 2)
        return StepResult(batch.step, {c.seq_id: sum(c.token_ids) for c in batch.chunks}, StepStats(num_tokens=7))


class Panic(BaseException):
    pass


class Unpicklable(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__(f"{first} and {second}")


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def compute(device: Device) -> ComputeThread:
    return ComputeThread(device.step)


@pytest.fixture
def connection(compute: ComputeThread) -> Iterator[StepConnection]:
    one = StepConnection(compute.address)
    yield one
    one.close()


def batch_of(step: int, *tokens: int) -> StepBatch:
    return StepBatch("tiny", 1, step, (SequenceChunk(5, tokens, 0, (1, 2), True),))


def test_what_a_step_returns_and_raises_comes_back(connection: StepConnection) -> None:
    assert connection.step(batch_of(1, 2, 3)) == StepResult(1, {5: 5}, StepStats(num_tokens=7))
    with pytest.raises(TierError, match="the disk is gone"):
        connection.step(batch_of(13))
    with pytest.raises(RuntimeError, match="Unpicklable: 1 and 2"):
        connection.step(batch_of(14))
    assert connection.step(batch_of(2, *range(100_000))).tokens == {5: sum(range(100_000))}


def test_steps_and_calls_share_one_thread(device: Device, compute: ComputeThread, connection: StepConnection) -> None:
    assert compute.call(threading.get_ident) not in {threading.get_ident()}
    with pytest.raises(KeyError, match="nothing"):
        compute.call(lambda: {}["nothing"])
    device.go.clear()
    with ThreadPoolExecutor() as pool, StepConnectionTo(compute) as other:
        step = pool.submit(connection.step, batch_of(1, 1))
        assert device.entered.wait(10)
        call = pool.submit(compute.call, threading.get_ident)
        second = pool.submit(other.step, batch_of(2, 2))
        with pytest.raises(TimeoutError):
            call.result(timeout=0.05)
        device.go.set()
        assert step.result(10).tokens == {5: 1}
        assert second.result(10).tokens == {5: 2}
        assert device.threads == {call.result(10)}


class StepConnectionTo(StepConnection):
    def __init__(self, compute: ComputeThread) -> None:
        super().__init__(compute.address)

    def __enter__(self) -> StepConnection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_an_engine_that_goes_in_the_middle_of_a_step_or_a_message_harms_nobody(
    device: Device, compute: ComputeThread, connection: StepConnection
) -> None:
    device.go.clear()
    gone = StepConnection(compute.address)
    with ThreadPoolExecutor() as pool:
        sent = pool.submit(gone.step, batch_of(1, 1))
        assert device.entered.wait(10)
        peer = socket.socket(fileno=os.dup(gone._connection.fileno()))
        peer.shutdown(socket.SHUT_RDWR)
        peer.close()
        with pytest.raises(ConnectionError):
            sent.result(10)
    gone.close()
    half = StepConnection(compute.address)
    os.write(half._connection.fileno(), b"\0\0\1")
    half.close()
    device.go.set()
    assert connection.step(batch_of(2, 4)).tokens == {5: 4}
    assert compute.call(lambda: 3) == 3


def test_the_end_of_the_device_ends_a_step() -> None:
    code = (
        "import pickle, time; from raytier.actors.compute import ComputeThread\n"
        "compute = ComputeThread(lambda batch: time.sleep(60))\n"
        "print(pickle.dumps(compute.address).hex(), flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address: Address = pickle.loads(bytes.fromhex(process.stdout.readline()))  # noqa: S301
        connection = StepConnection(address)
        with ThreadPoolExecutor() as pool:
            step = pool.submit(connection.step, batch_of(1))
            process.send_signal(signal.SIGKILL)
            with pytest.raises(ConnectionError):
                step.result(10)
        connection.close()
    with pytest.raises(ConnectionError, match=f"no device listens at {address.name} on this machine"):
        StepConnection(address)
    assert address.name not in Path("/proc/net/unix").read_text(), "a killed process leaves nothing"


def test_nothing_is_unpickled_of_who_does_not_know_the_key(
    compute: ComputeThread, connection: StepConnection, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "exploded",)

    with caplog.at_level(logging.WARNING):
        for key in (b"", b"guess", bytes(32), bytes(100)):
            stranger = StepConnection(Address(compute.address.name, key))
            with suppress(OSError):
                stranger._connection.send_bytes(pickle.dumps(Bomb()))
            with pytest.raises((EOFError, OSError)):
                stranger._connection.recv_bytes()
            stranger.close()
    assert caplog.text.count("without the key was refused") == 4
    assert not (tmp_path / "exploded").exists()
    assert connection.step(batch_of(1, 4)).tokens == {5: 4}
    assert repr(compute.address.key) not in repr(compute.address)


def test_a_panic_reaches_the_engine_and_the_thread_goes_on(device: Device, connection: StepConnection) -> None:
    with pytest.raises(RuntimeError, match="Panic: rust"):
        connection.step(batch_of(15))
    assert connection.step(batch_of(1, 4)).tokens == {5: 4}


def test_the_end_of_the_thread_ends_the_process() -> None:
    code = (
        "import sys, time; from raytier.actors.compute import ComputeThread\n"
        "compute = ComputeThread(lambda batch: None); compute._selector.close()\n"
        "compute._calls.put(None)\nimport os; os.eventfd_write(compute._wake, 1); time.sleep(60)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1 and "its process with it" in ended.stderr
