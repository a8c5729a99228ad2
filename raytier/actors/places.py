"""Where parameters lie outside of the device, as their owners see it: room that is obtained and given back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from raytier.actors.device import ArenaGrant, Move
from raytier.actors.executor import answer_of
from raytier.checkpoint.manifest import ModelManifest
from raytier.codecs.scheme import Scheme
from raytier.planner.plan import Tier, TierSchemes
from raytier.tiers.copies import TierCopy


class Place(Protocol):
    """A tier that an actor owns. Calls block, and raise what the actor raises (`RayActorError` when it is gone)."""

    tier: Tier

    def obtain(self, names: Iterable[str]) -> Move:
        """Room for parameters, as the move that brings them there.

        Raises:
            ResourceNotAvailableError, TierError: there is none, or the bytes could not be written; nothing is held.
        """
        ...

    def give_back(self, names: Sequence[str] | None = None) -> None:
        """Free the room of these parameters; None: of all that the model has."""
        ...


class HostPlace:
    """The node's host pool: ranges of its arena, filled by the device."""

    tier = Tier.HOST

    def __init__(self, actor: Any, model_id: str, manifest: ModelManifest, schemes: TierSchemes) -> None:
        self._actor = actor
        self._model_id = model_id
        self._manifest = manifest
        self._schemes = schemes

    def obtain(self, names: Iterable[str]) -> Move:
        sizes = {name: self._schemes.held_nbytes(self._manifest.by_name[name], Tier.HOST) for name in names}
        grants: Mapping[str, ArenaGrant] = answer_of(self._actor.reserve.remote(self._model_id, sizes))
        return Move(tuple(sizes), self.tier, grants=grants)

    def give_back(self, names: Sequence[str] | None = None) -> None:
        answer_of(self._actor.free.remote(self._model_id, names))


class FilePlace:
    """Files of the ramdisk or of the disk tier, written by their actor.

    Args:
        schemes: what is made of a parameter on this tier; as in the checkpoint, where it is not named.
        in_place: such parameters stay in the checkpoint's files.
    """

    def __init__(
        self,
        tier: Tier,
        actor: Any,
        model_id: str,
        manifest: ModelManifest,
        schemes: Mapping[str, Scheme],
        *,
        in_place: bool = False,
    ) -> None:
        self.tier = tier
        self._actor = actor
        self._model_id = model_id
        self._manifest = manifest
        self._schemes = schemes
        self._in_place = in_place

    def obtain(self, names: Iterable[str]) -> Move:
        names = tuple(names)
        wanted = tuple(name for name in names if name in self._schemes) if self._in_place else names
        if not wanted:
            return Move(names, self.tier)
        schemes = {name: self._schemes[name] for name in wanted if name in self._schemes}
        stored = self._actor.store.remote(self._model_id, self._manifest, wanted, schemes)
        copies: Mapping[str, TierCopy] = answer_of(stored)
        return Move(names, self.tier, copies=copies)

    def give_back(self, names: Sequence[str] | None = None) -> None:
        answer_of(self._actor.remove.remote(self._model_id, names))
