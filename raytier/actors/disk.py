"""DiskTierActor: a node's disk, or its ramdisk, as a tier of files."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from raytier.checkpoint.manifest import ModelManifest
from raytier.codecs.scheme import Scheme, use_kernels
from raytier.config import MIB, NvmeTier, RamdiskTier
from raytier.errors import CheckpointError, ConfigurationError, InvalidRequestError, TierError
from raytier.tiers import owners
from raytier.tiers.copies import TierCopy
from raytier.tiers.ramdisk import DEFAULT_PATH, Ramdisk, remove_dead_mount
from raytier.tiers.store import TierStore
from raytier.tiers.tier_files import TierFiles
from raytier.tiers.usage import DirectoryUsage, TierUsage

GIB = 2**30

#: Utilisation is of the last report, as long as that is no older than this.
_FRESH_S = 5.0

_ADVICE = (
    "free some space, name further directories in tiers.nvme.paths, or change tiers.nvme.max_gb or "
    "tiers.nvme.min_free_gb"
)


@dataclass(frozen=True, slots=True)
class DiskStatus:
    """Health of a tier of files (spec A6). Counters since start, sizes in bytes.

    Attributes:
        tier: "nvme" or "ramdisk".
        in_place: parameters are read from the checkpoint's own files, and nothing is written.
        files: of copies; in place: of the checkpoint.
        stored_bytes: of copies.
        capacity_bytes: of copies that the configuration allows, None: no limit.
        reads, bytes_read: by consumers of this tier.
        writes, bytes_written: of copies.
        source_bytes_read: from the checkpoint in order to make copies.
        errors: files found missing, changed or damaged, copies that failed.
        free_bytes: of the filesystem that has least.
        measured_bytes_per_s: read rate that the planner reckons with.
        utilization: of that rate, while the last steps ran (0..1).
        storing: bytes written and bytes to be written by the store under way, None: there is none.
        models: model -> bytes of its copies.
    """

    name: str
    pid: int
    tier: str
    in_place: bool
    files: int
    stored_bytes: int
    capacity_bytes: int | None
    reads: int
    bytes_read: int
    writes: int
    bytes_written: int
    source_bytes_read: int
    errors: int
    free_bytes: int
    measured_bytes_per_s: float | None
    utilization: float
    storing: tuple[int, int] | None
    directories: tuple[DirectoryUsage, ...]
    models: dict[str, int]


class DiskTierActor:
    """Owns the files of a tier and their health; consumers read the bytes themselves, by path.

    The disk without directories of its own leaves parameters in the checkpoint's files. With `tiers.nvme.paths`, and
    as the ramdisk, it keeps copies.

    What makes and removes copies has the concurrency group "store" and happens in the order of the calls; everything
    else answers meanwhile. `close` removes what this process has made; after a kill `remove_leftovers` does, or the
    next actor with the same directories.
    """

    def __init__(
        self, name: str, tier: NvmeTier | RamdiskTier, store: Sequence[str] = (), cache_dir: str | None = None
    ) -> None:
        """Begin with what the configuration says.

        Args:
            tier: the section that this actor stands for.
            store: directories for what the disk holds in another form or coded.
            cache_dir: where compiled kernels, and what checkpoints hold, are kept; None: nowhere.

        Raises:
            ConfigurationError, ResourceNotAvailableError: a directory or a mount cannot be had; says which and why.
        """
        if cache_dir is not None:
            use_kernels(cache_dir)
        self._name = name
        self._section = tier
        self._tier = "ramdisk" if isinstance(tier, RamdiskTier) else "nvme"
        self._keep = isinstance(tier, RamdiskTier) and not tier.cleanup_on_exit
        self._ramdisk: Ramdisk | None = None
        self._files: TierFiles | None = None
        self._store: TierStore | None = None
        self._cache_dir = cache_dir
        self._in_place: dict[str, int] = {}  # checkpoint file -> size
        self._lock = threading.Lock()  # counters
        self._reads = self._bytes_read = self._errors = 0
        self._storing: tuple[int, int] | None = None
        self._rate: float | None = None
        self._utilization = 0.0
        self._recorded = 0.0
        if isinstance(tier, RamdiskTier):
            self._open_ramdisk(tier)
        else:
            self._open_directories(tier)
            self._open_store(store)
        atexit.register(self.close)

    def _open_ramdisk(self, tier: RamdiskTier) -> None:
        self._ramdisk = Ramdisk(
            tier.path,
            int(tier.size_mb * MIB),
            tier.usable_percent,
            mount=tier.mount,
            cleanup=tier.cleanup_on_exit,
        )
        try:
            self._files = TierFiles(
                [self._ramdisk.path],
                MIB,  # one directory: nothing is striped
                self._ramdisk.usable_bytes,
                advice="move something away, or raise tiers.ramdisk.size_mb",
                cache_dir=self._cache_dir,
            )
        except ConfigurationError as error:
            self._ramdisk.close()
            raise ConfigurationError(f"tiers.ramdisk.path: {error.message}") from None
        except BaseException:
            self._ramdisk.close()
            raise

    def _open_directories(self, tier: NvmeTier) -> None:
        try:
            if tier.paths:
                self._files = TierFiles(
                    tier.paths, *_limits(tier), advice=_ADVICE, others=self._stored_bytes, cache_dir=self._cache_dir
                )
        except ConfigurationError as error:
            raise ConfigurationError(f"tiers.nvme.paths: {error.message}") from None

    @ray.method(concurrency_group="store")
    def open_store(self, directories: Sequence[str]) -> None:
        """Have a place for what the disk holds in another form or coded, which some models may want and others not.

        Raises:
            ConfigurationError, ResourceNotAvailableError: a directory cannot be had; says which and why.
        """
        self._open_store(directories)

    def _open_store(self, directories: Sequence[str]) -> None:
        if not directories or self._store is not None:
            return
        assert isinstance(self._section, NvmeTier)
        try:
            self._store = TierStore(
                directories,
                *_limits(self._section),
                advice=_ADVICE,
                others=self._copied_bytes,
                cache_dir=self._cache_dir,
            )
        except ConfigurationError as error:
            raise ConfigurationError(f"tiers.nvme.paths: {error.message}") from None

    def _stored_bytes(self) -> int:
        return 0 if self._store is None else self._store.usage().nbytes

    def _copied_bytes(self) -> int:
        return 0 if self._files is None else self._files.usage().nbytes

    def __repr__(self) -> str:
        usage = self._usage()
        held = "in place" if usage is None else f"{usage.nbytes / MIB:.0f} MiB of copies"
        return f"DiskTierActor({self._tier}, {held})"

    def calibrate(self, bytes_per_s: float) -> None:
        """The measured read rate of the tier; utilisation is reported against it."""
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
                self._count_error()
                raise CheckpointError(f"{file.path}: {error.strerror}; restore the file") from None
            if size != file.size:
                self._count_error()
                raise CheckpointError(f"{file.path}: {size} bytes on disk, {file.size} when it was described")
        with self._lock:
            self._in_place.update({file.path: file.size for file in manifest.files})
        return len(manifest.files)

    @ray.method(concurrency_group="store")
    def store(
        self,
        model_id: str,
        manifest: ModelManifest,
        names: Sequence[str],
        schemes: Mapping[str, Scheme] | None = None,
    ) -> dict[str, TierCopy]:
        """Have the named parameters of a model in files of this tier, as `schemes` say: all of them, or none.

        Raises:
            ResourceNotAvailableError: there is no room; says where, needed, free, and what to do.
            CheckpointError: the checkpoint is missing, has changed, or does not hold a parameter.
            InvalidRequestError: a name is no parameter of the model.
            TierError: reading or writing failed, one of them has a copy already, or this tier keeps no copies.
        """
        if unknown := [name for name in names if name not in manifest.by_name]:
            raise InvalidRequestError(f"{unknown[0]!r} is no parameter of {model_id}")
        schemes = dict(schemes or {})
        parameters = [manifest.by_name[name] for name in names]
        converted = [p for p in parameters if p.name in schemes] if self._store is not None else []
        copied = [p for p in parameters if p not in converted]
        copies: dict[str, TierCopy] = {}
        try:
            if converted:
                assert self._store is not None
                copies |= self._store.obtain(manifest.model_dir, manifest.files, converted, schemes, self._show)
            if copied:
                copies |= self._own_files().store(model_id, manifest.files, copied, self._show, schemes)
        finally:
            self._storing = None
        return copies

    @ray.method(concurrency_group="store")
    def remove(self, model_id: str, names: Sequence[str] | None = None) -> int:
        """Remove the copies of these parameters (None: all of the model), which nobody reads any more.

        A name without a copy is passed over, as is what is kept for the next time. Returns the bytes that were freed.

        Raises:
            TierError: a file could not be removed.
        """
        return 0 if self._files is None else self._files.remove(model_id, names)

    def _usage(self) -> TierUsage | None:
        """Of copies and of what is kept together; None where neither is made."""
        usages = [owner.usage() for owner in (self._files, self._store) if owner is not None]
        return usages[0] + usages[1] if len(usages) == 2 else usages[0] if usages else None

    def _show(self, written: int, total: int) -> None:
        self._storing = written, total

    def _own_files(self) -> TierFiles:
        if self._files is None:
            raise TierError("this tier reads the checkpoint in place: set tiers.nvme.paths for it to keep copies")
        return self._files

    def record(self, reads: int, bytes_read: int, seconds: float, damaged: int = 0) -> None:
        """Add what a consumer read in the last `seconds`, and how often that was not as it should be."""
        with self._lock:
            self._reads += reads
            self._bytes_read += bytes_read
            self._errors += damaged
            if self._rate and seconds > 0:
                self._utilization = min(1.0, bytes_read / seconds / self._rate)
            self._recorded = time.monotonic()

    def ping(self) -> str:
        return self._name

    def status(self) -> DiskStatus:
        usage = self._usage()
        with self._lock:
            in_place = dict(self._in_place)
            reads, bytes_read, errors = self._reads, self._bytes_read, self._errors
            fresh = time.monotonic() - self._recorded < _FRESH_S
            utilization = self._utilization if fresh else 0.0
        directories = _directories(in_place) if usage is None else usage.directories
        return DiskStatus(
            name=self._name,
            pid=os.getpid(),
            tier=self._tier,
            in_place=usage is None,
            files=len(in_place) if usage is None else usage.files,
            stored_bytes=0 if usage is None else usage.nbytes,
            capacity_bytes=None if usage is None else usage.capacity,
            reads=reads,
            bytes_read=bytes_read,
            writes=0 if usage is None else usage.writes,
            bytes_written=0 if usage is None else usage.bytes_written,
            source_bytes_read=0 if usage is None else usage.source_bytes_read,
            errors=errors + (0 if usage is None else usage.errors),
            free_bytes=min((directory.free_bytes for directory in directories), default=0),
            measured_bytes_per_s=self._rate,
            utilization=utilization,
            storing=self._storing,
            directories=directories,
            models={} if usage is None else usage.models,
        )

    def close(self) -> None:
        """Stop what is being copied and remove everything that this process has made; a second call does nothing.

        A ramdisk without `cleanup_on_exit` leaves its files, until the next actor starts there.
        """
        atexit.unregister(self.close)
        if self._files is not None:
            self._files.close(remove=not self._keep)
        if self._store is not None:
            self._store.close()
        if self._ramdisk is not None:
            self._ramdisk.close()

    def _count_error(self) -> None:
        with self._lock:
            self._errors += 1


def remote_disk_actor() -> Any:
    """The actor class as Ray wants it: one thread that makes and removes copies, one for everything else."""
    return ray.remote(concurrency_groups={"store": 1})(DiskTierActor)  # type: ignore[call-overload]


def remove_leftovers(tier: NvmeTier | RamdiskTier, pids: Collection[int] = (), timeout_s: float = 5.0) -> list[str]:
    """Remove the files, and the mount, that dead actors of this tier have left; returns what was removed.

    For whoever has killed one: call it with the processes whose end is to be awaited, up to `timeout_s` seconds.
    What belongs to a process that lives stays.
    """
    deadline = time.monotonic() + timeout_s
    while any(_lives(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    if not isinstance(tier, RamdiskTier):
        return [path for parent in tier.paths for path in owners.remove_leftovers(parent)]
    if not tier.cleanup_on_exit:
        return []
    path = tier.path or DEFAULT_PATH
    if tier.mount and remove_dead_mount(path):
        return [path]
    return owners.remove_leftovers(path) if os.path.isdir(path) else []


def _limits(tier: NvmeTier) -> tuple[int, int | None, int]:
    """Bytes of a stripe, of all there may be, and of what stays free."""
    return (
        int(tier.stripe_mb * MIB),
        None if tier.max_gb is None else int(tier.max_gb * GIB),
        int(tier.min_free_gb * GIB),
    )


def _lives(pid: int) -> bool:
    try:
        owners.owner_name(pid)
    except ProcessLookupError:
        return False
    return True


def _directories(files: dict[str, int]) -> tuple[DirectoryUsage, ...]:
    """Where checkpoint files lie."""
    found: dict[str, tuple[int, int]] = {}
    for path, size in files.items():
        count, nbytes = found.get(os.path.dirname(path), (0, 0))
        found[os.path.dirname(path)] = (count + 1, nbytes + size)
    usage = []
    for path, (count, nbytes) in found.items():
        try:
            status = os.statvfs(path)
        except OSError:  # it has been taken away; health is told all the same
            free = 0
        else:
            free = status.f_bavail * status.f_frsize
        usage.append(DirectoryUsage(path, count, nbytes, free))
    return tuple(usage)
