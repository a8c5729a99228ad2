"""What is read when: which file ranges make up each streamed unit, and where its parameters then lie.

A *unit* is what the ring holds and frees as one: the streamed parameters of a decoder layer, or a chunk of
vocabulary rows of the output head. Pure functions over the manifest; nothing is opened here.

Reads are aligned outward for O_DIRECT, so bytes keep their file offset modulo `ALIGNMENT`: a parameter starts
anywhere in its unit and is used in place. So is one whose extents meet at block borders (stripes of a tier's files):
they are read one behind the other. Only what cannot be used in place (other separate extents, or a file offset that
its dtype cannot start at) is copied together, into space behind the reads, by `assemble`. What is coded is read into
memory of the reader, and decoded from there into the unit. All is checked, in ranges that do not depend on the unit.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from raytier.checkpoint.manifest import DTYPE_BYTES, Extent, ModelManifest, Parameter, SourceFile, Stored
from raytier.codecs.codec import CODED_REQUEST
from raytier.codecs.scheme import element_of
from raytier.errors import CheckpointError
from raytier.execution.reads import Check, CodedFrame, CodedRead, Read, with_checks
from raytier.planner.plan import FILE_TIERS, Tier
from raytier.tiers.aligned import ALIGNMENT, align_down, align_up
from raytier.tiers.checks import check_ranges
from raytier.tiers.striping import slice_extents

#: Bytes between wanted ranges that may be read along to save a request ...
MAX_GAP = 64 << 10
#: ... as long as they add up to no more than this part of the wanted bytes.
MAX_GAP_FRACTION = 0.01
#: Start of an assembled or decoded parameter: one cache line.
SCRATCH_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [row_start, row_stop) of the first dimension of a parameter."""

    parameter: Parameter
    row_start: int
    row_stop: int


@dataclass(frozen=True, slots=True)
class Member:
    """Where rows [row_start, row_stop) of a parameter lie in their unit: `nbytes` at `offset`, packed.

    `pieces`, (offset in the unit, bytes) each, are what `assemble` copies there; empty when read in place.
    """

    name: str
    offset: int
    nbytes: int
    row_start: int
    row_stop: int
    pieces: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class StreamUnit:
    """Reads and members of one unit of `nbytes` (aligned). `layer` is None for anything but a decoder layer."""

    name: str
    nbytes: int
    reads: tuple[Read | CodedRead, ...]
    members: tuple[Member, ...]
    layer: int | None = None

    @property
    def rows(self) -> tuple[int, int] | None:
        """Rows of the output head that this unit holds, None for a decoder layer."""
        return None if self.layer is not None else (self.members[0].row_start, self.members[0].row_stop)

    @property
    def wanted_bytes(self) -> int:
        """Bytes of its parameters."""
        return sum(member.nbytes for member in self.members)

    @property
    def read_bytes(self) -> int:
        """Bytes read from disk for it."""
        return sum(read.nbytes for read in self.reads)


def whole(parameter: Parameter) -> Piece:
    return Piece(parameter, 0, num_rows(parameter))


def num_rows(parameter: Parameter) -> int:
    """Size of the first dimension; a scalar is one row."""
    return parameter.shape[0] if parameter.shape else 1


def held_nbytes(parameter: Parameter) -> int:
    """Bytes of the parameter where it is computed on: in the form that it is read in."""
    return parameter.nbytes if parameter.stored is None else parameter.stored.nbytes


def row_bytes(parameter: Parameter) -> int:
    return held_nbytes(parameter) // max(1, num_rows(parameter))


def build_unit(
    name: str,
    pieces: Sequence[Piece],
    files: Sequence[SourceFile],
    layer: int | None = None,
    *,
    by_rows: bool = False,
) -> StreamUnit:
    """The unit that holds `pieces`, whose members keep their order.

    Args:
        by_rows: every row is checked by itself.

    Raises:
        CheckpointError: a parameter has no bytes, or reaches beyond the end of its file.
    """
    coded = [None if by_rows else _coded(piece) for piece in pieces]
    extents = [() if code else tuple(_extents(piece)) for piece, code in zip(pieces, coded, strict=True)]
    for extent in (e for group in extents for e in group):
        if extent.offset + extent.nbytes > files[extent.file].size:
            raise CheckpointError(f"{name}: {extent} reaches beyond the {files[extent.file].size} bytes of its file")
    chained = [len(group) > 1 and _meet_at_blocks(group) for group in extents]
    alone = [extent for group, chain in zip(extents, chained, strict=True) if not chain for extent in group]
    reads: list[Read] = []
    end = 0
    for file, start, stop in _runs(alone, files):
        reads.append(Read(file, start, stop - start, end))
        end += align_up(stop - start)
    starts = [(read.file, read.offset) for read in reads]

    def place(extent: Extent) -> int:
        read = reads[bisect_right(starts, (extent.file, extent.offset)) - 1]
        return read.dest + extent.offset - read.offset

    members: list[Member] = []
    checks: list[Check] = []
    behind: list[Read | CodedRead] = []
    for piece, group, chain, stored in zip(pieces, extents, chained, coded, strict=True):
        if stored is not None:
            dest = -(-end // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
            start, stop = _byte_range(piece)
            frames = stored.frames.overlapping(start, stop)
            behind += _coded_reads(piece.parameter, stored, frames, dest)
            first = stored.frames.starts()[frames.start]
            end = dest + stored.frames.starts()[frames.stop] - first
            members.append(
                Member(piece.parameter.name, dest + start - first, stop - start, piece.row_start, piece.row_stop)
            )
            continue
        nbytes = sum(extent.nbytes for extent in group)
        if chain:
            offset = end + group[0].offset % ALIGNMENT
            for extent in group:
                start = align_down(extent.offset)
                stop = min(align_up(extent.offset + extent.nbytes), files[extent.file].size)
                behind.append(Read(extent.file, start, stop - start, end))
                end += align_up(stop - start)
            placed: tuple[tuple[int, int], ...] = ((offset, nbytes),)
        else:
            placed = tuple((place(extent), extent.nbytes) for extent in group)
        checks += _checks(piece, placed, by_rows)
        offset = placed[0][0] if placed else 0
        in_place = len(placed) <= 1 and offset % _start_alignment(piece.parameter) == 0
        if not in_place:
            offset = -(-end // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
            end = offset + nbytes
        sources = () if in_place else placed
        members.append(Member(piece.parameter.name, offset, nbytes, piece.row_start, piece.row_stop, sources))
    return StreamUnit(name, align_up(end), with_checks((*reads, *behind), checks), tuple(members), layer)


def assemble(unit: StreamUnit, view: memoryview) -> None:
    """Copy together the members of `unit` that cannot be used where they were read. `view` holds the unit."""
    for member in unit.members:
        position = member.offset
        for source, nbytes in member.pieces:
            view[position : position + nbytes] = view[source : source + nbytes]
            position += nbytes


def sweep_units(
    manifest: ModelManifest,
    tier_of: Mapping[str, Tier],
    head_chunk_rows: int,
    streamed_tiers: Collection[Tier] = FILE_TIERS,
) -> tuple[StreamUnit, ...]:
    """Everything that one sweep streams, in the order of its use: decoder layers, then chunks of the output head.

    A layer without streamed parameters has no unit. Routed experts are in none: which ones are needed, the router says
    (`expert_stream`). The input embedding is read by rows (`row_unit`); where it is tied and on disk it is streamed
    here as the head.

    Args:
        tier_of: tier of every parameter by name (`WeightPlan.tier_of`).
        head_chunk_rows: vocabulary rows per chunk, needed when the head is streamed; a head that is stored in pieces
            is used by these.
    """
    units = []
    for layer in range(manifest.num_layers):
        parameters = (p for p in manifest.layer_parameters(layer) if p.expert is None)
        pieces = [whole(p) for p in parameters if tier_of[p.name] in streamed_tiers]
        if pieces:
            units.append(build_unit(f"layer {layer}", pieces, manifest.files, layer))
    if tier_of[manifest.head] in streamed_tiers:
        if head_chunk_rows <= 0:
            raise ValueError(f"{manifest.head} is streamed, so head_chunk_rows must be positive, not {head_chunk_rows}")
        head = manifest.by_name[manifest.head]
        piece_rows = head.stored.piece_rows if head.stored is not None else 0
        for piece in _split(head, piece_rows or head_chunk_rows):
            units.append(build_unit(f"head rows {piece.row_start}-{piece.row_stop}", [piece], manifest.files))
    return tuple(units)


def parameter_unit(parameter: Parameter, files: Sequence[SourceFile]) -> StreamUnit:
    """The unit that holds one parameter whole; its extents lie in `files`."""
    return build_unit(parameter.name, [whole(parameter)], files)


def row_unit(parameter: Parameter, rows: Sequence[int], files: Sequence[SourceFile]) -> StreamUnit:
    """The unit that holds single `rows` of a parameter, ascending and distinct; runs of rows are one member."""
    pieces: list[Piece] = []
    for row in rows:
        if pieces and pieces[-1].row_stop == row:
            pieces[-1] = Piece(parameter, pieces[-1].row_start, row + 1)
        else:
            pieces.append(Piece(parameter, row, row + 1))
    return build_unit(f"rows of {parameter.name}", pieces, files, by_rows=True)


def _split(parameter: Parameter, rows: int) -> Iterator[Piece]:
    for start in range(0, num_rows(parameter), rows):
        yield Piece(parameter, start, min(start + rows, num_rows(parameter)))


def _extents(piece: Piece) -> Iterator[Extent]:
    """File ranges of the piece in the order of its bytes; ranges that follow each other in a file are one."""
    start, stop = _byte_range(piece)
    stored = piece.parameter.stored
    extents = piece.parameter.extents if stored is None else stored.extents
    if start < stop and not extents:
        raise CheckpointError(f"{piece.parameter.name} has no bytes: the model directory holds no weights")
    position = 0
    last: Extent | None = None
    for extent in extents:
        first, end = max(start, position), min(stop, position + extent.nbytes)
        if first < end:
            found = Extent(extent.file, extent.offset + first - position, end - first)
            if last and (last.file, last.offset + last.nbytes) == (found.file, found.offset):
                last = Extent(last.file, last.offset, last.nbytes + found.nbytes)
            else:
                if last:
                    yield last
                last = found
        position += extent.nbytes
    if last:
        yield last


def _byte_range(piece: Piece) -> tuple[int, int]:
    """Where the piece is in the bytes of its parameter's form."""
    parameter, nbytes, stored = piece.parameter, held_nbytes(piece.parameter), piece.parameter.stored
    if stored is not None and stored.piece_rows:
        first, last = piece.row_start // stored.piece_rows, -(-piece.row_stop // stored.piece_rows)
        return sum(stored.frames.pieces[:first]), sum(stored.frames.pieces[:last])
    if piece.row_start == 0 and piece.row_stop == num_rows(parameter):
        return 0, nbytes
    size = row_bytes(parameter)
    return piece.row_start * size, piece.row_stop * size


def _start_alignment(parameter: Parameter) -> int:
    """What the address of the parameter has to be a multiple of."""
    stored = parameter.stored
    plain = stored is None or stored.form is None or stored.form.dtype is not None
    return DTYPE_BYTES[parameter.dtype] if plain else SCRATCH_ALIGNMENT


def _coded(piece: Piece) -> Stored | None:
    """How the parameter is stored, if it has to be decoded, or taken out of whole frames that can be checked."""
    stored = piece.parameter.stored
    if stored is None:
        return None
    start, stop = _byte_range(piece)
    starts = stored.frames.starts()
    whole = all(starts[bisect_left(starts, border)] == border for border in (start, stop))
    return stored if stored.codec.name != "none" or not whole else None


def _checks(piece: Piece, placed: Sequence[tuple[int, int]], by_rows: bool) -> Iterator[Check]:
    """What is checked of a piece, whose bytes lie at `placed` ((offset in the unit, bytes) each)."""
    parameter, stored = piece.parameter, piece.parameter.stored
    start, stop = _byte_range(piece)
    size = row_bytes(parameter) if by_rows else None
    found: Iterator[tuple[int, int, Extent, int | None]]
    if stored is None:
        found = ((at, e.nbytes, e, None) for at, e in check_ranges(parameter, start, stop, size))
    else:
        found = _stored_ranges(stored, start, stop, size)
    runs = iter(placed)
    end, shift = start, 0
    for position, nbytes, extent, checksum in found:
        while position >= end:
            offset, length = next(runs)
            shift = offset - end
            end += length
        yield Check(parameter.name, extent.file, extent.offset, nbytes, position + shift, checksum)


def _stored_ranges(
    stored: Stored, start: int, stop: int, size: int | None
) -> Iterator[tuple[int, int, Extent, int | None]]:
    """Position, bytes, first extent and checksum of the frames, or parts of `size` bytes, from `start` to `stop`."""
    if size is None:
        frames, starts = stored.frames.overlapping(start, stop), stored.frames.starts()
        checksums = stored.frames.checksums
        parts: list[tuple[int, int, int | None]] = [(starts[i], starts[i + 1], checksums[i]) for i in frames]
    else:
        parts = [(at, at + size, None) for at in range(start, stop, size)]
    for first, last, checksum in parts:
        yield first, last - first, next(slice_extents(stored.extents, first, last)), checksum


def _coded_reads(parameter: Parameter, stored: Stored, indices: range, dest: int) -> Iterator[CodedRead]:
    """Requests for these frames, decoded one behind the other from `dest` on."""
    element, offsets, frames = element_of(stored.form, parameter.dtype), stored.frames.offsets(), stored.frames
    starts = frames.starts()
    first = indices.start
    while first < indices.stop:
        last = first + 1
        while last < indices.stop and offsets[last + 1] - offsets[first] <= CODED_REQUEST:
            last += 1
        reads: list[Read] = []
        begin, end = 0, 0
        for extent in slice_extents(stored.extents, offsets[first], offsets[last]):
            start, stop = align_down(extent.offset), align_up(extent.offset + extent.nbytes)
            begin = begin if reads else extent.offset - start
            reads.append(Read(extent.file, start, stop - start, end))
            end += stop - start
        coded = []
        for index in range(first, last):
            decoded = starts[index + 1] - starts[index]
            offset = begin + offsets[index] - offsets[first]
            coded.append(CodedFrame(offset, frames.sizes[index], frames.checksums[index], dest, decoded))
            dest += decoded
        yield CodedRead(parameter.name, stored.codec, element, tuple(reads), tuple(coded))
        first = last


def _meet_at_blocks(extents: Sequence[Extent]) -> bool:
    """Whether each extent but the first starts, and each but the last ends, at a border of blocks."""
    return all(e.offset % ALIGNMENT == 0 for e in extents[1:]) and all(
        (e.offset + e.nbytes) % ALIGNMENT == 0 for e in extents[:-1]
    )


def _runs(extents: Sequence[Extent], files: Sequence[SourceFile]) -> list[tuple[int, int, int]]:
    """(file, start, stop) of the fewest aligned ranges that cover `extents` within the limits on gaps."""
    spans = sorted(
        (e.file, align_down(e.offset), min(align_up(e.offset + e.nbytes), files[e.file].size)) for e in extents
    )
    runs: list[list[int]] = []
    for file, start, stop in spans:
        if runs and runs[-1][0] == file and start <= runs[-1][2]:
            runs[-1][2] = max(runs[-1][2], stop)
        else:
            runs.append([file, start, stop])
    # Close the smallest gaps first: they save the most requests for the bytes that they waste.
    gaps = sorted((b[1] - a[2], i) for i, (a, b) in enumerate(pairwise(runs)) if a[0] == b[0])
    allowance = MAX_GAP_FRACTION * sum(e.nbytes for e in extents)
    closed = set()
    for gap, index in gaps:
        allowance -= gap
        if gap >= MAX_GAP or allowance < 0:
            break
        closed.add(index)
    merged: list[tuple[int, int, int]] = []
    for index, (file, start, stop) in enumerate(runs):
        merged.append((file, merged.pop()[1], stop) if index - 1 in closed else (file, start, stop))
    return merged
