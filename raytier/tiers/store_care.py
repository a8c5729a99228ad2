"""Looking after a store of converted parameters: what it holds, whether it is sound, and what nobody needs any more."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from raytier.checkpoint.manifest import Extent, SourceFile
from raytier.codecs.codec import CODEC_VERSION, checksum
from raytier.errors import CheckpointError, TierError
from raytier.tiers.checks import SourceStamp
from raytier.tiers.owners import KeptDirectory
from raytier.tiers.striping import slice_extents

#: Called with bytes checked and bytes to be checked.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class StoredEntry:
    """A parameter in one scheme, as the manifest of its model says; `usable`: by this version of raytier."""

    name: str
    scheme: str
    files: tuple[SourceFile, ...]
    extents: tuple[Extent, ...]
    sizes: tuple[int, ...]
    sums: tuple[int, ...]

    @property
    def usable(self) -> bool:
        return self.scheme.endswith(f"/{CODEC_VERSION}")

    @property
    def nbytes(self) -> int:
        return sum(file.size for file in self.files)

    def damage(self, checked: Callable[[int], None]) -> str | None:
        """The first thing that is wrong with its files; None: nothing. `checked` is called with bytes as they are."""
        begin = 0
        with ExitStack() as stack:
            opened: list[int] = []
            for file in self.files:
                try:
                    opened.append(os.open(file.path, os.O_RDONLY | os.O_CLOEXEC))
                    stack.callback(os.close, opened[-1])
                    size = os.fstat(opened[-1]).st_size
                except OSError as error:
                    return f"{file.path}: {error.strerror}"
                if size != file.size:
                    return f"{file.path} has {size} bytes, {file.size} were written"
            for nbytes, expected in zip(self.sizes, self.sums, strict=True):
                data = b""
                for extent in slice_extents(self.extents, begin, begin + nbytes):
                    data += os.pread(opened[extent.file], extent.nbytes, extent.offset)
                if len(data) != nbytes or checksum(data) != expected:
                    extent = next(slice_extents(self.extents, begin, begin + nbytes))
                    return f"{self.files[extent.file].path} is damaged from byte {extent.offset} on"
                begin += nbytes
                checked(nbytes)
            for fd in opened:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return None


@dataclass(frozen=True, slots=True)
class StoredModel:
    """What a store holds of one model; `stale`: why its source does not go with it any more, None: it does."""

    manifest: str
    model_dir: str
    stale: str | None
    entries: tuple[StoredEntry, ...]

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was removed: files, and their bytes."""

    files: int
    nbytes: int


class StoreCare:
    """A store in `directories`, the parents of `raytier-store`; those that are missing count as empty.

    Raises:
        ConfigurationError: a directory cannot be written to.
    """

    def __init__(self, directories: Sequence[str]) -> None:
        existing = [d for d in directories if os.path.isdir(os.path.join(d, "raytier-store"))]
        self._directories = [KeptDirectory(os.path.realpath(directory)) for directory in existing]

    def models(self) -> list[StoredModel]:
        """All models of the store.

        Raises:
            TierError: a manifest cannot be read.
        """
        return [_read(path) for path in self._manifests()]

    def verify(self, progress: Progress | None = None) -> list[tuple[StoredModel, StoredEntry, str]]:
        """Read everything and check it; what is damaged, and how."""
        models = self.models()
        total = sum(sum(entry.sizes) for model in models for entry in model.entries)
        done, found = 0, []

        def checked(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            if progress is not None:
                progress(done, total)

        for model in models:
            for entry in model.entries:
                if (problem := entry.damage(checked)) is not None:
                    found.append((model, entry, problem))
        return found

    def remove(self, entries: Sequence[StoredEntry]) -> Pruned:
        """Remove the files of these; the next start that needs them makes them anew."""
        with self._locked():
            return _unlink([file.path for entry in entries for file in entry.files])

    def prune(self, everything: bool = False) -> Pruned:
        """Remove what no start can use: of models that are gone or have changed, of other versions, and files that no
        manifest names. With `everything`, all there is."""
        with self._locked():
            keep: set[str] = set()
            for model in [] if everything else self.models():
                usable = [entry for entry in model.entries if entry.usable]
                if model.stale is None and usable:
                    keep |= {model.manifest} | {file.path for entry in usable for file in entry.files}
            there = [os.path.join(d.path, name) for d in self._directories for name in d.files()]
            return _unlink([path for path in there if path not in keep])

    def close(self) -> None:
        for directory in self._directories:
            directory.close()

    def _locked(self) -> ExitStack:
        with ExitStack() as stack:
            for directory in self._directories:
                stack.enter_context(directory.locked())
            return stack.pop_all()

    def _manifests(self) -> Iterator[str]:
        for directory in self._directories:
            for name in sorted(directory.files()):
                if name.endswith(".json"):
                    yield os.path.join(directory.path, name)


def _read(path: str) -> StoredModel:
    try:
        with open(path) as file:
            content: dict[str, Any] = json.load(file)
        stamps = [SourceStamp(**stamp) for stamp in content["source"]]
        entries = tuple(
            StoredEntry(
                name,
                scheme,
                tuple(SourceFile(str(where), int(size)) for where, size in entry["files"]),
                tuple(Extent(*map(int, extent)) for extent in entry["extents"]),
                tuple(map(int, entry["sizes"])),
                tuple(int(value, 16) for value in entry["xxh3"]),
            )
            for name, schemes in content["entries"].items()
            for scheme, entry in schemes.items()
        )
        model_dir = str(content["model_dir"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TierError(f"{path} is damaged: {error!r}; `raytier store prune --all` removes the store") from None
    return StoredModel(path, model_dir, _stale(stamps), entries)


def _stale(stamps: Sequence[SourceStamp]) -> str | None:
    for stamp in stamps:
        try:
            now = SourceStamp.of(SourceFile(stamp.path, stamp.size))
        except CheckpointError:
            return f"{stamp.path} is gone"
        if now != stamp:
            return f"{stamp.path} has changed"
    return None


def _unlink(paths: Sequence[str]) -> Pruned:
    files = nbytes = 0
    for path in paths:
        try:
            size = os.lstat(path).st_size
            os.unlink(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise TierError(f"{path} cannot be removed: {error.strerror}") from None
        files, nbytes = files + 1, nbytes + size
    return Pruned(files, nbytes)
