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
from raytier.planner.cost import CALL_SECONDS, Sweep, SweepModel, predict_step
from raytier.planner.plan import FILE_TIERS, Tier, TierSchemes
from raytier.planner.routing import plan_slots
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


@dataclass(frozen=True, slots=True)
class _Item:
    """What moves as one: a parameter, or all free ones of a routed expert. Bytes per tier, and when it streams."""

    names: tuple[str, ...]
    nbytes: Mapping[Tier, int]
    ring_bytes: int


#: Of each share, per layer, positions of items in `_Share.free`.
_Picks = tuple[list[list[int]], ...]


class _Share:
    """Items of one kind per layer: those that are free to place, and those that rules stream.

    Attributes:
        fixed_below: per tier, bytes of each layer that are fixed on it or below.
    """

    def __init__(self, num_layers: int) -> None:
        self.free: list[list[_Item]] = [[] for _ in range(num_layers)]
        self.streamed: list[list[_Item]] = [[] for _ in range(num_layers)]
        self.fixed_below = {tier: [0] * num_layers for tier in LOWER}

    def sizes(self, tier: Tier, picks: Sequence[Sequence[int]]) -> list[list[int]]:
        """Bytes on a tier of the items at `picks`."""
        return [[items[i].nbytes[tier] for i in chosen] for items, chosen in zip(self.free, picks, strict=True)]


class Solver:
    """Solves for one model on one device; capacities, KV and ring depth vary per call.

    Args:
        fixed: parameters whose tier is given (always resident, or placed by a rule). Every other parameter of a layer,
            the embedding and the head are the solver's to place.
        activation_bytes: device bytes beside weights, ring and KV.
        schemes: what each tier makes of a parameter.
        sweeps: of the same model and device.
    """

    def __init__(
        self,
        manifest: ModelManifest,
        kind: DeviceKind,
        rates: Rates,
        fixed: Mapping[str, Tier],
        activation_bytes: int,
        schemes: TierSchemes,
        sweeps: SweepModel,
    ) -> None:
        self._manifest = manifest
        self._schemes = schemes
        self._rates = rates
        self._fixed = dict(fixed)
        self._streaming = LOWER if kind == "cuda" else LOWER[1:]
        self._sweeps = sweeps
        self._base = dict.fromkeys(Tier, 0) | {Tier.DEVICE: activation_bytes}
        self._whole: list[Parameter] = []
        #: Bytes of every parameter on every tier.
        self._nbytes = {
            Tier.DEVICE: {p.name: resident_nbytes(p, manifest, schemes) for p in manifest.parameters},
            Tier.HOST: {p.name: schemes.held_nbytes(p, Tier.HOST) for p in manifest.parameters},
            **{tier: {p.name: schemes.file_nbytes(p, tier) for p in manifest.parameters} for tier in FILE_TIERS},
        }
        self._ring_nbytes = {p.name: ring_nbytes(p, schemes, self._streaming) for p in manifest.parameters}
        #: What leaves the device first comes first: of routed experts, a step needs few.
        self._shares = self._routed, self._dense = _Share(manifest.num_layers), _Share(manifest.num_layers)
        self._per_token = max((bank.per_token for bank in manifest.experts), default=0)
        free: dict[tuple[str, int], list[Parameter]] = {}
        streamed: dict[tuple[str, int], list[Parameter]] = {}
        for p in manifest.parameters:
            share = self._dense if p.expert is None else self._routed
            tier = self._fixed.get(p.name)
            if tier is None:
                if p.layer is None:
                    self._whole.append(p)
                elif p.expert is None:
                    share.free[p.layer].append(self._item([p]))
                else:
                    free.setdefault((p.expert.bank, p.expert.expert), []).append(p)
                continue
            self._base[tier] += self._nbytes[tier][p.name]
            if p.layer is None or tier is Tier.DEVICE:
                continue
            if tier in self._streaming:
                if p.expert is None:
                    share.streamed[p.layer].append(self._item([p]))
                else:
                    streamed.setdefault((p.expert.bank, p.expert.expert), []).append(p)
            for upper in LOWER[: LOWER.index(tier) + 1]:
                share.fixed_below[upper][p.layer] += self._nbytes[upper][p.name]
        for bundles, layers in ((free, self._routed.free), (streamed, self._routed.streamed)):
            for parameters in bundles.values():
                layer = parameters[0].layer
                assert layer is not None
                layers[layer].append(self._item(parameters))
        parts = (streamed.get(key, []) + free.get(key, []) for key in streamed.keys() | free.keys())
        self._slot_bytes = max((self._item(expert).ring_bytes for expert in parts), default=0)
        self._all = tuple([list(range(len(layer))) for layer in share.free] for share in self._shares)
        self._stored = [(p.name, p.nbytes) for p in manifest.parameters]
        self._on_device = dict.fromkeys(self._nbytes[Tier.DEVICE], Tier.DEVICE) | self._fixed
        self._free_bytes = self._sum(Tier.DEVICE, self._all)

    def _item(self, parameters: Sequence[Parameter]) -> _Item:
        names = tuple(p.name for p in parameters)
        return _Item(
            names,
            {tier: sum(self._nbytes[tier][name] for name in names) for tier in Tier},
            unit_nbytes([self._ring_nbytes[name] for name in names]),
        )

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
        head = self._streamed_head(whole)
        target = max(0, device + self._free_bytes - capacity.device)
        while True:
            leaving = self._lower(self._all, Tier.DEVICE, self._streaming[0], target)
            leaving_bytes = self._sum(Tier.DEVICE, leaving)
            below = self._cascade(leaving, room)
            if below is None:
                return None
            ring = self._ring(below[self._streaming[0]], head, depth)
            used = device + self._free_bytes - leaving_bytes + ring.nbytes + ring.expert_bytes
            if used <= capacity.device:
                break
            if leaving_bytes == self._free_bytes:
                return None
            target = leaving_bytes + used - capacity.device

        tiers = self._on_device | dict(whole)
        for number, tier in enumerate(LOWER):
            further = below.get(LOWER[number + 1]) if number + 1 < len(LOWER) else None
            for s, share in enumerate(self._shares):
                for layer, items in enumerate(share.free):
                    passing = set(further[s][layer]) if further is not None else ()
                    for i in below[tier][s][layer]:
                        if i not in passing:
                            for name in items[i].names:
                                tiers[name] = tier
        moved = leaving_bytes > 0 or any(tier is not Tier.DEVICE for tier in whole.values())
        return Solution(tiers, ring, used - kv_bytes, moved, depth)

    def _ring(self, streamed: _Picks, head: HeadSize | None, depth: Depth) -> Ring:
        """Ring and slots for what streams."""
        routed, dense = (
            [
                (*fixed, *(items[i] for i in picked))
                for fixed, items, picked in zip(s.streamed, s.free, picks, strict=True)
            ]
            for s, picks in zip(self._shares, streamed, strict=True)
        )
        units = [unit_nbytes([item.ring_bytes for item in layer]) for layer in dense]
        ring = plan_ring(units, head, depth.layers, economical=depth.automatic)
        most = max(map(len, routed), default=0)
        if not most:
            return ring
        slot = -(-self._slot_bytes // 4096) * 4096
        slots = plan_slots(most, self._per_token, slot, sparing=depth.layers == 1)
        return replace(ring, slots=slots, slot_bytes=slot)

    def _cascade(self, leaving: _Picks, room: Mapping[Tier, int]) -> dict[Tier, _Picks] | None:
        """Per tier, what of each layer reaches it or goes on further down; None when the last one has too little room.

        Every tier is filled before the next one, and what goes on is spread evenly over the layers.
        """
        below = {LOWER[0]: leaving}
        for tier, after in pairwise(LOWER):
            here = below[tier]
            below[after] = self._lower(here, tier, after, self._sum(tier, here) - room[tier])
        return below if self._sum(LOWER[-1], below[LOWER[-1]]) <= room[LOWER[-1]] else None

    def _lower(self, here: _Picks, tier: Tier, after: Tier, target: int) -> _Picks:
        """What of `here` goes on from one tier to the tier after, at least `target` bytes if there are so many."""
        going = []
        for share, picks in zip(self._shares, here, strict=True):
            sizes = share.sizes(tier, picks)
            on = spread(sizes, share.fixed_below[after], target)
            target -= sum(sum(map(layer.__getitem__, chosen)) for layer, chosen in zip(sizes, on, strict=True))
            going.append([[layer[i] for i in chosen] for layer, chosen in zip(picks, on, strict=True)])
        return tuple(going)

    def _sum(self, tier: Tier, picks: _Picks) -> int:
        return sum(sum(map(sum, share.sizes(tier, chosen))) for share, chosen in zip(self._shares, picks, strict=True))

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
        return self._sweeps.describe(solution.tiers, solution.ring)

    def _step_seconds(self, solution: Solution) -> float:
        return predict_step(self._sweep(solution), self._rates, 1, 0).seconds

    def _off_device(self, solution: Solution) -> tuple[int, int]:
        """Bytes streamed per step from anywhere, bytes off the device."""
        units = self._sweep(solution).units
        streamed = sum(unit.ring_bytes for unit in units) + sum(
            round(e.share(1) * max(e.disk_bytes + e.ramdisk_bytes, e.bus_bytes)) for unit in units for e in unit.experts
        )
        off = sum(nbytes for name, nbytes in self._stored if solution.tiers[name] is not Tier.DEVICE)
        return streamed, off


def _too_shallow(solution: Solution) -> bool:
    ring = solution.ring
    return ring.window * ring.unit_bytes < min(LEAST_IN_FLIGHT_BYTES, DEEPEST * ring.unit_bytes)
