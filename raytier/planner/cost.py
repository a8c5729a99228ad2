"""Predicted time of a step: a sweep over the layers, what it reads, what it computes, and what of that overlaps."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raytier.checkpoint.manifest import ExpertBank, ModelManifest, Parameter
from raytier.hardware.rates import Overlap, Rates
from raytier.planner.budgets import DeviceKind
from raytier.planner.plan import FILE_TIERS, Prediction, Tier, TierSchemes, WeightPlan
from raytier.planner.routing import RoutedExperts
from raytier.planner.sizing import ALIGNMENT_SLACK, Ring, packable, resident_nbytes, token_bytes

BATCHES = (1, 8, 32)
PROMPT_TOKENS = 128
#: The engine's turn and the message to the device: per step, and for every sequence of it. Measured on two cores; the
#: process that measures the other rates cannot see them.
CALL_SECONDS = 0.9e-3
CALL_SEQUENCE_SECONDS = 3.0e-5
#: Share of the rate of decoding that is left beside a step: 63 ms by itself took 103 on two cores.
DECODE_BESIDE = 0.6


@dataclass(frozen=True, slots=True)
class SweepUnit:
    """A decoder layer, or (a chunk of) the output head. Sizes in bytes.

    Attributes:
        disk_bytes, ramdisk_bytes: read into the ring.
        bus_bytes: copied to the GPU.
        packed_bytes, plain_bytes: weights that are computed on, in the layout of the CPU's kernels or as in the file.
        packed_saved, plain_saved: bytes that these are fewer than in the compute dtype.
        packed_matrices, plain_matrices: how many matrices these are.
        kv_bytes: keys and values of one token in this layer, and the window of it in tokens (0: no window).
        head_rows: vocabulary rows of the output head; 0 for a layer.
        decoded_bytes: that are decoded on their way into the ring.
        held_bytes: that what is read takes in the ring.
        experts: what depends on the router, in none of the other sizes.
    """

    disk_bytes: int
    ramdisk_bytes: int
    bus_bytes: int
    packed_bytes: int
    plain_bytes: int
    kv_bytes: int = 0
    kv_window: int = 0
    head_rows: int = 0
    packed_matrices: int = 0
    plain_matrices: int = 0
    decoded_bytes: int = 0
    held_bytes: int = 0
    packed_saved: int = 0
    plain_saved: int = 0
    experts: tuple[RoutedExperts, ...] = ()

    @property
    def ring_bytes(self) -> int:
        return max(self.held_bytes, self.bus_bytes)


@dataclass(frozen=True)
class Sweep:
    """One pass over the model as the cost model sees it.

    Attributes:
        token_bytes: of activations of a token in a layer; `hidden`: its width.
        row_bytes: bytes that are read for each embedded token, 0 where the embedding is in memory.
        row_tier: the tier that they are read from.
    """

    kind: DeviceKind
    units: tuple[SweepUnit, ...]
    ring_bytes: int
    token_bytes: int
    hidden: int
    row_bytes: int = 0
    row_tier: Tier = Tier.NVME

    @property
    def streamed_bytes(self) -> int:
        """Bytes read from ramdisk and disk in every sweep, embedding rows left out, with the experts of one token."""
        routed = (e.share(1) * (e.disk_bytes + e.ramdisk_bytes) for unit in self.units for e in unit.experts)
        return sum(unit.disk_bytes + unit.ramdisk_bytes for unit in self.units) + round(sum(routed))


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What one step carries: a token of each of `sequences`, which have `context` tokens behind them, and `prompt` more
    tokens of one prompt, of which `start` have been read before."""

    sequences: int
    context: int
    prompt: int = 0
    start: int = 0

    @property
    def rows(self) -> int:
        return self.sequences + self.prompt

    @property
    def sampled(self) -> int:
        """Rows that go through the output head."""
        return max(1, self.sequences)


def describe_sweep(
    manifest: ModelManifest,
    tier_of: Mapping[str, Tier],
    kind: DeviceKind,
    ring: Ring,
    *,
    packed: bool = False,
    schemes: TierSchemes | None = None,
) -> Sweep:
    """What one sweep reads and computes under a placement. On a CPU device host memory is used in place.

    Args:
        packed: resident linear layers are in the layout of the CPU's kernels (`DevicePlan.packed`).
        schemes: what each tier makes of a parameter; None: nothing.
    """
    return SweepModel(manifest, kind, packed, schemes or TierSchemes()).describe(tier_of, ring)


@dataclass(frozen=True, slots=True)
class _Part:
    """What a parameter adds to the unit of its layer on one tier; sizes as in `SweepUnit`."""

    disk: int
    ramdisk: int
    bus: int
    fast: int
    plain: int
    decoded: int
    held: int
    fast_count: int
    plain_count: int
    fast_saved: int
    plain_saved: int


class SweepModel:
    """Describes sweeps of one model under many placements: what a placement does not change is found out once.

    Attributes:
        packed: resident linear layers are kept in the layout of the CPU's kernels.
    """

    def __init__(self, manifest: ModelManifest, kind: DeviceKind, packed: bool, schemes: TierSchemes) -> None:
        self._manifest = manifest
        self._kind = kind
        self.packed = packed
        self._schemes = schemes
        layers = range(manifest.num_layers)
        self._kv = [sum(kv.token_bytes(manifest.compute_dtype) for kv in manifest.kv_of(layer)) for layer in layers]
        self._windows = [max(((kv.sliding_window or 0) for kv in manifest.kv_of(n)), default=0) for n in layers]
        self._dense: list[list[tuple[str, dict[Tier, _Part]]]] = [[] for _ in layers]
        self._banks: list[list[ExpertBank]] = [[] for _ in layers]
        for bank in manifest.experts:
            self._banks[bank.layer].append(bank)
        #: Per bank, names of parameters that are alike on every tier, and what each of them adds.
        self._routed: dict[str, dict[tuple[_Part, ...], list[str]]] = {bank.name: {} for bank in manifest.experts}
        made: dict[object, dict[Tier, _Part]] = {}
        for p in manifest.parameters:
            if p.layer is None:
                continue
            alike = p.shape, p.dtype, p.own_dtype, p.expert is None, *(schemes.of(p.name, tier) for tier in Tier)
            key = (*alike, p.name) if p.expert is None else alike
            if key not in made:
                made[key] = {tier: self._part(p, tier) for tier in Tier}
            if p.expert is None:
                self._dense[p.layer].append((p.name, made[key]))
            else:
                self._routed[p.expert.bank].setdefault(tuple(made[key].values()), []).append(p.name)

    def _part(self, p: Parameter, tier: Tier) -> _Part:
        on_device, streamed = tier is Tier.DEVICE, tier in FILE_TIERS
        schemes = self._schemes
        nbytes = resident_nbytes(p, self._manifest, schemes) if on_device else schemes.held_nbytes(p, tier)
        fast = self.packed and packable(p, self._manifest, tier)
        matrix = len(p.shape) > 1
        saved = resident_nbytes(p, self._manifest) - nbytes
        return _Part(
            disk=schemes.file_nbytes(p, tier) if tier is Tier.NVME else 0,
            ramdisk=schemes.file_nbytes(p, tier) if tier is Tier.RAMDISK else 0,
            bus=nbytes if self._kind == "cuda" and not on_device else 0,
            fast=nbytes if fast else 0,
            plain=0 if fast else nbytes,
            decoded=schemes.decoded_nbytes(p, tier) if streamed else 0,
            held=nbytes if streamed else 0,
            fast_count=int(fast and matrix),
            plain_count=int(not fast and matrix),
            fast_saved=saved if fast else 0,
            plain_saved=0 if fast else saved,
        )

    def describe(self, tier_of: Mapping[str, Tier], ring: Ring) -> Sweep:
        """What one sweep reads and computes under a placement."""
        manifest, kind, packed, schemes = self._manifest, self._kind, self.packed, self._schemes
        units = []
        for layer, dense in enumerate(self._dense):
            parts = [found[tier_of[name]] for name, found in dense]
            units.append(
                SweepUnit(
                    sum(part.disk for part in parts),
                    sum(part.ramdisk for part in parts),
                    sum(part.bus for part in parts),
                    sum(part.fast for part in parts),
                    sum(part.plain for part in parts),
                    self._kv[layer],
                    self._windows[layer],
                    packed_matrices=sum(part.fast_count for part in parts),
                    plain_matrices=sum(part.plain_count for part in parts),
                    decoded_bytes=sum(part.decoded for part in parts),
                    held_bytes=sum(part.held for part in parts),
                    packed_saved=sum(part.fast_saved for part in parts),
                    plain_saved=sum(part.plain_saved for part in parts),
                    experts=tuple(self._experts(bank, tier_of) for bank in self._banks[layer]),
                )
            )

        head = manifest.by_name[manifest.head]
        tier = tier_of[head.name]
        rows = ring.head_chunk_rows or head.shape[0]
        whole = resident_nbytes(head, manifest, schemes) if tier is Tier.DEVICE else schemes.held_nbytes(head, tier)
        is_fast = packed and packable(head, manifest, tier)
        for start in range(0, head.shape[0], rows):
            part = min(rows, head.shape[0] - start)
            nbytes = whole * part // head.shape[0]
            file_bytes = schemes.file_nbytes(head, tier) * part // head.shape[0]
            saved = (resident_nbytes(head, manifest) - whole) * part // head.shape[0]
            units.append(
                SweepUnit(
                    disk_bytes=file_bytes if tier is Tier.NVME else 0,
                    ramdisk_bytes=file_bytes if tier is Tier.RAMDISK else 0,
                    decoded_bytes=nbytes if schemes.decoded_nbytes(head, tier) else 0,
                    held_bytes=nbytes if tier in FILE_TIERS else 0,
                    bus_bytes=nbytes if kind == "cuda" and tier is not Tier.DEVICE else 0,
                    packed_bytes=nbytes if is_fast else 0,
                    plain_bytes=0 if is_fast else nbytes,
                    packed_saved=saved if is_fast else 0,
                    plain_saved=0 if is_fast else saved,
                    head_rows=part,
                    packed_matrices=int(is_fast),
                    plain_matrices=int(not is_fast),
                )
            )

        embedding = manifest.by_name[manifest.embedding]
        row_tier = tier_of[embedding.name]
        row = embedding.nbytes // embedding.shape[0] + ALIGNMENT_SLACK
        by_rows = row_tier in (Tier.RAMDISK, Tier.NVME)
        return Sweep(
            kind,
            tuple(units),
            ring.nbytes,
            token_bytes(manifest),
            manifest.hidden_size,
            row if by_rows else 0,
            row_tier if by_rows else Tier.NVME,
        )

    def _experts(self, bank: ExpertBank, tier_of: Mapping[str, Tier]) -> RoutedExperts:
        disk = ramdisk = bus = plain = matrices = saved = 0
        for parts, names in self._routed[bank.name].items():
            count = Counter(map(tier_of.__getitem__, names))
            for tier, part in zip(Tier, parts, strict=True):
                disk += part.disk * count[tier]
                ramdisk += part.ramdisk * count[tier]
                bus += part.bus * count[tier]
                plain += part.plain * count[tier]
                matrices += part.plain_count * count[tier]
                saved += part.plain_saved * count[tier]
        return RoutedExperts(bank.num_experts, bank.per_token, disk, ramdisk, bus, plain, matrices, saved)


def sweep_of(manifest: ModelManifest, plan: WeightPlan) -> Sweep:
    """What one sweep of a planned model reads and computes."""
    device = plan.devices[0]
    units = device.window + 1 if device.ring_bytes else 0
    ring = Ring(units, device.ring_bytes // max(1, units), device.head_chunk_rows, 1, device.expert_bytes)
    kind: DeviceKind = "cuda" if device.kind == "cuda" else "cpu"
    return describe_sweep(manifest, plan.tier_of, kind, ring, packed=device.packed, schemes=plan.schemes)


def predict_step(sweep: Sweep, rates: Rates, batch: int, context: int) -> Prediction:
    """One decode step of `batch` sequences, each with `context` tokens behind it, in a steady run of such steps."""
    return predict(sweep, rates, StepLoad(batch, context))


def predict_first_token(
    sweep: Sweep, rates: Rates, prompt_tokens: int = PROMPT_TOKENS, step_tokens: int | None = None
) -> float:
    """Seconds until the first token of a prompt, read in steps of at most `step_tokens`, when nothing else runs."""
    chunk = min(prompt_tokens, step_tokens or prompt_tokens)
    starts = range(0, prompt_tokens, chunk)
    loads = [StepLoad(0, 0, min(chunk, prompt_tokens - start), start) for start in starts]
    return sum(predict(sweep, rates, load).seconds for load in loads)


def predict(sweep: Sweep, rates: Rates, load: StepLoad) -> Prediction:
    """One step that carries `load`, in a steady run of such steps."""
    bus_rate = rates.host_to_device_bytes_per_s or rates.disk_read_bytes_per_s
    disk = [u.disk_bytes / rates.disk_read_bytes_per_s for u in sweep.units]
    ramdisk = [u.ramdisk_bytes / _ramdisk_rate(rates) for u in sweep.units]
    # Files share the reading threads; the bus works on another unit at the same time: the slower one sets the pace.
    # A thread that waits for a disk takes no core: on a CPU decoding is taken from computing, not from reading.
    decode = [u.decoded_bytes / rates.decode_bytes_per_s if rates.decode_bytes_per_s else 0.0 for u in sweep.units]
    read = [d + r for d, r in zip(disk, ramdisk, strict=True)]
    cuda = sweep.kind == "cuda"
    io = [max(r, cuda * d, u.bus_bytes / bus_rate) for u, r, d in zip(sweep.units, read, decode, strict=True)]
    matrix = [_matrix_seconds(u, rates, load) + _expert_seconds(u, rates, load) for u in sweep.units]
    # Nothing else goes on while chosen experts are waited for: their layer computes, and the disk is theirs.
    fetching = sum(_fetch_seconds(u, rates, load, bus_rate) for u in sweep.units)
    attention = [_attention_seconds(u, rates, load) + _prompt_seconds(u, sweep, rates, load) for u in sweep.units]
    calls = [_call_seconds(u, rates, load) for u in sweep.units]
    # A GPU computes while the calls for the next operations are made.
    work = [max(m + a, c) if cuda else m + a + c for m, a, c in zip(matrix, attention, calls, strict=True)]

    row_rate = rates.disk_read_bytes_per_s if sweep.row_tier is Tier.NVME else _ramdisk_rate(rates)
    lookup = load.rows * sweep.row_bytes / row_rate
    around = CALL_SECONDS + rates.step_seconds + lookup
    around += load.sampled * (CALL_SEQUENCE_SECONDS + rates.step_sequence_seconds)

    overlap = Overlap() if cuda else _mean_overlap(rates, sum(disk), sum(ramdisk))
    io_slowed, work_slowed = contend(io, [around, *work], overlap)
    if not cuda:
        work_slowed = [w + d / DECODE_BESIDE for w, d in zip(work_slowed, [0.0, *decode], strict=True)]
    seconds = sweep_seconds([0.0, *io_slowed], work_slowed, [0, *(u.ring_bytes for u in sweep.units)], sweep.ring_bytes)
    return Prediction(
        batch=load.sequences,
        seconds=seconds + fetching,
        io_seconds=lookup + sum(io) + fetching,
        compute_seconds=sum(matrix),
        attention_seconds=sum(attention),
        overhead_seconds=around - lookup + sum(calls),
    )


def _ramdisk_rate(rates: Rates) -> float:
    """An unmeasured ramdisk is taken to be no faster than the disk: it is then left out of the plan."""
    return rates.ramdisk_read_bytes_per_s or rates.disk_read_bytes_per_s


def _matrix_seconds(unit: SweepUnit, rates: Rates, load: StepLoad) -> float:
    rows = load.sampled if unit.head_rows else load.rows
    packed = rates.linear_seconds(unit.packed_bytes, unit.packed_saved, rows, packed=True)
    return packed + rates.linear_seconds(unit.plain_bytes, unit.plain_saved, rows)


def _expert_seconds(unit: SweepUnit, rates: Rates, load: StepLoad) -> float:
    """Computing on the chosen experts, each with its tokens."""
    n = load.rows
    return sum(e.share(n) * rates.linear_seconds(e.plain_bytes, e.plain_saved, e.tokens_each(n)) for e in unit.experts)


def _fetch_seconds(unit: SweepUnit, rates: Rates, load: StepLoad, bus_rate: float) -> float:
    """Fetching the chosen experts from files, and bringing them to a GPU, one beside the other."""
    return sum(
        e.share(load.rows)
        * max(
            e.disk_bytes / rates.disk_read_bytes_per_s + e.ramdisk_bytes / _ramdisk_rate(rates), e.bus_bytes / bus_rate
        )
        for e in unit.experts
    )


def _attention_seconds(unit: SweepUnit, rates: Rates, load: StepLoad) -> float:
    if rates.attention_bytes_per_s is None:
        return 0.0
    tokens = min(load.context, unit.kv_window) if unit.kv_window else load.context
    return load.sequences * tokens * unit.kv_bytes / rates.attention_bytes_per_s


def _prompt_seconds(unit: SweepUnit, sweep: Sweep, rates: Rates, load: StepLoad) -> float:
    """Attention of prompt tokens, each to all before it, and the activations that they pass through a layer."""
    if unit.head_rows or not load.prompt:
        return 0.0
    seen = load.start + load.prompt / 2
    flops = 4 * load.prompt * (min(seen, unit.kv_window) if unit.kv_window else seen) * sweep.hidden
    passing = load.prompt * sweep.token_bytes
    return (flops / rates.prompt_flops if rates.prompt_flops else 0.0) + (
        passing / rates.prompt_bytes_per_s if rates.prompt_bytes_per_s else 0.0
    )


def _call_seconds(unit: SweepUnit, rates: Rates, load: StepLoad) -> float:
    routed = sum(e.share(load.rows) * e.plain_matrices for e in unit.experts)
    plain_matrices = unit.plain_matrices + routed
    matrices = unit.packed_matrices * rates.packed_matrix_seconds + plain_matrices * rates.matrix_seconds
    if unit.head_rows:
        logits = load.sampled * unit.head_rows
        return matrices + (logits / rates.logits_per_s if rates.logits_per_s is not None else 0.0)
    return matrices + rates.layer_seconds + (load.sampled - 1) * rates.layer_sequence_seconds


def _mean_overlap(rates: Rates, disk_seconds: float, ramdisk_seconds: float) -> Overlap:
    """Of reads from both, by the time that each takes."""
    total = disk_seconds + ramdisk_seconds
    if total == 0:
        return Overlap()
    share = disk_seconds / total
    disk, ramdisk = rates.overlap, rates.ramdisk_overlap
    return Overlap(
        share * disk.reading + (1 - share) * ramdisk.reading, share * disk.computing + (1 - share) * ramdisk.computing
    )


def contend(io: Sequence[float], work: Sequence[float], overlap: Overlap) -> tuple[list[float], list[float]]:
    """Durations of reading and computing, lengthened by what they take from each other.

    While both go on, reading has the share a = `overlap.reading` of its rate and computing the share
    b = `overlap.computing`; when the shorter one is done, the other goes on at its full rate. If that is reading
    (R / a <= C / b), computing takes C + R (1 - b) / a in all, else reading takes R + C (1 - a) / b.
    """
    reading, computing = sum(io), sum(work)
    if reading * overlap.computing <= computing * overlap.reading:
        longer = 1 + reading * (1 - overlap.computing) / overlap.reading / computing if computing else 1.0
        return list(io), [seconds * longer for seconds in work]
    longer = 1 + computing * (1 - overlap.reading) / overlap.computing / reading
    return [seconds * longer for seconds in io], list(work)


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
