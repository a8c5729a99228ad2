"""Moving parameters between tiers while generation goes on: what a user asks for, and who works it off (spec D5)."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from ray.exceptions import RayActorError

from raytier.actors.device import Move, MoveResult
from raytier.actors.executor import cause_of
from raytier.actors.places import Place
from raytier.checkpoint.manifest import ModelManifest
from raytier.codecs.forms import Form
from raytier.errors import InvalidRequestError, ParameterNotFoundError, RaytierError
from raytier.planner.budgets import DeviceKind
from raytier.planner.plan import Tier, TierSchemes
from raytier.planner.sizing import always_resident
from raytier.tiers.transfers import DEFAULT_PRIORITY, Transfer, TransferCounts, TransferQueue

logger = logging.getLogger(__name__)

_DESTINATIONS = "cpu or host, gpu:N or device:N, ramdisk, nvme"


@dataclass(frozen=True, slots=True)
class Target:
    """What a transfer moves: one parameter, or what can move of a decoder layer."""

    label: str
    names: tuple[str, ...]


class ParameterMover:
    """Moves parameters of one loaded model. One move at a time; everything else is safe from any thread.

    Invariant: `tier_of` is where every parameter is, and outside of the device each has its room in that tier and in
    no other.

    Args:
        tier_of: tier of every parameter when the model was loaded.
        send: has the device make a move.
        places: tiers in which room has to be obtained; nvme is not among them where the checkpoint is read in place.
        schemes: what each tier makes of a parameter.
        on_rounding: called when parameters are rounded otherwise than before they moved, so that KV that has been
            computed is not what would be computed now.
        file_tiers: ramdisk and nvme, as far as they may be used.
        index: number of the device.
    """

    def __init__(
        self,
        model_id: str,
        manifest: ModelManifest,
        tier_of: Mapping[str, Tier],
        send: Callable[[Move], MoveResult],
        places: Mapping[Tier, Place],
        *,
        schemes: TierSchemes,
        on_rounding: Callable[[], object],
        file_tiers: Sequence[Tier],
        kind: DeviceKind,
        index: int = 0,
    ) -> None:
        self.model_id = model_id
        self.manifest = manifest
        self.tier_of: Mapping[str, Tier] = dict(tier_of)
        self._send = send
        self._places = places
        self._schemes = schemes
        self._on_rounding = on_rounding
        self._file_tiers = tuple(file_tiers)
        self._kind = kind
        self._index = index

    def target(self, parameter: int | str | None = None, *, layer: int | None = None) -> Target:
        """What is meant by a parameter's id or name, or by the index of a decoder layer.

        Raises:
            ParameterNotFoundError: it does not exist. InvalidRequestError: it cannot move.
        """
        if (parameter is None) == (layer is None):
            raise InvalidRequestError("give either a parameter or a decoder layer", param="layer_id")
        manifest = self.manifest
        if layer is not None:
            if not 0 <= layer < manifest.num_layers:
                raise ParameterNotFoundError(
                    f"layer_index: {self.model_id} has the layers 0 to {manifest.num_layers - 1}, not {layer}",
                    param="layer_index",
                )
            names = [p.name for p in manifest.layer_parameters(layer) if always_resident(p, manifest) is None]
            if not names:
                raise InvalidRequestError(f"layer {layer} has no parameter that can move", param="layer_index")
            return Target(f"layer {layer}", tuple(names))
        assert parameter is not None
        found = self.manifest.parameters[self.parameter_id(parameter)]
        if (reason := always_resident(found, manifest)) is not None:
            raise InvalidRequestError(f"{found.name} cannot leave the device: {reason}", param="layer_id")
        return Target(found.name, (found.name,))

    def parameter_id(self, parameter: int | str) -> int:
        """Index in the manifest of a parameter given by that or by its name; ParameterNotFoundError."""
        parameters = self.manifest.parameters
        if isinstance(parameter, int) and not isinstance(parameter, bool):
            if 0 <= parameter < len(parameters):
                return parameter
            raise ParameterNotFoundError(
                f"layer_id: {self.model_id} has the ids 0 to {len(parameters) - 1}, not {parameter}", param="layer_id"
            )
        for index, known in enumerate(parameters):
            if parameter == known.name or parameter in known.aliases:
                return index
        raise ParameterNotFoundError(
            f"layer_id: {parameter!r} is no parameter of {self.model_id}; GET /api/layers lists them", param="layer_id"
        )

    def destination(self, text: str) -> Tier:
        """The tier that a user means by `text`.

        Raises:
            InvalidRequestError: nothing, or nothing that there is here.
        """
        match = re.fullmatch(r"(cpu|host|ramdisk|nvme)|(gpu|device)(?::(\d+))?", text.strip().lower())
        if match is None:
            raise _refused(f"{text!r} is no destination; known: {_DESTINATIONS}")
        plain, device, number = match.groups()
        if device == "gpu" and self._kind != "cuda":
            raise _refused(
                f"{self.model_id} is computed on the CPU, there is no {text}; device:{self._index} is the compute "
                "process's own memory, host the node's pool"
            )
        if device is not None:
            if number is not None and int(number) != self._index:
                raise _refused(f"{self.model_id} is computed on {device}:{self._index} alone, not on {text}")
            return Tier.DEVICE
        tier = Tier.HOST if plain == "cpu" else Tier(plain)
        if tier is not Tier.HOST and tier not in self._file_tiers:
            raise _refused(f"{tier} is not in use here: set tiers.{tier}.enabled")
        return tier

    def places_of(self, names: Sequence[str]) -> str:
        """Where these parameters are now, in words."""
        return ", ".join(dict.fromkeys(str(tier) for tier in Tier for name in names if self.tier_of[name] is tier))

    def nbytes(self, tier: Tier) -> int:
        """Bytes of the parameters that are in a tier now, as stored."""
        return sum(p.nbytes for p in self.manifest.parameters if self.tier_of[p.name] is tier)

    def move(self, names: Sequence[str], destination: Tier) -> MoveResult:
        """Bring parameters to a tier, all or none of them; those that are there already stay.

        Blocks until the device uses them from there. Their old room is given back, or the new one when that fails.

        Raises:
            ResourceNotAvailableError: the tier is full. TierError, CheckpointError: reading or writing failed.
            RayActorError: an actor is gone.
        """
        moving = tuple(name for name in names if self.tier_of[name] is not destination)
        if not moving:
            return MoveResult(0, 0.0, {})
        place = self._places.get(destination)
        order = place.obtain(moving) if place is not None else Move(moving, destination)
        try:
            result = self._send(order)
        except BaseException:
            if place is not None:
                self._give_back(place, moving)
            raise
        self.tier_of = dict(self.tier_of) | dict.fromkeys(result.sources, destination)
        came_from = result.sources.items()
        if any(self._rounded_to(name, source) != self._rounded_to(name, destination) for name, source in came_from):
            self._on_rounding()
        for tier, left in self._places.items():
            if names_there := [name for name, source in result.sources.items() if source is tier]:
                self._give_back(left, names_there)
        return result

    def _rounded_to(self, name: str, tier: Tier) -> Form | None:
        return self._schemes.rounded_to(self.manifest.by_name[name], tier)

    def _give_back(self, place: Place, names: Sequence[str]) -> None:
        try:
            place.give_back(names)
        except Exception as error:  # its owner is gone, and the room with it; what matters is what became of the move
            logger.warning("room of %s in %s was not given back: %s", self.model_id, place.tier, cause_of(error))


class Mover(Protocol):
    """What the manager needs of a `ParameterMover`."""

    model_id: str

    def move(self, names: Sequence[str], destination: Tier) -> MoveResult: ...


class TransferManager:
    """Works off the transfers of all models of a node, one at a time, on a thread of its own.

    A model takes part between `attach` and `detach`. Any thread may call anything.
    """

    def __init__(self, queue: TransferQueue | None = None) -> None:
        self._queue = TransferQueue() if queue is None else queue
        self._movers: dict[str, Mover] = {}
        self._changed = threading.Condition()
        self._moving: str | None = None  # the model of the transfer that is being worked on
        self._thread: threading.Thread | None = None

    def attach(self, mover: Mover) -> None:
        """From now on the parameters of this model may move."""
        with self._changed:
            self._movers[mover.model_id] = mover
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="transfers", daemon=True)
                self._thread.start()

    def detach(self, model_id: str, reason: str) -> None:
        """Fail what waits for this model and take no more; one that is under way goes on, see `settle`."""
        with self._changed:
            self._movers.pop(model_id, None)
        self._queue.fail_pending(reason, model_id)

    def settle(self, model_id: str) -> None:
        """Wait until no transfer of this model is under way."""
        with self._changed:
            self._changed.wait_for(lambda: self._moving != model_id)

    def submit(
        self,
        model_id: str,
        target: Target,
        destination: Tier,
        priority: int = DEFAULT_PRIORITY,
        on_finished: Callable[[Transfer], None] | None = None,
    ) -> Transfer:
        """Queue a transfer; `on_finished` is called with its end, on the manager's thread.

        Raises:
            InvalidRequestError: the priority is none. TransferQueueFullError: too many wait.
            ResourceNotAvailableError: the application is being stopped.
        """
        return self._queue.submit(
            target.names,
            destination,
            priority,
            target=target.label,
            model_id=model_id,
            on_finished=on_finished,
        )

    def get(self, transfer_id: str) -> Transfer:
        """A transfer as it is now; TransferNotFoundError when it is not known."""
        return self._queue.get(transfer_id)

    def future(self, transfer_id: str) -> Future[Transfer]:
        """Becomes the finished transfer; TransferNotFoundError. Cancelling it has no effect on the transfer."""
        return self._queue.future(transfer_id)

    def counts(self) -> TransferCounts:
        return self._queue.counts()

    def close(self, reason: str) -> None:
        """Fail what waits, take no more, and end the thread, which a transfer under way may outlive for a moment."""
        self._queue.close(reason)

    def _run(self) -> None:
        while (transfer := self._queue.next()) is not None:
            with self._changed:
                mover = self._movers.get(transfer.model_id)
                self._moving = transfer.model_id if mover is not None else None
            try:
                self._work(transfer, mover)
            finally:
                with self._changed:
                    self._moving = None
                    self._changed.notify_all()

    def _work(self, transfer: Transfer, mover: Mover | None) -> None:
        if mover is None:
            self._queue.fail(transfer.id, f"{transfer.model_id} is not loaded any more")
            return
        try:
            result = mover.move(transfer.names, Tier(transfer.destination))
        except Exception as error:
            self._queue.fail(transfer.id, _reason(error))
            return
        sources = {name: str(tier) for name, tier in result.sources.items()}
        self._queue.complete(transfer.id, nbytes=result.nbytes, seconds=result.seconds, sources=sources)


def _reason(error: Exception) -> str:
    if isinstance(error, RaytierError):
        return error.message
    if isinstance(error, RayActorError):
        return f"an actor is gone: {cause_of(error)}"
    logger.error("a transfer failed unexpectedly", exc_info=error)
    return f"{type(error).__name__}: {error}"


def _refused(message: str) -> InvalidRequestError:
    return InvalidRequestError(f"destination_device: {message}", param="destination_device")
