"""The one thread of a device that computes: it runs what Ray's methods hand it, and steps as engines send them.

Steps do not come as Ray calls: on two busy cores a call there and back takes 2.7 ms (gRPC and its threads), a message
over a Unix socket a tenth of that. Ray places the processes, supervises them and carries everything rare.

Wire format, both ways: a message of `multiprocessing.connection` (length, then bytes) that holds one pickle: a
`StepBatch` there, a `StepResult` or the exception that the step raised back. The socket lies in Linux's abstract
namespace, so that nothing is left of it when its process is killed, and takes connections of the same user only.
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
from functools import partial
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from raytier.engine.step import StepBatch, StepResult

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
#: What `SO_PEERCRED` yields: pid, uid, gid.
_CREDENTIALS = struct.Struct("iII")


class ComputeThread:
    """Runs functions and steps in one thread, in the order in which they come.

    Args:
        step: runs a step. What it raises goes to the engine that sent the step.

    Attributes:
        address: where engines connect (`connect`), on this machine.
    """

    def __init__(self, step: Callable[[StepBatch], StepResult]) -> None:
        self._step = step
        self.address = f"raytier-{os.getpid()}-{secrets.token_hex(8)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind("\0" + self.address)
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
        while True:
            for key, _ in self._selector.select():
                key.data()

    def _run_calls(self) -> None:
        os.eventfd_read(self._wake)
        while True:
            try:
                run = self._calls.get_nowait()
            except Empty:
                return
            run()

    def _accept(self) -> None:
        peer, _ = self._listener.accept()
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _ = _CREDENTIALS.unpack(credentials)
        if uid != os.geteuid():  # what it sends would be unpickled
            logger.warning("process %d of user %d was refused", pid, uid)
            peer.close()
            return
        connection = Connection(peer.detach())
        self._selector.register(connection, selectors.EVENT_READ, partial(self._serve, connection))

    def _serve(self, connection: Connection) -> None:
        """Run the step that has come; the end of the connection when its engine has ended."""
        try:
            message = connection.recv_bytes()
        except (EOFError, OSError):
            self._drop(connection)
            return
        answer = _answer(self._step, pickle.loads(message))  # noqa: S301 - of the same user
        try:
            connection.send_bytes(answer)
        except OSError:
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        self._selector.unregister(connection)
        connection.close()


class StepConnection:
    """An engine's end: sends steps to a device's `ComputeThread`. For one thread at a time."""

    def __init__(self, address: str) -> None:
        """Connect to a device of this machine.

        Raises:
            ConnectionError: nobody listens there.
        """
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            peer.connect("\0" + address)
        except OSError as error:
            peer.close()
            if error.errno == errno.ECONNREFUSED:
                raise ConnectionError(f"no device listens at {address} on this machine") from None
            raise
        self._connection = Connection(peer.detach())

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


def _answer(step: Callable[[StepBatch], StepResult], batch: StepBatch) -> bytes:
    """The pickled result of a step, or the exception that it raised, with its traceback in words."""
    try:
        return pickle.dumps(step(batch), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        logger.exception("step %d of %s failed", batch.step, batch.model_id)
        try:
            answer = pickle.dumps(error, pickle.HIGHEST_PROTOCOL)
            pickle.loads(answer)  # noqa: S301 - some exceptions cannot be made from what they pickle
        except Exception:
            return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"), pickle.HIGHEST_PROTOCOL)
        return answer
