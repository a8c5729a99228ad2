"""DiskTierActor: a node's disk as a tier."""

from __future__ import annotations

import os
from dataclasses import dataclass

from raytier.checkpoint.manifest import ModelManifest
from raytier.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class DiskStatus:
    """Health of the tier: counters since start, free space now, utilisation of the measured rate (0..1)."""

    name: str
    pid: int
    files: int
    reads: int
    bytes_read: int
    errors: int
    free_bytes: int
    measured_bytes_per_s: float | None
    utilization: float


class DiskTierActor:
    """Owns the files of the tier and their health; consumers read the bytes themselves.

    Parameters at source precision stay in the checkpoint's own files, so this tier writes nothing.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._files: dict[str, int] = {}
        self._reads = self._bytes_read = self._errors = 0
        self._rate: float | None = None
        self._utilization = 0.0

    def __repr__(self) -> str:
        return f"DiskTierActor({self._name.rsplit(':', 1)[-1]})"

    def calibrate(self, bytes_per_s: float) -> None:
        """The measured O_DIRECT read rate of the disk; utilisation is reported against it."""
        self._rate = bytes_per_s

    def open_model(self, manifest: ModelManifest) -> int:
        """Verify that every checkpoint file is there with its size; returns their number.

        Raises:
            CheckpointError: a file is missing or has another size than when it was described.
        """
        for file in manifest.files:
            try:
                size = os.stat(file.path).st_size
            except OSError as error:
                self._errors += 1
                raise CheckpointError(f"{file.path}: {error.strerror}; restore the file") from None
            if size != file.size:
                self._errors += 1
                raise CheckpointError(f"{file.path}: {size} bytes on disk, {file.size} when it was described")
            self._files[file.path] = size
        return len(manifest.files)

    def record(self, reads: int, bytes_read: int, seconds: float) -> None:
        """Add what a consumer read in the last `seconds`."""
        self._reads += reads
        self._bytes_read += bytes_read
        if self._rate and seconds > 0:
            self._utilization = min(1.0, bytes_read / seconds / self._rate)

    def ping(self) -> str:
        return self._name

    def status(self) -> DiskStatus:
        directories = {os.path.dirname(path) for path in self._files}
        free = min((os.statvfs(d).f_bavail * os.statvfs(d).f_frsize for d in directories), default=0)
        return DiskStatus(
            self._name,
            os.getpid(),
            len(self._files),
            self._reads,
            self._bytes_read,
            self._errors,
            free,
            self._rate,
            self._utilization,
        )
