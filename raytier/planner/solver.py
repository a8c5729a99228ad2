"""Fitting one model into one device, the host pool and the disk: which parameters leave the device.

The ring's size follows from what streams, and what must stream from the ring's size: `solve` raises the streamed
share until both fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from raytier.checkpoint.manifest import ModelManifest, Parameter
from raytier.hardware.rates import Rates
from raytier.planner.budgets import DeviceKind
from raytier.planner.cost import describe_sweep, predict_step
from raytier.planner.plan import Tier
from raytier.planner.sizing import SMALL_UNIT, Ring, plan_ring, resident_nbytes, ring_nbytes, unit_nbytes
from raytier.planner.spread import spread

#: Layers ahead with which a ring was measured to keep the disk busy to 99 % (one more is being computed on).
MEASURED_DEPTH = 2
#: Predictions are not exact enough for smaller differences to decide.
CLEARLY_FASTER = 0.99


@dataclass(frozen=True, slots=True)
class Capacity:
    """Bytes per tier that a solution may use; `device` holds weights, ring, KV and activations."""

    device: int
    host: int
    nvme: int


@dataclass(frozen=True, slots=True)
class Depth:
    """A ring depth to try: `layers` ahead; `automatic` ones stay economical; `small_only`: for small units."""

    layers: int
    automatic: bool = True
    small_only: bool = False


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
        return Depth(8, small_only=True), Depth(3), Depth(2), Depth(1)
    smaller = tuple(Depth(n, automatic=False) for n in (3, 2, 1) if n < wish)
    return Depth(wish, automatic=False), *smaller


class Solver:
    """Solves for one model on one device; capacities, KV and ring depth vary per call.

    Args:
        fixed: parameters whose tier is given (always resident, or placed by a rule). Every other parameter of a layer,
            the embedding and the head are the solver's to place.
        activation_bytes: device bytes beside weights, ring and KV.
    """

    def __init__(
        self,
        manifest: ModelManifest,
        kind: DeviceKind,
        rates: Rates,
        fixed: Mapping[str, Tier],
        activation_bytes: int,
    ) -> None:
        self._manifest = manifest
        self._kind = kind
        self._rates = rates
        self._fixed = dict(fixed)
        self._streaming = (Tier.NVME, Tier.HOST) if kind == "cuda" else (Tier.NVME,)
        self._base = {Tier.DEVICE: activation_bytes, Tier.HOST: 0, Tier.RAMDISK: 0, Tier.NVME: 0}
        self._free: list[list[Parameter]] = [[] for _ in range(manifest.num_layers)]
        self._fixed_stream: list[list[Parameter]] = [[] for _ in range(manifest.num_layers)]
        self._fixed_nvme = [0] * manifest.num_layers
        self._whole: list[Parameter] = []
        for p in manifest.parameters:
            tier = self._fixed.get(p.name)
            if tier is None:
                (self._whole if p.layer is None else self._free[p.layer]).append(p)
                continue
            self._base[tier] += resident_nbytes(p, manifest) if tier is Tier.DEVICE else p.nbytes
            if p.layer is not None and tier in self._streaming:
                self._fixed_stream[p.layer].append(p)
            if p.layer is not None and tier is Tier.NVME:
                self._fixed_nvme[p.layer] += p.nbytes
        self._ring_nbytes = {p.name: ring_nbytes(p) for p in manifest.parameters}
        self._free_bytes = sum(p.nbytes for layer in self._free for p in layer)

    def best(self, capacity: Capacity, kv_bytes: int, tried: Sequence[Depth]) -> Solution | None:
        """The solution with the lowest predicted step time; None when nothing fits.

        The first depth that fits counts, and a shallower automatic one (at least `MEASURED_DEPTH`) if what it keeps
        resident instead makes the step clearly faster. When all that is free to place fits on the device, it stays
        there (spec C4).
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
            if chosen is None or self._step_seconds(solution) < CLEARLY_FASTER * self._step_seconds(chosen):
                chosen = solution
        return chosen

    def _best_at(self, capacity: Capacity, kv_bytes: int, depth: Depth) -> Solution | None:
        """Embedding and head on every tier each, the layers sharing what is left: the fastest of these."""
        options = [Tier.DEVICE] + [
            tier for tier, nbytes in ((Tier.HOST, capacity.host), (Tier.NVME, capacity.nvme)) if nbytes > 0
        ]
        names = [p.name for p in self._whole]
        found: list[Solution] = []
        for combination in product(options, repeat=len(names)):
            solution = self.solve(capacity, kv_bytes, depth, dict(zip(names, combination, strict=True)))
            if solution is None or (depth.small_only and solution.ring.unit_bytes >= SMALL_UNIT):
                continue
            if not solution.lowered:
                return solution
            found.append(solution)
        return self._fastest(found)

    def solve(self, capacity: Capacity, kv_bytes: int, depth: Depth, whole: Mapping[str, Tier]) -> Solution | None:
        """Place the layers' parameters, given the tiers of embedding and head (`whole`)."""
        base = dict(self._base)
        for name, tier in whole.items():
            base[tier] += self._manifest.by_name[name].nbytes
        host_room, nvme_room = capacity.host - base[Tier.HOST], capacity.nvme - base[Tier.NVME]
        if host_room < 0 or nvme_room < 0:
            return None
        device = base[Tier.DEVICE] + kv_bytes
        sizes = [[p.nbytes for p in layer] for layer in self._free]
        fixed_stream = [sum(p.nbytes for p in layer) for layer in self._fixed_stream]
        head = self._streamed_head(whole)
        target = max(0, device + self._free_bytes - capacity.device)
        while True:
            lowered = spread(sizes, fixed_stream, target)
            leaving = [[layer[i] for i in picked] for layer, picked in zip(self._free, lowered, strict=True)]
            leaving_sizes = [[p.nbytes for p in layer] for layer in leaving]
            leaving_bytes = sum(map(sum, leaving_sizes))
            to_disk = spread(leaving_sizes, self._fixed_nvme, leaving_bytes - host_room)
            disk = [[layer[i] for i in picked] for layer, picked in zip(leaving, to_disk, strict=True)]
            if sum(p.nbytes for layer in disk for p in layer) > nvme_room:
                return None
            streamed = leaving if self._kind == "cuda" else disk
            units = [
                unit_nbytes([self._ring_nbytes[p.name] for p in (*a, *b)])
                for a, b in zip(self._fixed_stream, streamed, strict=True)
            ]
            ring = plan_ring(units, head, depth.layers, economical=depth.automatic)
            used = device + self._free_bytes - leaving_bytes + ring.nbytes
            if used <= capacity.device:
                break
            if leaving_bytes == self._free_bytes:
                return None
            target = leaving_bytes + used - capacity.device

        tiers = self._fixed | dict(whole)
        for parameters, tier in ((self._free, Tier.DEVICE), (leaving, Tier.HOST), (disk, Tier.NVME)):
            tiers |= {p.name: tier for layer in parameters for p in layer}
        moved = leaving_bytes > 0 or any(tier is not Tier.DEVICE for tier in whole.values())
        return Solution(tiers, ring, used - kv_bytes, moved, depth)

    def _streamed_head(self, whole: Mapping[str, Tier]) -> Parameter | None:
        """The output head when it streams. A tied pair is one copy, and as the head it streams whole."""
        head = self._manifest.by_name[self._manifest.head]
        tier = (self._fixed | dict(whole))[head.name]
        return head if tier in self._streaming else None

    def _fastest(self, solutions: Sequence[Solution]) -> Solution | None:
        """Among those that are about as fast as the fastest, the one that reads least and leaves most on the device:
        bytes whose reading compute hides today are still requests, and a ring."""
        seconds = [self._step_seconds(solution) for solution in solutions]
        about = [s for s, time in zip(solutions, seconds, strict=True) if CLEARLY_FASTER * time <= min(seconds)]
        return min(about, key=self._off_device, default=None)

    def _step_seconds(self, solution: Solution) -> float:
        sweep = describe_sweep(self._manifest, solution.tiers, self._kind, solution.ring)
        return predict_step(sweep, self._rates, 1).seconds

    def _off_device(self, solution: Solution) -> tuple[int, int]:
        """Bytes streamed per step from anywhere, bytes off the device."""
        sweep = describe_sweep(self._manifest, solution.tiers, self._kind, solution.ring)
        streamed = sum(max(unit.disk_bytes, unit.bus_bytes) for unit in sweep.units)
        off = sum(p.nbytes for p in self._manifest.parameters if solution.tiers[p.name] is not Tier.DEVICE)
        return streamed, off
