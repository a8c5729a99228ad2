"""Loading what stays in memory, in the order in which a sweep needs it, behind the first steps."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress

from torch import Tensor

from raytier.checkpoint.manifest import ModelManifest, Role
from raytier.errors import TierError
from raytier.execution.binding import members
from raytier.execution.formed import plain
from raytier.execution.layout import assemble, parameter_unit
from raytier.execution.reader import Urgency
from raytier.execution.sources import Sources
from raytier.execution.threads import compute_with
from raytier.planner.plan import FILE_TIERS, Tier
from raytier.tiers.aligned import AlignedBuffer

#: Groups whose reads are under way: one arrives while the next one's requests wait behind it.
_AHEAD = 2

Finish = Callable[[], None]


class ResidentLoader:
    """A thread that loads groups one after the other; whoever needs a group waits for that one alone.

    Args:
        groups: keys in the order of their use, each with what `begin` takes.
        begin: starts to read a group and returns a function that waits for it and puts it where it stays.
        afterwards: run on the thread when all groups are there; asks the function that it is given whether to stop.
    """

    def __init__(
        self,
        groups: Sequence[tuple[Hashable, Sequence[str]]],
        begin: Callable[[Sequence[str]], Finish],
        afterwards: Callable[[Callable[[], bool]], None],
    ) -> None:
        self._groups = groups
        self._begin = begin
        self._afterwards = afterwards
        self._ready = {key: threading.Event() for key, _ in groups}
        self._done = threading.Event()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="raytier-load", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether everything is there, what runs afterwards included, or the loading has failed."""
        return self._done.is_set()

    def wait(self, key: Hashable) -> None:
        """Return when group `key` is there; at once when there is no such group.

        Raises:
            TierError, CheckpointError: what went wrong, in this group or before it.
        """
        event = self._ready.get(key)
        if event is not None:
            event.wait()
            self._check()

    def wait_all(self) -> None:
        """Return when everything is there; raises as `wait`."""
        self._done.wait()
        self._check()

    def close(self) -> None:
        """End the thread; groups that are not there fail."""
        self._stop.set()
        self._thread.join()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        compute_with(1)  # beside the steps
        begun: deque[tuple[Hashable, Finish]] = deque()
        try:
            for key, names in self._groups:
                begun.append((key, self._begin(names)))
                if len(begun) > _AHEAD:
                    self._finish(*begun.popleft())
            while begun:
                self._finish(*begun.popleft())
            self._afterwards(self._stop.is_set)
        except BaseException as error:  # whatever it is, the ones who wait must hear of it
            self._error = error
        finally:
            for _, finish in begun:  # no read may go on into memory that is given up
                with suppress(Exception):
                    finish()
            for event in self._ready.values():
                event.set()
            self._done.set()

    def _finish(self, key: Hashable, finish: Finish) -> None:
        if self._stop.is_set():
            raise TierError("the model was unloaded while it was being loaded")
        finish()
        self._ready[key].set()


def groups_in_memory(manifest: ModelManifest, tier_of: Mapping[str, Tier]) -> list[tuple[Hashable, list[str]]]:
    """Names of what is to be in memory, grouped by when a sweep needs it first: by layer, or `Role`."""
    groups: dict[Hashable, list[str]] = {Role.OTHER: []}
    groups |= {layer: [] for layer in range(manifest.num_layers)}
    groups[Role.HEAD] = []
    for p in manifest.parameters:
        if tier_of[p.name] not in FILE_TIERS:
            groups[p.layer if p.layer is not None else Role.HEAD if p.role is Role.HEAD else Role.OTHER].append(p.name)
    return list(groups.items())


def begin_read(sources: Sources, name: str, urgency: Urgency) -> tuple[AlignedBuffer, Callable[[], Tensor]]:
    """Start to read a parameter into memory of its own; the function waits and gives the tensor that lies in it.

    The function raises TierError when a read failed.
    """
    unit = parameter_unit(sources.exact(name), sources.manifest.files)
    buffer = AlignedBuffer(unit.nbytes)
    ticket = sources.pool.submit(unit.reads, buffer.view, urgency)

    def arrived() -> Tensor:
        ticket.wait()
        assemble(unit, buffer.view)
        return plain(members(unit, buffer.view, sources.checkpoint)[name])

    return buffer, arrived
