"""B3, B4: what is coded comes back bit for bit, whatever it is; what is no frame is refused."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytier.codecs import planes
from raytier.codecs.codec import FRAME_BYTES, NONE, Codec, Decoder, Encoder, Frames, frame_ranges, frame_step
from raytier.codecs.planes import BYTES, ELEMENTS, Bytes, Element
from raytier.errors import TierError

CODECS = [NONE, Codec("zstd"), Codec("zstd", 19), Codec("zstd-planes")]
ALL_ELEMENTS = [BYTES, *ELEMENTS.values()]


@pytest.fixture(params=["C", "numpy"])
def merging(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Planes are merged by the library or by numpy."""
    monkeypatch = request.getfixturevalue("monkeypatch")
    monkeypatch.setattr(planes, "_merge", {})
    if request.param == "C" and not planes.use_kernels(str(tmp_path_factory.getbasetemp() / "planes")):
        pytest.skip("no C compiler")


def round_trip(codec: Codec, element: Element, data: Bytes, offset: int = 0) -> bytes:
    """What comes out of a decoder that has decoded something else before; `offset` of the destination from a block."""
    decoder = Decoder()
    decoder.decode(codec, element, np.frombuffer(bytes(Encoder(codec, element).encode(data)), np.uint8), data.copy())
    coded = bytes(Encoder(codec, element).encode(data))
    assert len(coded) <= codec.most_bytes(len(data))
    memory = np.full(offset + len(data) + 1, 0xEE, np.uint8)
    decoder.decode(codec, element, np.frombuffer(coded, np.uint8), memory[offset : offset + len(data)])
    assert (memory[:offset] == 0xEE).all() and memory[-1] == 0xEE, "only what was asked for is written"
    return memory[offset : offset + len(data)].tobytes()


@pytest.mark.usefixtures("merging")
@pytest.mark.parametrize("codec", CODECS, ids=str)
@pytest.mark.parametrize("element", ALL_ELEMENTS, ids=str)
def test_floats_of_every_kind_come_back(codec: Codec, element: Element) -> None:
    """Weights, and every payload of infinities, NaN, denormals and zeros that there is for the dtype."""
    draw = np.random.default_rng(0)
    weights = draw.standard_normal(50_000, dtype=np.float32) * 0.02
    special = np.concatenate([np.arange(2**16, dtype=np.uint16), np.array([0, 0x8000], np.uint16)]).view(np.uint8)
    for data in (weights.view(np.uint8), (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8), special):
        for cut in (len(data), len(data) - 1, len(data) - 3):  # bytes behind the last whole element
            assert round_trip(codec, element, data[:cut], offset=3) == data[:cut].tobytes()


@pytest.mark.parametrize("codec", CODECS, ids=str)
@given(data=st.binary(max_size=300), repeat=st.integers(1, 40), element=st.sampled_from(ALL_ELEMENTS))
@settings(max_examples=100, deadline=None)
def test_any_bytes_come_back(codec: Codec, data: bytes, repeat: int, element: Element) -> None:
    assert round_trip(codec, element, np.frombuffer(data * repeat, np.uint8)) == data * repeat


def test_weights_are_two_thirds() -> None:
    """T4: bf16 of normal weights, the noise of the mantissa included."""
    weights = np.random.default_rng(0).standard_normal(FRAME_BYTES // 2, dtype=np.float32) * 0.02
    data = (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    coded = Encoder(Codec("zstd-planes"), ELEMENTS["bfloat16"]).encode(data)
    assert len(coded) / len(data) < 0.68
    noise = np.frombuffer(np.random.default_rng(1).bytes(FRAME_BYTES), np.uint8)
    assert len(Encoder(Codec("zstd-planes"), ELEMENTS["bfloat16"]).encode(noise)) == FRAME_BYTES + 8, "planes stay raw"
    assert len(Encoder(Codec("zstd"), BYTES).encode(noise)) == FRAME_BYTES


@pytest.mark.parametrize("codec", CODECS, ids=str)
@given(junk=st.binary(max_size=200), length=st.integers(0, 100))
@settings(max_examples=100, deadline=None)
def test_what_is_no_frame_is_refused_and_writes_nothing_else(codec: Codec, junk: bytes, length: int) -> None:
    memory = np.full(length + 2, 0xEE, np.uint8)
    if codec.name == "none" or (codec.name == "zstd" and len(junk) == length):
        return  # any bytes are a frame
    with suppress(TierError):
        Decoder().decode(codec, ELEMENTS["bfloat16"], np.frombuffer(junk, np.uint8), memory[1:-1])
    assert memory[0] == memory[-1] == 0xEE


@pytest.mark.parametrize("cut", [0, 3, 11, -1])
def test_a_frame_that_is_cut(cut: int) -> None:
    data = np.zeros(1000, np.uint8)
    for codec in CODECS[1:]:
        coded = np.frombuffer(bytes(Encoder(codec, ELEMENTS["float32"]).encode(data)), np.uint8)
        with pytest.raises(TierError, match="frame"):
            Decoder().decode(codec, ELEMENTS["float32"], coded[:cut], np.zeros(1000, np.uint8))


def test_frames_have_whole_rows() -> None:
    assert frame_step(4096 * 1000, 1000) == FRAME_BYTES
    assert frame_step(300_000 * 10, 10) == 900_000
    assert frame_step(2_000_000 * 10, 10) == FRAME_BYTES, "rows that are too long are cut"
    assert frame_step(0, 0) == frame_step(7, 2) == FRAME_BYTES
    assert list(frame_ranges(10, 4)) == [(0, 4), (4, 8), (8, 10)]
    frames = Frames(10, 4, (3, 4, 2), (1, 2, 3))
    assert (frames.coded_nbytes, frames.offsets(), (frames.starts()[2 + 1] - frames.starts()[2])) == (
        9,
        [0, 3, 7, 9],
        2,
    )
    assert [frames.overlapping(a, b) for a, b in ((0, 1), (3, 5), (8, 10), (4, 4))] == [
        range(1),
        range(2),
        range(2, 3),
        range(0),
    ]
    with pytest.raises(ValueError, match="2 sizes, 3 checksums for 3 frames"):
        Frames(10, 4, (3, 4), (1, 2, 3))


def test_without_a_compiler_numpy_merges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "_merge", {})
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert not planes.use_kernels(str(tmp_path))
