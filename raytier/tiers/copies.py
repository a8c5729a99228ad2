"""A parameter's bytes in files of a tier: where they lie beside the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from raytier.checkpoint.manifest import SourceFile, Stored


@dataclass(frozen=True, slots=True)
class TierCopy:
    """One parameter in files of a tier: the extents of `stored` index `files`, which are padded to whole blocks."""

    files: tuple[SourceFile, ...]
    stored: Stored

    @property
    def nbytes(self) -> int:
        """Bytes in the files, without padding."""
        return self.stored.frames.coded_nbytes
