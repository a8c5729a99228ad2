"""What the files of a tier take."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DirectoryUsage:
    """One directory of a tier: what it holds of it, and what its filesystem has free. Sizes in bytes."""

    path: str
    files: int
    nbytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class TierUsage:
    """What a tier's own files take, and what has been done to them. Sizes in bytes, padding included.

    Attributes:
        capacity: that may be stored; None: as much as the filesystems have room for.
        writes, bytes_written: requests and bytes since the tier was opened.
        source_bytes_read: read from checkpoint files in order to copy them.
        errors: copies and removals that failed.
        models: model -> bytes of its copies.
    """

    files: int
    nbytes: int
    capacity: int | None
    writes: int
    bytes_written: int
    source_bytes_read: int
    errors: int
    directories: tuple[DirectoryUsage, ...]
    models: dict[str, int]

    def __add__(self, other: TierUsage) -> TierUsage:
        """Of both, which share their capacity."""
        return TierUsage(
            self.files + other.files,
            self.nbytes + other.nbytes,
            self.capacity,
            self.writes + other.writes,
            self.bytes_written + other.bytes_written,
            self.source_bytes_read + other.source_bytes_read,
            self.errors + other.errors,
            self.directories + other.directories,
            dict(Counter(self.models) + Counter(other.models)),
        )
