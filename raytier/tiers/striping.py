"""Where the bytes of a parameter lie when they are spread over several files. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raytier.checkpoint.manifest import Extent
from raytier.tiers.aligned import ALIGNMENT, align_up


def stripe_extents(nbytes: int, files: int, stripe_bytes: int) -> tuple[Extent, ...]:
    """Spread `nbytes` over at most `files` files, in stripes of `stripe_bytes` in turn, beginning with file 0.

    What is no larger than a stripe, or has one file only, is one extent. Extents follow each other in the parameter;
    in every file they lie one behind the other from its beginning. `stripe_bytes` is a multiple of `ALIGNMENT`.
    """
    if nbytes < 0 or files < 1 or stripe_bytes < 1 or stripe_bytes % ALIGNMENT:
        raise ValueError(f"{nbytes} bytes over {files} files in stripes of {stripe_bytes}")
    if nbytes == 0:
        return ()
    if files == 1 or nbytes <= stripe_bytes:
        return (Extent(0, 0, nbytes),)
    return tuple(
        Extent(number % files, number // files * stripe_bytes, min(stripe_bytes, nbytes - start))
        for number, start in enumerate(range(0, nbytes, stripe_bytes))
    )


def file_sizes(extents: Sequence[Extent]) -> tuple[int, ...]:
    """Sizes of the files that `stripe_extents` fills, padded to `ALIGNMENT`."""
    sizes = [0] * (1 + max((extent.file for extent in extents), default=-1))
    for extent in extents:
        sizes[extent.file] = max(sizes[extent.file], align_up(extent.offset + extent.nbytes))
    return tuple(sizes)


def slice_extents(extents: Sequence[Extent], start: int, stop: int) -> Iterator[Extent]:
    """The parts of `extents` that hold bytes [start, stop) of their concatenation, in order."""
    position = 0
    for extent in extents:
        first, last = max(start, position), min(stop, position + extent.nbytes)
        if first < last:
            yield Extent(extent.file, extent.offset + first - position, last - first)
        position += extent.nbytes
        if position >= stop:
            return
