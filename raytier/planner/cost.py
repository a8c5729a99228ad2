"""Predicted time of a sweep over the layers: what is read, what is computed, what overlaps."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytier.checkpoint.manifest import ModelManifest
from raytier.hardware.rates import Rates
from raytier.planner.budgets import DeviceKind
from raytier.planner.plan import Prediction, Tier
from raytier.planner.sizing import ALIGNMENT_SLACK, Ring, resident_nbytes

BATCHES = (1, 8, 32)
PROMPT_TOKENS = 128


@dataclass(frozen=True, slots=True)
class SweepUnit:
    """A decoder layer, or (a chunk of) the output head: bytes read from disk, copied over the bus, computed on."""

    disk_bytes: int
    bus_bytes: int
    weight_bytes: int
    is_head: bool = False


@dataclass(frozen=True)
class Sweep:
    """One pass over the model as the cost model sees it. `row_bytes`: disk bytes per embedded token, 0 if resident."""

    units: tuple[SweepUnit, ...]
    ring_bytes: int
    row_bytes: int

    @property
    def streamed_bytes(self) -> int:
        """Bytes read from disk in every sweep, embedding rows left out."""
        return sum(unit.disk_bytes for unit in self.units)


def describe_sweep(manifest: ModelManifest, tier_of: Mapping[str, Tier], kind: DeviceKind, ring: Ring) -> Sweep:
    """What one sweep reads and computes under a placement. On a CPU device host memory is used in place."""
    disk, bus, weight = ([0] * manifest.num_layers for _ in range(3))
    for p in manifest.parameters:
        if p.layer is not None:
            tier = tier_of[p.name]
            weight[p.layer] += resident_nbytes(p, manifest)
            disk[p.layer] += p.nbytes if tier is Tier.NVME else 0
            bus[p.layer] += p.nbytes if kind == "cuda" and tier is not Tier.DEVICE else 0
    units = [SweepUnit(d, b, w) for d, b, w in zip(disk, bus, weight, strict=True)]

    head, tier = manifest.by_name[manifest.head], tier_of[manifest.head]
    rows = ring.head_chunk_rows or head.shape[0]
    for start in range(0, head.shape[0], rows):
        nbytes = resident_nbytes(head, manifest) // head.shape[0] * min(rows, head.shape[0] - start)
        over_bus = kind == "cuda" and tier is not Tier.DEVICE
        units.append(SweepUnit(nbytes if tier is Tier.NVME else 0, nbytes if over_bus else 0, nbytes, is_head=True))

    embedding = manifest.by_name[manifest.embedding]
    row = embedding.nbytes // embedding.shape[0] + ALIGNMENT_SLACK
    return Sweep(tuple(units), ring.nbytes, row if tier_of[manifest.embedding] is Tier.NVME else 0)


def predict_step(sweep: Sweep, rates: Rates, batch: int) -> Prediction:
    """One decode step of `batch` sequences in a steady run of steps."""
    return _predict(sweep, rates, batch, rows=batch, head_rows=batch)


def predict_first_token(sweep: Sweep, rates: Rates, prompt_tokens: int = PROMPT_TOKENS) -> float:
    """Seconds of the sweep that carries a whole prompt; only its last row goes through the head."""
    return _predict(sweep, rates, 1, rows=prompt_tokens, head_rows=1).seconds


def _predict(sweep: Sweep, rates: Rates, batch: int, *, rows: int, head_rows: int) -> Prediction:
    bus_rate = rates.host_to_device_bytes_per_s or rates.disk_read_bytes_per_s
    # Disk and bus work on different units at the same time: the slower one sets the pace.
    io = [max(u.disk_bytes / rates.disk_read_bytes_per_s, u.bus_bytes / bus_rate) for u in sweep.units]
    compute = [u.weight_bytes / rates.matrix_rate(head_rows if u.is_head else rows) for u in sweep.units]
    sizes = [max(u.disk_bytes, u.bus_bytes) for u in sweep.units]
    lookup = rows * sweep.row_bytes / rates.disk_read_bytes_per_s
    seconds = lookup + sweep_seconds(io, compute, sizes, sweep.ring_bytes)
    return Prediction(batch, seconds, lookup + sum(io), sum(compute))


def sweep_seconds(io: Sequence[float], compute: Sequence[float], sizes: Sequence[int], ring_bytes: int) -> float:
    """Seconds per sweep once reads wrap around from the last unit to the first.

    Units are read in order as soon as the ring has room; a unit's bytes leave the ring when its compute ends. For
    evenly spread bytes this is the sum of max(io, compute) over the units; where they are uneven, the ring smooths
    what it can hold, which that sum does not see.
    """
    read_end = compute_end = previous_end = 0.0
    held: deque[tuple[int, float]] = deque()
    held_bytes = 0
    for _ in range(3):  # the first sweep fills the ring, the last one is steady
        previous_end = compute_end
        for seconds, work, nbytes in zip(io, compute, sizes, strict=True):
            if not nbytes:
                compute_end += work
                continue
            while held and held_bytes + nbytes > ring_bytes:
                freed, done = held.popleft()
                held_bytes -= freed
                read_end = max(read_end, done)
            read_end += seconds
            compute_end = max(compute_end, read_end) + work
            held.append((nbytes, compute_end))
            held_bytes += nbytes
    return compute_end - previous_end
