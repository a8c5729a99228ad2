"""What the reading threads are asked for: ranges of files, where their bytes go, and what they have to be."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from raytier.codecs.codec import Codec
from raytier.codecs.planes import Element
from raytier.tiers.aligned import align_up


@dataclass(frozen=True, slots=True)
class Check:
    """`nbytes` at `dest` in the unit, which come from `offset` of the file `file`, are to have a checksum.

    Attributes:
        name: the parameter that they are part of.
        checksum: None: the one that they had when they were first read.
    """

    name: str
    file: int
    offset: int
    nbytes: int
    dest: int
    checksum: int | None = None

    @property
    def end(self) -> int:
        return self.dest + self.nbytes


@dataclass(frozen=True, slots=True)
class Read:
    """`nbytes` at `offset` of the manifest's file `file` go to `dest` in the unit.

    `offset` and `dest` are aligned, and so is `nbytes` unless the range ends with the file; the unit has room
    for `align_up(nbytes)` at `dest`.

    Attributes:
        checks: of what it brings, or brings together with its neighbours, by rising `dest`.
    """

    file: int
    offset: int
    nbytes: int
    dest: int
    checks: tuple[Check, ...] = ()


@dataclass(frozen=True, slots=True)
class CodedFrame:
    """`nbytes` coded bytes at `offset` of what was read become `decoded` bytes at `dest` in the unit."""

    offset: int
    nbytes: int
    checksum: int
    dest: int
    decoded: int


@dataclass(frozen=True, slots=True)
class CodedRead:
    """Consecutive frames: `reads` bring them to memory of the reader, `scratch_bytes` of it (their `dest` is there).

    Attributes:
        name: the parameter that they are part of.
    """

    name: str
    codec: Codec
    element: Element
    reads: tuple[Read, ...]
    frames: tuple[CodedFrame, ...]

    @property
    def scratch_bytes(self) -> int:
        return max(read.dest + align_up(read.nbytes) for read in self.reads)

    @property
    def nbytes(self) -> int:
        """Bytes that are read."""
        return sum(read.nbytes for read in self.reads)


def with_checks(reads: Sequence[Read | CodedRead], checks: Sequence[Check]) -> tuple[Read | CodedRead, ...]:
    """`reads` with what is to be checked of each: they and the checks rise in the unit, each without overlaps."""
    ordered = sorted(checks, key=lambda check: check.dest)
    starts = [check.dest for check in ordered]
    found: list[Read | CodedRead] = []
    for read in reads:
        if isinstance(read, Read):
            first = max(0, bisect_right(starts, read.dest) - 1)
            last = bisect_left(starts, read.dest + read.nbytes)
            read = replace(read, checks=tuple(c for c in ordered[first:last] if c.end > read.dest))
        found.append(read)
    return tuple(found)
