"""D2, D6: what is read when, straight from the checkpoint, and how little beside it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from raytier.checkpoint.manifest import DTYPE_BYTES, Extent, KVLayerSpec, ModelManifest, Parameter, Role, SourceFile
from raytier.errors import CheckpointError
from raytier.execution.layout import (
    MAX_GAP_FRACTION,
    Piece,
    StreamUnit,
    assemble,
    build_unit,
    row_bytes,
    row_unit,
    sweep_units,
    whole,
)
from raytier.planner.plan import Tier
from raytier.tiers.aligned import ALIGNMENT, align_up

DATA = (bytes(i * 7 % 251 for i in range(3_000_001)), bytes(i * 11 % 241 for i in range(400_003)))
FILES = tuple(SourceFile(f"{i}.safetensors", len(data)) for i, data in enumerate(DATA))


def parameter(name: str, *extents: tuple[int, int, int], row: int = 1, dtype: str = "bool", **role: Any) -> Parameter:
    """A parameter whose rows have `row` elements, made of (file, offset, bytes)."""
    nbytes = sum(size for _, _, size in extents)
    shape = (nbytes // row // DTYPE_BYTES[dtype], row)
    return Parameter(name, shape, dtype, extents=tuple(Extent(*e) for e in extents), **(role or {"role": Role.OTHER}))


def content(piece: Piece) -> bytes:
    extents = piece.parameter.extents
    data = b"".join(DATA[e.file][e.offset : e.offset + e.nbytes] for e in extents)
    size = row_bytes(piece.parameter)
    return data[piece.row_start * size : piece.row_stop * size]


def load(unit: StreamUnit) -> memoryview:
    """The unit as reads and `assemble` fill it; what no read writes is 0xEE."""
    view = memoryview(bytearray(b"\xee" * unit.nbytes))
    for read in unit.reads:
        view[read.dest : read.dest + read.nbytes] = DATA[read.file][read.offset : read.offset + read.nbytes]
    assemble(unit, view)
    return view


def check(unit: StreamUnit, pieces: list[Piece]) -> None:
    """Everything that is promised of a unit."""
    assert unit.nbytes % ALIGNMENT == 0
    end = 0
    for read in unit.reads:
        assert read.offset % ALIGNMENT == read.dest % ALIGNMENT == 0
        assert read.nbytes % ALIGNMENT == 0 or read.offset + read.nbytes == FILES[read.file].size
        assert read.offset + read.nbytes <= FILES[read.file].size
        assert read.dest == end
        end = read.dest + align_up(read.nbytes)
    assert end <= unit.nbytes
    places = [(read.file, read.offset, read.nbytes) for read in unit.reads]
    assert places == sorted(places)
    assert all(a[0] != b[0] or a[1] + a[2] < b[1] for a, b in pairwise(places))
    view = load(unit)
    assert len(unit.members) == len(pieces)
    for member, piece in zip(unit.members, pieces, strict=True):
        assert (member.name, member.row_start, member.row_stop) == (
            piece.parameter.name,
            piece.row_start,
            piece.row_stop,
        )
        assert member.offset % DTYPE_BYTES[piece.parameter.dtype] == 0
        assert member.offset + member.nbytes <= unit.nbytes
        assert view[member.offset : member.offset + member.nbytes] == content(piece)
        if member.pieces:
            assert member.offset >= end, "assembled over what was read"
    assert unit.wanted_bytes == sum(len(content(piece)) for piece in pieces)


@st.composite
def pieces_of_a_unit(draw: st.DrawFn) -> list[Piece]:
    found = []
    for index in range(draw(st.integers(1, 6))):
        dtype = draw(st.sampled_from(["bool", "bfloat16", "float32", "int64"]))
        item, row = DTYPE_BYTES[dtype], draw(st.integers(1, 500))
        extents = []
        for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
            file = draw(st.integers(0, 1))
            nbytes = draw(st.integers(1, min(300, 100_000 // (row * item)))) * row * item
            offset = draw(st.integers(0, len(DATA[file]) - nbytes))
            if draw(st.booleans()):
                offset -= offset % item
            if draw(st.integers(0, 9)) == 0:
                offset = len(DATA[file]) - nbytes  # the file's very end
            extents.append((file, offset, nbytes))
        whole_parameter = parameter(f"p{index}", *extents, row=row, dtype=dtype)
        rows = whole_parameter.shape[0]
        start = draw(st.sampled_from([0, 0, rows // 3]))
        found.append(Piece(whole_parameter, start, draw(st.sampled_from([rows, max(start + 1, rows // 2)]))))
    return found


@settings(max_examples=150, deadline=None)
@given(pieces_of_a_unit())
def test_any_pieces_are_read_exactly_and_within_the_promised_waste(pieces: list[Piece]) -> None:
    unit = build_unit("u", pieces, FILES)
    check(unit, pieces)
    extents = sum(len(piece.parameter.extents) for piece in pieces)
    assert unit.read_bytes <= unit.wanted_bytes * (1 + MAX_GAP_FRACTION) + extents * 2 * ALIGNMENT


def test_a_layer_written_in_one_go_is_one_read_used_in_place() -> None:
    offsets = range(1234, 1_201_234, 300_000)
    pieces = [whole(parameter(f"p{o}", (0, o, 300_000), dtype="bfloat16")) for o in offsets]
    unit = build_unit("u", pieces, FILES, layer=3)
    check(unit, pieces)
    assert len(unit.reads) == 1
    assert unit.layer == 3
    assert unit.rows is None
    assert not any(member.pieces for member in unit.members)
    assert [member.offset for member in unit.members] == [1234 + i * 300_000 for i in range(4)]
    assert unit.read_bytes / unit.wanted_bytes <= 1.02


def test_amplification_of_large_units_with_scattered_small_parameters() -> None:
    large = [whole(parameter(f"w{i}", (0, 200_001 + i * 600_000, 550_000))) for i in range(4)]
    norms = [whole(parameter(f"n{i}", (0, 100_000 + i * 600_000 - 7, 4096))) for i in range(4)]
    unit = build_unit("u", [*large, *norms], FILES)
    check(unit, [*large, *norms])
    assert unit.wanted_bytes > 1 << 20
    assert unit.read_bytes / unit.wanted_bytes <= 1.02 + 4 * 8192 / unit.wanted_bytes  # each norm lies alone


def test_small_gaps_are_read_along_but_no_more_than_the_allowance() -> None:
    spaced = [whole(parameter(f"p{i}", (0, i * 409_600, 393_216))) for i in range(7)]  # gaps of four blocks
    unit = build_unit("u", spaced, FILES)
    check(unit, spaced)
    assert len(unit.reads) == 7 - 1  # one per cent of 2.75 MB pays for one gap of 16 KiB
    assert build_unit("u", spaced[:1], FILES).read_bytes == 393_216
    files = [SourceFile("large", 1 << 30)]  # one per cent of 80 MB would pay for a gap of any size
    for gap, reads in ((65_536 - 4096, 1), (65_536, 2)):
        far = [whole(parameter(f"p{i}", (0, i * (40 * (1 << 20) + gap), 40 << 20))) for i in range(2)]
        assert len(build_unit("u", far, files).reads) == reads
    touching = [whole(parameter("a", (0, 0, 5000))), whole(parameter("b", (0, 8000, 5000)))]
    assert len(build_unit("u", touching, FILES).reads) == 1  # they share blocks: merging costs nothing


def test_extents_that_follow_each_other_are_used_in_place() -> None:
    pieces = [whole(parameter("p", (1, 1000, 600), (1, 1600, 400), dtype="float32"))]
    unit = build_unit("u", pieces, FILES)
    check(unit, pieces)
    assert not unit.members[0].pieces


@pytest.mark.parametrize(
    "extents", [[(0, 1000, 600), (0, 400, 600)], [(0, 0, 4000), (1, 0, 4096)], [(0, 1001, 4000)]], ids=str
)
def test_what_cannot_be_used_in_place_is_assembled(extents: list[tuple[int, int, int]]) -> None:
    pieces = [whole(parameter("p", *extents, dtype="float32")), whole(parameter("q", (0, 9000, 100)))]
    unit = build_unit("u", pieces, FILES)
    check(unit, pieces)
    assert unit.members[0].pieces
    assert not unit.members[1].pieces
    assert sum(nbytes for _, nbytes in unit.members[0].pieces) == unit.members[0].nbytes


def test_what_is_not_in_the_files_is_refused() -> None:
    with pytest.raises(CheckpointError, match="p has no bytes"):
        build_unit("u", [whole(Parameter("p", (4,), "bool", Role.OTHER))], FILES)
    with pytest.raises(CheckpointError, match="beyond the 400003 bytes"):
        build_unit("u", [whole(parameter("p", (1, 400_000, 4)))], FILES)
    scalar = Parameter("s", (), "float32", Role.OTHER, extents=(Extent(0, 8, 4),))
    check(build_unit("u", [whole(scalar)], FILES), [whole(scalar)])


def manifest(*, tied: bool) -> ModelManifest:
    parameters = [parameter("embed", (1, 77, 100 * 512), row=512, role=Role.EMBEDDING)]
    for layer in range(3):
        for kind, size in (("w", 70_000), ("n", 256)):
            offset = 333 + layer * 200_000 + (100_000 if kind == "n" else 0)
            parameters.append(parameter(f"{layer}.{kind}", (0, offset, size), role=Role.LAYER, layer=layer))
    if not tied:
        parameters.append(parameter("head", (1, 80_000, 100 * 512), row=512, role=Role.HEAD))
    parameters.append(parameter("norm", (1, 200_000, 256)))
    return ModelManifest(
        "/m", "A", "a", FILES, tuple(parameters), 3, 512, 100, 64, "bfloat16", (KVLayerSpec(1, 8, 8),) * 3, "embed",
        "embed" if tied else "head",
    )  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_a_sweep_is_the_streamed_layers_then_the_head(tied: bool) -> None:
    model = manifest(tied=tied)
    resident = {"0.n", "1.w", "1.n", "2.n", "norm"}
    tier_of = {p.name: Tier.HOST if p.name in resident else Tier.NVME for p in model.parameters}
    units = sweep_units(model, tier_of, head_chunk_rows=40)
    assert [(u.layer, u.rows) for u in units] == [
        (0, None),
        (2, None),
        (None, (0, 40)),
        (None, (40, 80)),
        (None, (80, 100)),
    ]
    assert [[m.name for m in u.members] for u in units] == [["0.w"], ["2.w"], [model.head], [model.head], [model.head]]
    for unit in units:
        check(unit, [Piece(model.by_name[m.name], m.row_start, m.row_stop) for m in unit.members])
    assert sum(u.wanted_bytes for u in units) == 2 * 70_000 + 100 * 512
    with pytest.raises(ValueError, match="head_chunk_rows"):
        sweep_units(model, tier_of, head_chunk_rows=0)


def test_a_resident_model_streams_nothing() -> None:
    model = manifest(tied=False)
    assert sweep_units(model, dict.fromkeys(model.by_name, Tier.HOST), head_chunk_rows=0) == ()
    every = sweep_units(model, dict.fromkeys(model.by_name, Tier.HOST), 100, streamed_tiers={Tier.HOST})
    assert [u.layer for u in every] == [0, 1, 2, None]


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 60), st.integers(1, 5)), min_size=2, max_size=5),
    st.integers(1, ALIGNMENT),
    st.integers(0, 40),
)
def test_stripes_that_meet_at_blocks_are_read_one_behind_the_other(
    stripes: list[tuple[int, int, int]], last: int, skipped: int
) -> None:
    extents = [(file, block * ALIGNMENT, blocks * ALIGNMENT) for file, block, blocks in stripes]
    extents[-1] = (*extents[-1][:2], extents[-1][2] - ALIGNMENT + last)
    striped = parameter("w", *extents)
    assume(skipped < striped.nbytes)
    other = parameter("n", (0, 2_000_001, 300))
    pieces = [whole(other), Piece(striped, skipped, striped.nbytes), whole(striped)]
    unit = build_unit("stripes", pieces, FILES)
    assert [bytes(load(unit)[m.offset : m.offset + m.nbytes]) for m in unit.members] == [content(p) for p in pieces]
    assert not any(member.pieces for member in unit.members)  # nothing is copied together
    ends = [read.dest + align_up(read.nbytes) for read in unit.reads]
    assert ends == [*(read.dest for read in unit.reads[1:]), unit.nbytes]


@given(st.sets(st.integers(0, 99), min_size=1))
def test_rows(rows: set[int]) -> None:
    embed = parameter("embed", (1, 77, 60 * 512 + 100), (0, 5, 40 * 512 - 100), row=512)  # row 60 is in both files
    unit = row_unit(embed, sorted(rows), FILES)
    view = load(unit)
    found = {}
    for member in unit.members:
        for row in range(member.row_start, member.row_stop):
            start = member.offset + (row - member.row_start) * 512
            found[row] = bytes(view[start : start + 512])
    assert found == {row: content(Piece(embed, row, row + 1)) for row in rows}
