"""How a form's bytes look in files: as they are, or compressed in frames that are decoded each by itself.

A frame is about `FRAME_BYTES` of decoded bytes: frames are decoded in parallel, need little memory meanwhile, and each
has its own checksum.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal

import numpy as np
import xxhash
import zstandard

from raytier.codecs.planes import BYTES, Bytes, Element, merge, split
from raytier.errors import TierError

CodecName = Literal["none", "zstd", "zstd-planes"]

#: Decoded bytes of a frame, if its rows are not longer.
FRAME_BYTES = 1 << 20
#: Coded bytes of one request, if a single frame has no more.
CODED_REQUEST = 4 << 20
#: What codecs make of a byte of weights where no sample of them has been coded: of the elements of plain forms. What
#: else there is does not shrink.
RATIOS: Mapping[str, Mapping[str, float]] = {
    "zstd-planes": {"bfloat16": 0.68, "float16": 0.86, "float32": 0.84},
    "zstd": {"bfloat16": 0.79, "float16": 0.93, "float32": 0.93},
}
#: A table of rows (embedding, output head) has at least so many frames: it is used by parts of its rows.
_TABLE_PARTS = 64
#: Part of every scheme on disk: files of another version are made anew.
CODEC_VERSION = 2
#: A plane of noise with a skewed distribution has nothing to find for LZ matching: hardly any memory of what was seen
#: makes it smaller and faster than every level of zstd does (0.663 of bf16 instead of 0.679, and 1.4x the decode rate).
_PLANE = zstandard.ZstdCompressionParameters(
    window_log=19,
    hash_log=6,
    chain_log=6,
    search_log=1,
    min_match=7,
    target_length=0,
    strategy=zstandard.STRATEGY_FAST,
)
_SIZE_BYTES = 4  # of a plane, in the head of a frame


@dataclass(frozen=True, slots=True)
class Codec:
    """`level`: of zstd. Byte planes have parameters of their own."""

    name: CodecName = "none"
    level: int = 1

    def __str__(self) -> str:
        return f"{self.name}-{self.level}" if self.name == "zstd" else self.name

    def most_bytes(self, decoded: int) -> int:
        """Upper bound of the coded bytes of a frame."""
        return decoded + (4 * _SIZE_BYTES if self.name == "zstd-planes" else 0)


NONE = Codec()


@dataclass(frozen=True, slots=True)
class Frames:
    """The frames of `nbytes` decoded bytes, in order: `step` decoded bytes in each but the last.

    Attributes:
        pieces: decoded bytes of each piece, where there are several: the last frame of each is shorter.
        sizes: coded bytes of each.
        checksums: xxh3 (64 bits) of the coded bytes of each.
    """

    nbytes: int
    step: int
    sizes: tuple[int, ...]
    checksums: tuple[int, ...]
    pieces: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.pieces and sum(self.pieces) != self.nbytes:
            raise ValueError(f"pieces of {self.pieces} bytes do not make {self.nbytes}")
        count = sum(-(-piece // self.step) for piece in self._pieces()) if self.step > 0 else -1
        if not count == len(self.sizes) == len(self.checksums):
            raise ValueError(f"{len(self.sizes)} sizes, {len(self.checksums)} checksums for {count} frames")

    @property
    def coded_nbytes(self) -> int:
        return sum(self.sizes)

    def _pieces(self) -> tuple[int, ...]:
        return self.pieces or (self.nbytes,)

    def starts(self) -> tuple[int, ...]:
        """Where each begins in the decoded bytes, and the end of the last."""
        return _starts(self._pieces(), self.step)

    def overlapping(self, start: int, stop: int) -> range:
        """Frames that hold decoded bytes [start, stop)."""
        starts = self.starts()
        return range(bisect_right(starts, start) - 1, bisect_left(starts, stop)) if start < stop else range(0)

    def offsets(self) -> list[int]:
        """Where each begins in the coded bytes, and the end of the last."""
        return [0, *accumulate(self.sizes)]


@lru_cache(maxsize=4096)
def _starts(pieces: tuple[int, ...], step: int) -> tuple[int, ...]:
    starts: list[int] = []
    begin = 0
    for piece in pieces:
        starts += range(begin, begin + piece, step)
        begin += piece
    return (*starts, begin)


def frame_step(nbytes: int, rows: int, *, table: bool = False) -> int:
    """Decoded bytes of a frame of something with `rows` equal rows: whole rows, if these are short enough.

    Args:
        table: parts of its rows are used by themselves.
    """
    row = nbytes // rows if rows and nbytes % rows == 0 else 0
    most = min(FRAME_BYTES, max(row, nbytes // _TABLE_PARTS)) if table else FRAME_BYTES
    return most // row * row if 0 < row <= most else FRAME_BYTES


def frame_ranges(nbytes: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of every frame in the decoded bytes."""
    for start in range(0, nbytes, step):
        yield start, min(nbytes, start + step)


def checksum(data: bytes | memoryview) -> int:
    """xxh3 of bytes as they are in a file; the GIL is free meanwhile."""
    return xxhash.xxh3_64_intdigest(data)


class Encoder:
    """Encodes frames of bytes that consist of `element`s. One thread at a time."""

    def __init__(self, codec: Codec, element: Element = BYTES) -> None:
        self._codec = codec
        self._element = element
        self._plain = zstandard.ZstdCompressor(level=codec.level)
        self._plane = zstandard.ZstdCompressor(compression_params=_PLANE)

    def encode(self, frame: Bytes) -> bytes | memoryview:
        """A frame in its file: at most `Codec.most_bytes`. What does not shrink stays as it is."""
        if self._codec.name == "none":
            return frame.data
        if self._codec.name == "zstd":
            coded = self._plain.compress(frame.data)
            return coded if len(coded) < len(frame) else frame.data
        whole = len(frame) // self._element.nbytes * self._element.nbytes
        planes = []
        for plane in split(frame[:whole], self._element):
            coded = self._plane.compress(plane.data)
            planes.append(coded if len(coded) < len(plane) else plane.tobytes())
        head = np.array([len(plane) for plane in planes], f"<u{_SIZE_BYTES}").tobytes()
        return b"".join([head, *planes, frame[whole:].tobytes()])


class Decoder:
    """Decodes frames, with memory of its own that it uses again and again. One thread at a time."""

    def __init__(self) -> None:
        self._zstd = zstandard.ZstdDecompressor()
        self._planes: list[Bytes] = []

    def decode(self, codec: Codec, element: Element, coded: Bytes, into: Bytes) -> None:
        """The frame `coded` to `into`, which is as long as the decoded frame.

        Raises:
            TierError: these are not the bytes of such a frame.
        """
        if codec.name == "none" or (codec.name == "zstd" and len(coded) == len(into)):
            if len(coded) != len(into):
                raise TierError(f"a frame has {len(coded)} bytes, expected {len(into)}")
            into[:] = coded
        elif codec.name == "zstd":
            self._decompress(coded, into)
        else:
            self._decode_planes(element, coded, into)

    def _decode_planes(self, element: Element, coded: Bytes, into: Bytes) -> None:
        count = element.nbytes
        length, tail = divmod(len(into), count)
        begin = count * _SIZE_BYTES
        sizes = coded[:begin].view(f"<u{_SIZE_BYTES}").tolist() if len(coded) >= begin else []
        if begin + sum(sizes) + tail != len(coded) or any(size > length for size in sizes):
            raise TierError(f"a frame of {len(coded)} bytes is not made of planes of {sizes} bytes")
        if count == 1 and sizes[0] < length:
            self._decompress(coded[begin : begin + sizes[0]], into)
            return
        planes = []
        for number, size in enumerate(sizes):
            plane = coded[begin : begin + size]
            begin += size
            if size < length:
                memory = self._plane(number, length)
                self._decompress(plane, memory)
                plane = memory
            planes.append(plane)
        if length:
            merge(planes, element, into[: length * count])
        into[length * count :] = coded[begin:]

    def _plane(self, number: int, length: int) -> Bytes:
        while len(self._planes) <= number:
            self._planes.append(np.empty(0, np.uint8))
        if len(self._planes[number]) < length:
            self._planes[number] = np.empty(length, np.uint8)
        return self._planes[number][:length]

    def _decompress(self, coded: Bytes, into: Bytes) -> None:
        try:
            with self._zstd.stream_reader(coded.data) as reader:
                # The whole frame is there and fits: zstd decodes it in one go, without a buffer between.
                nbytes = reader.readinto(into.data)
        except zstandard.ZstdError as error:
            raise TierError(f"a frame cannot be decompressed: {error}") from error
        if nbytes != len(into):
            raise TierError(f"a frame holds {nbytes} bytes, expected {len(into)}")
