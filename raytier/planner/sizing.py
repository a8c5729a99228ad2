"""Bytes that a model needs beside its streamed weights: what never leaves the device, activations, KV, ring."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import ceil, prod

from raytier.checkpoint.manifest import DTYPE_BYTES, Extent, ModelManifest, Parameter, Role
from raytier.codecs.codec import CODED_REQUEST, FRAME_BYTES
from raytier.config import MIB, AppConfig
from raytier.planner.plan import FILE_TIERS, Tier, TierSchemes

#: O_DIRECT reads whole 4 KiB blocks at both ends of every contiguous run of bytes.
ALIGNMENT_SLACK = 8192
#: Small gaps between the runs of a unit are read along (see `execution/layout.py`): at most this much of its bytes ...
GAP_FRACTION = 0.01
#: ... and this many bytes per gap.
GAP_BYTES = 64 * 1024
#: Chunk of a streamed output head: large enough for full disk speed, small enough not to set the ring's size.
HEAD_CHUNK = (4 * MIB, 64 * MIB)
HEAD_CHUNK_ALONE = 16 * MIB
#: KV blocks come from disk in chunks of at least so many bytes, so many chunks at once.
KV_CHUNK_BYTES, KV_CHUNKS = 4 * MIB, 3


def resident_nbytes(parameter: Parameter, manifest: ModelManifest, schemes: TierSchemes | None = None) -> int:
    """Bytes of a resident parameter: it is cast to the dtype that it is computed in when loaded, if `schemes` have no
    form for it."""
    if schemes is not None and schemes.of(parameter.name, Tier.DEVICE).form is not None:
        return schemes.held_nbytes(parameter, Tier.DEVICE)
    return prod(parameter.shape) * DTYPE_BYTES[manifest.computed_dtype(parameter)]


def always_resident(parameter: Parameter, manifest: ModelManifest) -> str | None:
    """Why a parameter can only live on the device, or None when it may be streamed."""
    if parameter.role is not Role.LAYER and parameter.name not in (manifest.embedding, manifest.head):
        return "always resident: outside the layers"
    if parameter.resident is not None:
        return f"always resident: {parameter.resident}"
    if len(parameter.shape) < 2:
        return "always resident: norm or bias"
    if parameter.dtype != (dtype := manifest.computed_dtype(parameter)):
        return f"always resident: cast from {parameter.dtype} to {dtype}"
    return None


def packable(parameter: Parameter, manifest: ModelManifest, tier: Tier) -> bool:
    """Whether execution packs a parameter on `tier` for the CPU's kernels: a resident matrix of one linear layer.

    A tied pair is not: its other use, the embedding, reads rows. Experts are not, since few of them compute in a step.
    """
    if parameter.expert is not None or parameter.resident is not None:
        return False
    return tier is Tier.DEVICE and len(parameter.shape) == 2 and parameter.name != manifest.embedding


def token_bytes(manifest: ModelManifest) -> int:
    """Bytes of activations of one token in one layer.

    In the compute dtype: residual, normed input, attention output and its projection (4 x hidden), queries, keys and
    values (at most 3 x the widest key/value width or hidden), gate, up and their product (3 x the widest matrix of a
    layer).
    """
    qkv = max(max(k.num_kv_heads * max(k.key_dim, k.value_dim), manifest.hidden_size) for k in manifest.kv_layers)
    return (4 * manifest.hidden_size + 3 * qkv + 3 * manifest.widest) * DTYPE_BYTES[manifest.compute_dtype]


def activation_bytes(manifest: ModelManifest, tokens: int, sequences: int) -> int:
    """Peak bytes of activations in one step of `tokens` tokens and `sequences` sampled rows.

    Per token what one layer has of it. Per sampled row: logits in the compute dtype, in fp32, and one working copy of
    the sampler (counted as 3 x vocabulary x 4). At least 1 MiB.
    """
    tokens = min(tokens, sequences * manifest.max_context)
    logits = min(sequences, tokens) * manifest.vocab_size * 3 * 4
    return max(MIB, tokens * token_bytes(manifest) + logits)


def reader_bytes(manifest: ModelManifest, schemes: TierSchemes, threads: int) -> int:
    """What `threads` reading threads hold at most that is not in the ring: a request of coded bytes and the planes of a
    frame each; nothing where nothing is coded."""
    coded = [(p, t) for p in manifest.parameters for t in FILE_TIERS if schemes.of(p.name, t).codec.name != "none"]
    request = max((schemes.held_nbytes(p, tier) for p, tier in coded), default=0)
    if not request:
        return 0
    return threads * (min(CODED_REQUEST, request) + 2 * ALIGNMENT_SLACK + min(FRAME_BYTES, request))


@dataclass(frozen=True, slots=True)
class KVDemand:
    """KV blocks, the null block included: `floor` <= `expected` <= `most`, each of `block_bytes`.

    floor = one sequence of the expected context; most = every sequence at full context, or the configured cap.
    """

    block_size: int
    block_bytes: int
    floor: int
    expected: int
    most: int
    sequences: int
    context: int


def kv_demand(manifest: ModelManifest, config: AppConfig) -> KVDemand:
    """KV that the configuration expects."""
    kv, max_num_seqs = config.kv, config.scheduler.max_num_seqs
    sequences = min(8, max_num_seqs) if kv.expected_sequences == "auto" else min(kv.expected_sequences, max_num_seqs)
    context = 2048 if kv.expected_context == "auto" else kv.expected_context
    sequences, context = max(1, sequences), max(1, min(context, manifest.max_context))

    def blocks(count: int, tokens: int) -> int:
        wanted = count * ceil(tokens / kv.block_size) + 1  # + the null block
        return max(2, wanted if kv.max_blocks is None else min(wanted, kv.max_blocks))

    return KVDemand(
        kv.block_size,
        kv.block_size * manifest.kv_token_bytes,
        blocks(1, context),
        blocks(sequences, context),
        blocks(max_num_seqs, manifest.max_context),
        sequences,
        context,
    )


@dataclass(frozen=True, slots=True)
class Ring:
    """Ring of streamed bytes: `units` of the largest streamed `unit_bytes`; one of them is being computed on.

    `head_chunk_rows` is 0 when the head is resident. Beside it, `slots` of `slot_bytes` for routed experts that are
    fetched when they have been chosen.
    """

    units: int = 0
    unit_bytes: int = 0
    head_chunk_rows: int = 0
    slots: int = 0
    slot_bytes: int = 0

    @property
    def nbytes(self) -> int:
        return self.units * self.unit_bytes

    @property
    def expert_bytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def window(self) -> int:
        return max(0, self.units - 1)


def ring_nbytes(parameter: Parameter, schemes: TierSchemes, tiers: Collection[Tier]) -> int:
    """Upper bound of the ring bytes that a parameter takes which is streamed from one of `tiers`, gaps left out."""
    return max(_ring_nbytes(parameter, schemes, tier) for tier in tiers)


def _ring_nbytes(parameter: Parameter, schemes: TierSchemes, tier: Tier) -> int:
    """Its own bytes, alignment around each contiguous run, and a second copy if it cannot be used where it was read: it
    lies in several runs, or at an offset that its dtype cannot start at. Files of a tier begin with a parameter."""
    if not schemes.of(parameter.name, tier).plain:
        return schemes.held_nbytes(parameter, tier) + ALIGNMENT_SLACK
    runs = [e for i, e in enumerate(parameter.extents) if i == 0 or not _follows(parameter.extents[i - 1], e)]
    in_place = len(runs) <= 1 and all(e.offset % DTYPE_BYTES[parameter.dtype] == 0 for e in runs)
    return parameter.nbytes * (1 if in_place else 2) + ALIGNMENT_SLACK * max(1, len(runs))


def unit_nbytes(sizes: Sequence[int]) -> int:
    """Upper bound of the bytes of a unit whose parameters take `sizes` (`ring_nbytes`)."""
    return sum(sizes) + min(int(GAP_FRACTION * sum(sizes)), GAP_BYTES * max(0, len(sizes) - 1))


@dataclass(frozen=True, slots=True)
class HeadSize:
    """A streamed output head: its rows, ring bytes of all of it (`ring_nbytes`), the rows whose bytes are coded and
    checked together, of which a chunk holds a multiple, and the rows of a chunk where these are given (else 0)."""

    rows: int
    nbytes: int
    together: int = 1
    pieces: int = 0


def head_size(head: Parameter, schemes: TierSchemes, tiers: Collection[Tier]) -> HeadSize:
    """As a head is, streamed from one of `tiers`."""
    forms = {schemes.of(head.name, tier).form for tier in tiers}
    pieces = max(head.piece_rows(form) for form in forms)
    return HeadSize(head.shape[0], ring_nbytes(head, schemes, tiers), rows_together(head), pieces)


def rows_together(head: Parameter) -> int:
    """Rows of a head as the checkpoint has it whose bytes are coded and checked together."""
    return max(1, head.step(head.nbytes) * head.shape[0] // head.nbytes)


def plan_ring(units: Sequence[int], head: HeadSize | None, ahead: int, *, economical: bool) -> Ring:
    """Ring for the bytes that stream per layer (0: nothing) and for a streamed output head.

    A unit is what one layer, or one chunk of the head, streams. The ring never has fewer than two units (one computing,
    one arriving). With `economical` (the automatic window) it holds at most half of all units: a larger ring costs more
    memory than the residency of what it would hold ahead.
    """
    largest, count, rows = max(units, default=0), sum(1 for unit in units if unit), 0
    if head is not None:
        row_bytes = head.nbytes / head.rows
        low, high = HEAD_CHUNK
        wanted = min(max(largest, low), high) if count else HEAD_CHUNK_ALONE
        # At least eight chunks, so that a small head is not all in the ring.
        rows = head.pieces or chunk_rows(min(wanted, head.nbytes // 8) / row_bytes, head.together)
        largest = max(largest, ceil(rows * row_bytes) + ALIGNMENT_SLACK)
        count += ceil(head.rows / rows)
    if count == 0:
        return Ring()
    cap = max(2, count // 2) if economical else max(2, count)
    return Ring(min(ahead + 1, cap), -(-largest // 4096) * 4096, rows)


def chunk_rows(wanted: float, together: int) -> int:
    """Rows of a chunk of the output head: about `wanted`, in multiples of those that are coded and checked together."""
    return max(together, int(wanted) // together * together)


def _follows(before: Extent, after: Extent) -> bool:
    return before.file == after.file and before.offset + before.nbytes == after.offset
