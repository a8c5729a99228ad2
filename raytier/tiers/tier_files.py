"""Copies of parameters in files of a tier, in one directory or striped over several."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from raytier.checkpoint.manifest import Parameter, SourceFile
from raytier.codecs.scheme import PLAIN, Scheme
from raytier.errors import CheckpointError, ConfigurationError, ResourceNotAvailableError, TierError
from raytier.tiers.aligned import align_up
from raytier.tiers.checks import SourceChecks
from raytier.tiers.copies import TierCopy
from raytier.tiers.copying import CopyJob, Opener, copy_all, expected_nbytes, most_nbytes
from raytier.tiers.owners import KeptDirectory, OwnedDirectory, owner_name, remove_leftovers
from raytier.tiers.striping import file_sizes, stripe_extents
from raytier.tiers.usage import DirectoryUsage, TierUsage

logger = logging.getLogger(__name__)

#: Called with bytes written and bytes to be written, by one thread at a time.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class _Stored:
    """A parameter's copy and the directories (by number) of its files."""

    copy: TierCopy
    directories: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.copy.files)


@dataclass(frozen=True, slots=True)
class _Placed:
    """What is to be written, and the directories (by number) of its files."""

    job: CopyJob
    directories: tuple[int, ...]


class TierFiles:
    """Copies of parameters, one file per parameter and directory.

    Files lie in a directory of this process below each of `directories`, for as long as it lives; those of processes
    that have died are removed when the next one starts. With `kept`, they lie in one for all, and stay. Names on disk
    are hashes: no model or parameter name reaches a path.

    Stores and removals wait for each other; everything else answers at once. Any thread may call anything.

    Invariant: the files of the own directories are those of the registered copies, plus those of the one store that is
    under way.

    Args:
        directories: existing ones, on one or several filesystems.
        stripe_bytes: what is larger is striped over all directories that have room; rounded up to whole blocks.
        capacity_bytes: limit of all files together, None: none.
        min_free_bytes: stays free on every filesystem.
        advice: what the user can do when there is no room.
        owner: name of the own directories; None: this process.
        others: bytes that count towards the capacity as well.
        cache_dir: where it is kept what ranges of checkpoints hold; None: nowhere.
        opener: stand-in for `os.open` of the files that are written (fault injection).

    Raises:
        ConfigurationError: a directory is missing or cannot be written to.
        ResourceNotAvailableError: this process uses one of them already.
    """

    def __init__(
        self,
        directories: Sequence[str],
        stripe_bytes: int,
        capacity_bytes: int | None = None,
        min_free_bytes: int = 0,
        *,
        advice: str = "remove something",
        owner: str | None = None,
        kept: bool = False,
        others: Callable[[], int] = int,
        cache_dir: str | None = None,
        opener: Opener = os.open,
    ) -> None:
        if not directories or stripe_bytes <= 0:
            raise ConfigurationError(f"directories {list(directories)!r} with stripes of {stripe_bytes} bytes")
        self._stripe_bytes = align_up(stripe_bytes)
        self._capacity = capacity_bytes
        self._min_free = min_free_bytes
        self._advice = advice
        self._opener = opener
        self._others = others
        self._cache_dir = cache_dir
        self._stored: dict[str, dict[str, _Stored]] = {}  # model -> parameter -> copy
        self._writes = self._bytes_written = self._source_bytes_read = self._errors = 0
        self._lock = threading.Lock()  # the fields above
        self._storing = threading.Lock()  # the files; taken before `_lock`
        self._closing = threading.Event()
        self._directories: list[OwnedDirectory | KeptDirectory] = []
        try:
            for path in directories:
                if kept:
                    self._directories.append(KeptDirectory(os.path.realpath(path)))
                    continue
                for leftover in remove_leftovers(path):
                    logger.info("removed %s, left by a process that has died", leftover)
                self._directories.append(OwnedDirectory(os.path.realpath(path), owner or owner_name()))
        except BaseException:
            self.close()
            raise

    @property
    def paths(self) -> tuple[str, ...]:
        """The own directories."""
        return tuple(directory.path for directory in self._directories)

    def store(
        self,
        model_id: str,
        sources: Sequence[SourceFile],
        parameters: Sequence[Parameter],
        progress: Progress | None = None,
        schemes: Mapping[str, Scheme] | None = None,
    ) -> dict[str, TierCopy]:
        """Copy `parameters`, whose extents lie in `sources`: all of them, or none.

        Args:
            schemes: how, by name; what is not named bit for bit.

        Raises:
            ResourceNotAvailableError: there is no room; says where, needed, free, and what to do.
            CheckpointError: a source is missing, has changed, or does not hold a parameter.
            DamagedError: a source is not what it was when it was first read.
            TierError: reading or writing failed, one of them has a copy already, or the tier is being closed.
        """
        with self._storing:
            try:
                if self._closing.is_set():
                    raise TierError("the tier has been closed")
                placed = self._place(model_id, parameters, schemes or {})
                stored = self._copy(sources, placed, progress)
            except BaseException:
                with self._lock:
                    self._errors += 1
                raise
            with self._lock:
                self._stored.setdefault(model_id, {}).update(stored)
            return {name: one.copy for name, one in stored.items()}

    def _place(
        self, model_id: str, parameters: Sequence[Parameter], schemes: Mapping[str, Scheme]
    ) -> dict[str, _Placed]:
        """Directories for `parameters`, with room for what they are expected to need; nothing is written."""
        with self._lock:
            held = dict(self._stored.get(model_id, {}))
            usage = self._usage()
        stored_bytes = self._stored_bytes()
        used = [nbytes for _, nbytes in usage]
        devices = [os.stat(directory.path).st_dev for directory in self._directories]
        room: dict[int, int] = {}  # per filesystem
        for directory, device in zip(self._directories, devices, strict=True):
            room[device] = _free_bytes(directory.path) - self._min_free
        placed: dict[str, _Placed] = {}
        for parameter in parameters:
            if parameter.name in held or parameter.name in placed:
                raise TierError(f"{model_id}: {parameter.name} has a copy already; remove it first")
            if parameter.nbytes and not parameter.extents:
                raise CheckpointError(f"{parameter.name} has no bytes: the model directory holds no weights")
            scheme = schemes.get(parameter.name, PLAIN)
            job, chosen = self._spread(model_id, parameter, scheme, used, devices, room)
            for number, size in zip(chosen, _expected(job), strict=True):
                used[number] += size
                room[devices[number]] -= size
            placed[parameter.name] = _Placed(job, chosen)
        needed = sum(sum(_expected(one.job)) for one in placed.values())
        if self._capacity is not None and stored_bytes + needed > self._capacity:
            raise ResourceNotAvailableError(
                f"{model_id}: {needed} bytes are to be copied to {self._names()}, "
                f"{max(0, self._capacity - stored_bytes)} of the tier's {self._capacity} are free; {self._advice}"
            )
        return placed

    def _stored_bytes(self) -> int:
        """What counts towards the capacity."""
        with self._lock:
            own = sum(nbytes for _, nbytes in self._usage())
        return own + self._others()

    def _spread(
        self,
        model_id: str,
        parameter: Parameter,
        scheme: Scheme,
        used: list[int],
        devices: list[int],
        room: dict[int, int],
    ) -> tuple[CopyJob, tuple[int, ...]]:
        """Spread one parameter over the directories that have room for their part, the least filled first."""
        most = most_nbytes(parameter, scheme)
        candidates = sorted(range(len(used)), key=lambda number: (used[number], number))
        short = ""
        while candidates:
            extents = stripe_extents(most, len(candidates), self._stripe_bytes)
            sizes = file_sizes(extents)
            chosen = tuple(candidates[: len(sizes)])
            needed: dict[int, int] = {}
            for number, size in zip(chosen, _shares(parameter, scheme, sizes), strict=True):
                needed[devices[number]] = needed.get(devices[number], 0) + size
            full = [device for device, nbytes in needed.items() if nbytes > room[device]]
            if not full:
                name = hashlib.sha256(repr((model_id, parameter.name)).encode()).hexdigest()[:40]
                paths = tuple(os.path.join(self._directories[number].path, name) for number in chosen)
                return CopyJob(parameter, scheme, paths, self._stripe_bytes, sizes), chosen
            if not short:
                where = next(self._directories[n].parent for n in chosen if devices[n] == full[0])
                short = f"{where}: {needed[full[0]]} bytes are needed, {max(0, room[full[0]])} may be used"
            candidates = [number for number in candidates if devices[number] not in full]
        kept = f" ({self._min_free} of what is free stay free)" if self._min_free else ""
        raise ResourceNotAvailableError(f"no room for {parameter.name} in {short}{kept}; {self._advice}")

    def _copy(
        self, sources: Sequence[SourceFile], placed: Mapping[str, _Placed], progress: Progress | None
    ) -> dict[str, _Stored]:
        """Write the files of `placed`; on an error none of them is left."""
        total = sum(sum(one.job.most) for one in placed.values())
        done = 0
        telling = threading.Lock()  # not `_lock`: who is told may ask back
        copies: dict[str, TierCopy] = {}

        def wrote(written: int, read: int) -> None:
            with self._lock:
                self._writes += written > 0
                self._bytes_written += written
                self._source_bytes_read += read
            if written:
                tell(written)

        def finished(job: CopyJob, copy: TierCopy) -> None:
            copies[job.parameter.name] = copy
            if saved := sum(job.most) - sum(file.size for file in copy.files):
                tell(saved)

        def tell(nbytes: int) -> None:
            nonlocal done
            with telling:
                done += nbytes
                if progress is not None:
                    progress(done, total)

        with ExitStack() as undo:
            undo.callback(self._unlink, [path for one in placed.values() for path in one.job.paths])
            try:
                jobs = [one.job for one in placed.values()]
                checks = SourceChecks(sources, self._cache_dir)
                copy_all(jobs, sources, wrote, finished, self._closing.is_set, self._opener, checks)
                checks.save()
                written = sum(file.size for copy in copies.values() for file in copy.files)
                if self._capacity is not None and self._stored_bytes() + written > self._capacity:
                    raise ResourceNotAvailableError(
                        f"{written} bytes, more than expected, exceed the tier's {self._capacity}; {self._advice}"
                    )
            except OSError as error:
                raise self._no_room(error, total - done) from error
            undo.pop_all()
        return {name: _Stored(copies[name], one.directories[: len(copies[name].files)]) for name, one in placed.items()}

    def _no_room(self, error: OSError, missing: int) -> ResourceNotAvailableError:
        path = next((d.parent for d in self._directories if str(error.filename).startswith(d.path)), self._names())
        free = _free_bytes(path) if os.path.isdir(path) else 0
        return ResourceNotAvailableError(
            f"{path} is full ({error.strerror}): {missing} bytes were still to be written, {free} are free; "
            f"{self._advice}"
        )

    def register(self, model_id: str, name: str, copy: TierCopy) -> None:
        """Take a copy that is there for one that this has stored.

        Raises:
            ValueError: a file is in none of the own directories.
        """
        paths = list(self.paths)
        numbers = tuple(paths.index(os.path.dirname(file.path)) for file in copy.files)
        with self._lock:
            self._stored.setdefault(model_id, {})[name] = _Stored(copy, numbers)

    def remove(self, model_id: str, names: Sequence[str] | None = None) -> int:
        """Remove the copies of these parameters (None: all of the model), which nobody reads any more.

        A name without a copy is passed over. Returns the bytes that were freed.

        Raises:
            TierError: a file could not be removed; what could be is.
        """
        with self._storing:
            with self._lock:
                held = self._stored.get(model_id, {})
                wanted = [(name, held[name]) for name in (list(held) if names is None else names) if name in held]
            freed, left = 0, []
            for name, stored in wanted:
                failed = self._unlink([file.path for file in stored.copy.files])
                if failed:
                    left.append(failed[0])
                    continue
                freed += stored.nbytes
                with self._lock:
                    held.pop(name, None)
                    if not held:
                        self._stored.pop(model_id, None)
            if left:
                raise TierError(f"{model_id}: {len(left)} copies could not be removed: {left[0]}")
            return freed

    def _unlink(self, paths: Sequence[str]) -> list[str]:
        """Remove files that exist; what could not be removed and why."""
        failed = []
        for path in paths:
            try:
                os.unlink(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                logger.warning("cannot remove %s: %s", path, error)
                failed.append(f"{path}: {error.strerror}")
        with self._lock:
            self._errors += len(failed)
        return failed

    def usage(self) -> TierUsage:
        with self._lock:
            usage = self._usage()
            counters = self._writes, self._bytes_written, self._source_bytes_read, self._errors
            models = {model: sum(one.nbytes for one in copies.values()) for model, copies in self._stored.items()}
        directories = tuple(
            DirectoryUsage(directory.parent, files, nbytes, _free_bytes(directory.parent))
            for directory, (files, nbytes) in zip(self._directories, usage, strict=True)
        )
        return TierUsage(
            sum(d.files for d in directories),
            sum(d.nbytes for d in directories),
            self._capacity,
            *counters,
            directories,
            {model: nbytes for model, nbytes in models.items() if nbytes},
        )

    def _usage(self) -> list[tuple[int, int]]:
        """(files, bytes) per directory; called with the lock held."""
        usage = [(0, 0)] * len(self._directories)
        for copies in self._stored.values():
            for stored in copies.values():
                for number, file in zip(stored.directories, stored.copy.files, strict=True):
                    files, nbytes = usage[number]
                    usage[number] = (files + 1, nbytes + file.size)
        return usage

    def _names(self) -> str:
        return ", ".join(directory.parent for directory in self._directories)

    def check_integrity(self) -> None:
        """AssertionError unless the files on disk are those of the registered copies; waits for a store."""
        with self._storing, self._lock:
            known: list[set[str]] = [set() for _ in self._directories]
            for copies in self._stored.values():
                for stored in copies.values():
                    for number, file in zip(stored.directories, stored.copy.files, strict=True):
                        known[number].add(os.path.basename(file.path))
                        assert os.stat(file.path).st_size == file.size
            for directory, names in zip(self._directories, known, strict=True):
                assert directory.files() == names, directory.path

    def close(self, *, remove: bool = True) -> None:
        """Stop a store under way and remove everything (or leave it to the next process). May be called again."""
        self._closing.set()
        with self._storing:
            with self._lock:
                self._stored.clear()
            for directory in self._directories:
                directory.close(remove=remove)

    def __enter__(self) -> TierFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _expected(job: CopyJob) -> list[int]:
    return _shares(job.parameter, job.scheme, job.most)


def _shares(parameter: Parameter, scheme: Scheme, most: Sequence[int]) -> list[int]:
    """Bytes in each file that a parameter is expected to take, given the most."""
    expected = align_up(expected_nbytes(parameter, scheme))
    return [min(size, align_up(expected * size // max(1, sum(most)))) for size in most]


def _free_bytes(path: str) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize
