"""The one thread of a device that computes: it runs what Ray's methods hand it, and steps as engines send them.

Steps do not come as Ray calls: with one for each, a step spent 2.7 ms outside of the device on two busy cores (gRPC and
its threads), with messages over a Unix socket 0.7. Ray places the processes, supervises them and carries what is rare.

Wire format, both ways: a message of `multiprocessing.connection` (length, then bytes) that holds one pickle: a
`StepBatch` there, a `StepResult` or the exception that the step raised back. The first message of a connection is the
device's key, which Ray alone gives out: nothing is unpickled of who does not know it. The socket lies in Linux's
abstract namespace, so that nothing is left of it when its process is killed.
"""

from __future__ import annotations

import errno
import logging
import os
import pickle
import secrets
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from raytier.engine.step import StepBatch, StepResult

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
#: Within it a message that has begun has to come, and an answer to be taken.
_MESSAGE_S = 30
_TIMEVAL = struct.Struct("ll")


@dataclass(frozen=True, slots=True)
class Address:
    """Where engines of this machine connect to a device, and the key that opens it."""

    name: str
    key: bytes = field(repr=False)


class ComputeThread:
    """Runs functions and steps in one thread, in the order in which they come.

    What ends the thread ends the process: an engine would wait for ever.

    Args:
        step: runs a step. What it raises goes to the engine that sent the step.

    Attributes:
        address: what a `StepConnection` takes.
    """

    def __init__(self, step: Callable[[StepBatch], StepResult]) -> None:
        self._step = step
        self.address = Address(f"raytier-{os.getpid()}-{secrets.token_hex(8)}", secrets.token_bytes(32))
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind("\0" + self.address.name)
        self._listener.listen()
        self._listener.setblocking(False)
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ, self._run_calls)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        threading.Thread(target=self._run, name="compute", daemon=True).start()

    def call(self, function: Callable[[], _T]) -> _T:
        """What `function` returns or raises, run by the thread between two steps."""
        answer: Future[_T] = Future()
        self._calls.put(partial(_settle, answer, function))
        os.eventfd_write(self._wake, 1)
        return answer.result()

    def _run(self) -> None:
        try:
            while True:
                for key, _ in self._selector.select():
                    key.data()
        except BaseException:
            logger.exception("the thread that computes has ended, and its process with it")
            os._exit(1)

    def _run_calls(self) -> None:
        os.eventfd_read(self._wake)
        while True:
            try:
                run = self._calls.get_nowait()
            except Empty:
                return
            run()

    def _accept(self) -> None:
        try:
            peer, _ = self._listener.accept()
        except OSError as error:
            logger.warning("no connection could be accepted: %s", error)
            return
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            peer.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(_MESSAGE_S, 0))
        connection = Connection(peer.detach())
        self._selector.register(connection, selectors.EVENT_READ, partial(self._admit, connection))

    def _admit(self, connection: Connection) -> None:
        """Take the key of who has connected."""
        try:
            key = connection.recv_bytes(len(self.address.key))
        except (EOFError, OSError):
            key = b""
        if secrets.compare_digest(key, self.address.key):
            self._selector.modify(connection, selectors.EVENT_READ, partial(self._serve, connection))
        else:
            logger.warning("a connection without the key was refused")
            self._drop(connection)

    def _serve(self, connection: Connection) -> None:
        """Run the step that has come; the end of the connection when its engine has ended."""
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            self._drop(connection)
            return
        answer = _answer(self._step, message)
        try:
            connection.send_bytes(answer)
        except OSError:
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        self._selector.unregister(connection)
        connection.close()


class StepConnection:
    """An engine's end: sends steps to a device's `ComputeThread`. For one thread at a time."""

    def __init__(self, address: Address) -> None:
        """Connect to a device of this machine.

        Raises:
            ConnectionError: nobody listens there.
        """
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            peer.connect("\0" + address.name)
        except OSError as error:
            peer.close()
            if error.errno == errno.ECONNREFUSED:
                raise ConnectionError(f"no device listens at {address.name} on this machine") from None
            raise
        self._connection = Connection(peer.detach())
        self._connection.send_bytes(address.key)

    def step(self, batch: StepBatch) -> StepResult:
        """Run one step and wait for its end.

        Raises:
            ConnectionError: the device is gone. Anything else: what the step raised.
        """
        message = pickle.dumps(batch, pickle.HIGHEST_PROTOCOL)
        try:
            self._connection.send_bytes(message)
            message = self._connection.recv_bytes()
        except (EOFError, OSError) as error:
            raise ConnectionError(f"the connection to the device ended: {error!r}") from None
        answer: StepResult | Exception = pickle.loads(message)  # noqa: S301 - our own device
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """No step runs any more."""
        self._connection.close()


def _settle(answer: Future[Any], function: Callable[[], Any]) -> None:
    try:
        result = function()
    except BaseException as error:  # whoever called gets it
        answer.set_exception(error)
    else:
        answer.set_result(result)


def _answer(step: Callable[[StepBatch], StepResult], message: bytes) -> bytes:
    """The pickled result of the step in `message`, or the exception that it raised."""
    try:
        return pickle.dumps(step(pickle.loads(message)), pickle.HIGHEST_PROTOCOL)  # noqa: S301 - of who has the key
    except BaseException as error:  # a panic of a library in Rust is no Exception
        logger.exception("a step failed")
        try:
            answer = pickle.dumps(error, pickle.HIGHEST_PROTOCOL)
            if not isinstance(pickle.loads(answer), Exception):  # noqa: S301 - our own
                raise TypeError("no exception that an engine could raise")
        except Exception:  # some cannot be pickled, or made from what they pickle
            return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"), pickle.HIGHEST_PROTOCOL)
        return answer
