"""Fitting one model into one device, the host pool, the ramdisk and the disk: which parameters leave the device.

The ring's size follows from what streams, and what must stream from the ring's size: `solve` raises the streamed
share until both fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, product
from math import ceil

from raytier.checkpoint.manifest import ModelManifest, Parameter
from raytier.hardware.rates import Rates
from raytier.planner.budgets import DeviceKind
from raytier.planner.cost import CALL_SECONDS, Sweep, describe_sweep, predict_step
from raytier.planner.plan import FILE_TIERS, Tier, TierSchemes
from raytier.planner.sizing import HeadSize, Ring, head_size, plan_ring, resident_nbytes, ring_nbytes, unit_nbytes
from raytier.planner.spread import spread

#: Layers ahead with which a ring was measured to keep the disk busy to 99 % (one more is being computed on).
MEASURED_DEPTH = 2
#: More units ahead than this only cost memory.
DEEPEST = 8
#: Bytes of reads that are to be in flight at any time: the threads of the disk tier with a request each, and the least
#: with which no disk was seen to be slower.
IN_FLIGHT_BYTES, LEAST_IN_FLIGHT_BYTES = 32 * 2**20, 16 * 2**20
#: Predictions are not exact enough for smaller differences to decide.
CLEARLY_FASTER = 0.99
#: Tiers off the device, fastest first.
LOWER = (Tier.HOST, Tier.RAMDISK, Tier.NVME)


@dataclass(frozen=True, slots=True)
class Capacity:
    """Bytes per tier that a solution may use; `device` holds weights, ring, KV and activations."""

    device: int
    host: int
    nvme: int
    ramdisk: int = 0

    def room(self, tier: Tier) -> int:
        return {Tier.DEVICE: self.device, Tier.HOST: self.host, Tier.RAMDISK: self.ramdisk, Tier.NVME: self.nvme}[tier]

    def limited(self, tier: Tier, nbytes: int) -> Capacity:
        """The same with `nbytes` for one tier."""
        return replace(self, **{tier.value: nbytes})


@dataclass(frozen=True, slots=True)
class Depth:
    """A ring depth to try: `layers` ahead; `automatic` ones stay economical."""

    layers: int
    automatic: bool = True


@dataclass(frozen=True)
class Solution:
    """Tier of every parameter. `used` = device bytes without KV; `lowered`: the solver moved something itself."""

    tiers: dict[str, Tier]
    ring: Ring
    used: int
    lowered: bool
    depth: Depth


def depths(wish: int | str) -> tuple[Depth, ...]:
    """Ring depths to try for `prefetch.window`, in order of preference; the last one is the smallest possible."""
    if isinstance(wish, str):
        return tuple(Depth(n) for n in (DEEPEST, 5, 3, 2, 1))
    smaller = tuple(Depth(n, automatic=False) for n in (3, 2, 1) if n < wish)
    return Depth(wish, automatic=False), *smaller


def useful_depth(sweep: Sweep, rates: Rates, unit_bytes: int) -> int:
    """Units ahead that keep every reading thread busy: the requests in flight, and what arrives while the longest
    unit is computed on, the calls around a step included."""
    step = predict_step(sweep, rates, 1, 0)
    work = (step.compute_seconds + step.overhead_seconds) / max(1, len(sweep.units))
    pause = 2 * work + rates.step_seconds + CALL_SECONDS
    fastest = max(rates.disk_read_bytes_per_s, rates.host_to_device_bytes_per_s or 0)
    ahead = ceil((IN_FLIGHT_BYTES + pause * fastest) / max(1, unit_bytes))
    return min(DEEPEST, max(MEASURED_DEPTH, ahead))


class Solver:
    """Solves for one model on one device; capacities, KV and ring depth vary per call.

    Args:
        fixed: parameters whose tier is given (always resident, or placed by a rule). Every other parameter of a layer,
            the embedding and the head are the solver's to place.
        activation_bytes: device bytes beside weights, ring and KV.
        schemes: what each tier makes of a parameter.
    """

    def __init__(
        self,
        manifest: ModelManifest,
        kind: DeviceKind,
        rates: Rates,
        fixed: Mapping[str, Tier],
        activation_bytes: int,
        schemes: TierSchemes,
    ) -> None:
        self._manifest = manifest
        self._schemes = schemes
        self._kind = kind
        self._rates = rates
        self._fixed = dict(fixed)
        self._packed = kind == "cpu" and rates.packed_pays
        self._streaming = LOWER if kind == "cuda" else LOWER[1:]
        self._base = dict.fromkeys(Tier, 0) | {Tier.DEVICE: activation_bytes}
        self._free: list[list[Parameter]] = [[] for _ in range(manifest.num_layers)]
        self._fixed_stream: list[list[Parameter]] = [[] for _ in range(manifest.num_layers)]
        #: Per tier, bytes of each layer that are fixed on it or below.
        self._fixed_below = {tier: [0] * manifest.num_layers for tier in LOWER}
        self._whole: list[Parameter] = []
        #: Bytes of every parameter on every tier.
        self._nbytes = {
            Tier.DEVICE: {p.name: resident_nbytes(p, manifest, schemes) for p in manifest.parameters},
            Tier.HOST: {p.name: schemes.held_nbytes(p, Tier.HOST) for p in manifest.parameters},
            **{tier: {p.name: schemes.file_nbytes(p, tier) for p in manifest.parameters} for tier in FILE_TIERS},
        }
        for p in manifest.parameters:
            tier = self._fixed.get(p.name)
            if tier is None:
                (self._whole if p.layer is None else self._free[p.layer]).append(p)
                continue
            self._base[tier] += self._nbytes[tier][p.name]
            if p.layer is None or tier is Tier.DEVICE:
                continue
            if tier in self._streaming:
                self._fixed_stream[p.layer].append(p)
            for upper in LOWER[: LOWER.index(tier) + 1]:
                self._fixed_below[upper][p.layer] += self._nbytes[upper][p.name]
        self._ring_nbytes = {p.name: ring_nbytes(p, schemes, self._streaming) for p in manifest.parameters}
        self._free_bytes = self._sum(Tier.DEVICE, self._free)

    def best(self, capacity: Capacity, kv_bytes: int, tried: Sequence[Depth]) -> Solution | None:
        """The solution with the lowest predicted step time; None when nothing fits.

        The first depth counts that fits and is not deeper than it is useful, and a shallower automatic one (at least
        `MEASURED_DEPTH`, and with enough reads in flight) if what it keeps resident instead makes the step clearly
        faster. When all that is free to place fits on the device, it stays there (spec C4).
        """
        chosen: Solution | None = None
        for depth in tried:
            if chosen is not None and (not depth.automatic or depth.layers < MEASURED_DEPTH):
                break
            solution = self._best_at(capacity, kv_bytes, depth)
            if solution is None:
                continue
            if not solution.lowered:
                return solution
            if depth.automatic and (self._too_deep if chosen is None else _too_shallow)(solution):
                continue
            if chosen is None or self._step_seconds(solution) < CLEARLY_FASTER * self._step_seconds(chosen):
                chosen = solution
        return chosen

    def _too_deep(self, solution: Solution) -> bool:
        ring = solution.ring
        if not ring.units:
            return False
        return ring.window > useful_depth(self._sweep(solution), self._rates, ring.unit_bytes)

    def _best_at(self, capacity: Capacity, kv_bytes: int, depth: Depth) -> Solution | None:
        """Embedding and head on every tier each, the layers sharing what is left: the fastest of these."""
        options = [Tier.DEVICE, *(tier for tier in LOWER if capacity.room(tier) > 0)]
        names = [p.name for p in self._whole]
        found: list[Solution] = []
        for combination in product(options, repeat=len(names)):
            solution = self.solve(capacity, kv_bytes, depth, dict(zip(names, combination, strict=True)))
            if solution is None:
                continue
            if not solution.lowered:
                return solution
            found.append(solution)
        return self._fastest(found)

    def solve(self, capacity: Capacity, kv_bytes: int, depth: Depth, whole: Mapping[str, Tier]) -> Solution | None:
        """Place the layers' parameters, given the tiers of embedding and head (`whole`)."""
        base = dict(self._base)
        for name, tier in whole.items():
            base[tier] += self._nbytes[tier][name]
        room = {tier: capacity.room(tier) - base[tier] for tier in LOWER}
        if min(room.values()) < 0:
            return None
        device = base[Tier.DEVICE] + kv_bytes
        sizes = self._sizes(Tier.DEVICE, self._free)
        head = self._streamed_head(whole)
        target = max(0, device + self._free_bytes - capacity.device)
        while True:
            lowered = spread(sizes, self._fixed_below[self._streaming[0]], target)
            leaving = [[layer[i] for i in picked] for layer, picked in zip(self._free, lowered, strict=True)]
            leaving_bytes = self._sum(Tier.DEVICE, leaving)
            below = self._cascade(leaving, room)
            if below is None:
                return None
            units = [
                unit_nbytes([self._ring_nbytes[p.name] for p in (*fixed, *streamed)])
                for fixed, streamed in zip(self._fixed_stream, below[self._streaming[0]], strict=True)
            ]
            ring = plan_ring(units, head, depth.layers, economical=depth.automatic)
            used = device + self._free_bytes - leaving_bytes + ring.nbytes
            if used <= capacity.device:
                break
            if leaving_bytes == self._free_bytes:
                return None
            target = leaving_bytes + used - capacity.device

        tiers = self._fixed | dict(whole) | {p.name: Tier.DEVICE for layer in self._free for p in layer}
        for tier in LOWER:  # from above, so that the lowest one that a parameter reaches remains
            tiers |= {p.name: tier for layer in below[tier] for p in layer}
        moved = leaving_bytes > 0 or any(tier is not Tier.DEVICE for tier in whole.values())
        return Solution(tiers, ring, used - kv_bytes, moved, depth)

    def _cascade(
        self, leaving: list[list[Parameter]], room: Mapping[Tier, int]
    ) -> dict[Tier, list[list[Parameter]]] | None:
        """Per tier, what of each layer reaches it or goes on further down; None when the last one has too little room.

        Every tier is filled before the next one, and what goes on is spread evenly over the layers.
        """
        below = {LOWER[0]: leaving}
        for tier, after in pairwise(LOWER):
            here = below[tier]
            on = spread(self._sizes(tier, here), self._fixed_below[after], self._sum(tier, here) - room[tier])
            below[after] = [[layer[i] for i in picked] for layer, picked in zip(here, on, strict=True)]
        return below if self._sum(LOWER[-1], below[LOWER[-1]]) <= room[LOWER[-1]] else None

    def _sizes(self, tier: Tier, layers: Sequence[Sequence[Parameter]]) -> list[list[int]]:
        return [[self._nbytes[tier][p.name] for p in layer] for layer in layers]

    def _sum(self, tier: Tier, layers: Sequence[Sequence[Parameter]]) -> int:
        return sum(map(sum, self._sizes(tier, layers)))

    def _streamed_head(self, whole: Mapping[str, Tier]) -> HeadSize | None:
        """The output head when it streams. A tied pair is one copy, and as the head it streams whole."""
        head = self._manifest.by_name[self._manifest.head]
        tier = (self._fixed | dict(whole))[head.name]
        return head_size(head, self._schemes, self._streaming) if tier in self._streaming else None

    def _fastest(self, solutions: Sequence[Solution]) -> Solution | None:
        """Among those that are about as fast as the fastest, the one that reads least and leaves most on the device:
        bytes whose reading compute hides today are still requests, and a ring."""
        seconds = [self._step_seconds(solution) for solution in solutions]
        about = [s for s, time in zip(solutions, seconds, strict=True) if CLEARLY_FASTER * time <= min(seconds)]
        return min(about, key=self._off_device, default=None)

    def _sweep(self, solution: Solution) -> Sweep:
        return describe_sweep(
            self._manifest, solution.tiers, self._kind, solution.ring, packed=self._packed, schemes=self._schemes
        )

    def _step_seconds(self, solution: Solution) -> float:
        return predict_step(self._sweep(solution), self._rates, 1, 0).seconds

    def _off_device(self, solution: Solution) -> tuple[int, int]:
        """Bytes streamed per step from anywhere, bytes off the device."""
        streamed = sum(unit.ring_bytes for unit in self._sweep(solution).units)
        off = sum(p.nbytes for p in self._manifest.parameters if solution.tiers[p.name] is not Tier.DEVICE)
        return streamed, off


def _too_shallow(solution: Solution) -> bool:
    ring = solution.ring
    return ring.window * ring.unit_bytes < min(LEAST_IN_FLIGHT_BYTES, DEEPEST * ring.unit_bytes)
