"""What one model may take of a device, and what it takes."""

from __future__ import annotations

from collections.abc import Mapping

from raytier.checkpoint.manifest import ModelManifest
from raytier.errors import ResourceNotAvailableError
from raytier.execution.formed import FormedWeight, Weight
from raytier.planner.plan import DevicePlan, Tier, TierSchemes
from raytier.planner.sizing import resident_nbytes

MIB = 2**20


class Room:
    """The budget of one model on a device.

    Attributes:
        budget_bytes: for everything of the model; changed as other models come and go.
    """

    def __init__(self, share: DevicePlan) -> None:
        self.budget_bytes = share.budget_bytes
        self._share = share

    def held_bytes(self, resident: int, ring_bytes: int) -> int:
        """Bytes that a model takes with so many in weights and ring."""
        return resident + ring_bytes + self._share.kv_bytes + self._share.activation_bytes

    def check(self, resident: int, ring_bytes: int) -> None:
        """Refuse more than there is room for; ResourceNotAvailableError."""
        share, needed = self._share, self.held_bytes(resident, ring_bytes)
        if needed > self.budget_bytes:
            raise ResourceNotAvailableError(
                f"the device is full: {resident / MIB:.1f} MB of weights, a ring of {ring_bytes / MIB:.1f}, "
                f"{share.kv_bytes / MIB:.1f} of KV and {share.activation_bytes / MIB:.1f} of activations need "
                f"{needed / MIB:.1f} MB, its budget is {self.budget_bytes / MIB:.1f}: move something else away first, "
                "or raise tiers.device.max_mb"
            )


def resident_bytes(
    manifest: ModelManifest, tier_of: Mapping[str, Tier], resident: Mapping[str, Weight], schemes: TierSchemes
) -> int:
    """Bytes of the device's parameters: of what is `resident` those that it takes, of what is to come those that were
    planned for it."""
    total = 0
    for p in manifest.parameters:
        if tier_of[p.name] is Tier.DEVICE:
            held = resident.get(p.name)
            total += held.nbytes if isinstance(held, FormedWeight) else resident_nbytes(p, manifest, schemes)
    return total
