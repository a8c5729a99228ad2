"""A parameter's bytes in files of a tier: where a copy of them lies beside the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from raytier.checkpoint.manifest import Extent, SourceFile


@dataclass(frozen=True, slots=True)
class TierCopy:
    """One parameter, bit for bit, in files of a tier.

    Its bytes are the concatenation of `extents`, whose `file` indexes `files`. Every extent starts at a multiple of
    `ALIGNMENT` in its file, and all but the last are multiples of it long, so that a reader places them one behind the
    other without a further copy. Files are padded to whole blocks.
    """

    files: tuple[SourceFile, ...]
    extents: tuple[Extent, ...]

    @property
    def nbytes(self) -> int:
        return sum(extent.nbytes for extent in self.extents)
