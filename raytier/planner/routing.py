"""How many of a mixture's experts a step goes through, and the memory in which those that lie in files arrive. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from raytier.config import MIB

#: Bytes of experts that are to be under way at any time, beyond those of one token.
IN_FLIGHT_BYTES = 64 * MIB


def expected_experts(num_experts: int, per_token: int, tokens: int) -> float:
    """Distinct experts that `tokens` tokens choose, each `per_token` of `num_experts` at random.

    Balls into bins: every expert is missed by a token with probability 1 - k/E, so E (1 - (1 - k/E)^n) are hit.
    Routers prefer some experts, so that this is the most that is to be expected.
    """
    return num_experts * (1.0 - (1.0 - per_token / num_experts) ** tokens)


def plan_slots(most: int, per_token: int, slot_bytes: int, *, sparing: bool) -> int:
    """Slots for experts of `slot_bytes`, of which a layer streams `most`.

    Those of one token are under way together, and more as long as they keep the disk busy. `sparing`: one expert after
    the other, which is the least that works.
    """
    if not most:
        return 0
    return 1 if sparing else min(most, max(per_token, ceil(IN_FLIGHT_BYTES / slot_bytes)))


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """The routed experts of a layer: bytes of all of them, of which a step needs those that its tokens choose.

    Attributes:
        disk_bytes, ramdisk_bytes: that are read where they are fetched.
        bus_bytes: that are copied to a GPU.
        plain_bytes, plain_matrices: that are computed on; plain_saved: bytes that these are fewer than in the compute
            dtype.
    """

    num_experts: int
    per_token: int
    disk_bytes: int = 0
    ramdisk_bytes: int = 0
    bus_bytes: int = 0
    plain_bytes: int = 0
    plain_matrices: int = 0
    plain_saved: int = 0

    def share(self, tokens: int) -> float:
        """Of the experts, the part that so many tokens are expected to choose."""
        return expected_experts(self.num_experts, self.per_token, tokens) / self.num_experts

    def tokens_each(self, tokens: int) -> int:
        """Tokens that each of the chosen experts computes at once."""
        return max(1, round(tokens * self.per_token / max(1.0, self.share(tokens) * self.num_experts)))
