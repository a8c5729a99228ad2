"""Where the bytes of every parameter can be read: in the checkpoint's own files, or from a copy in files of a tier."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from raytier.checkpoint.manifest import Extent, ModelManifest, Parameter, SourceFile, Stored
from raytier.execution.reader import ReaderPool
from raytier.planner.plan import Tier
from raytier.tiers.checks import SourceChecks
from raytier.tiers.copies import TierCopy
from raytier.tiers.files import DirectFile
from raytier.tiers.mending import mend

#: Where checksums of checkpoints are kept.
_cache_dir: str | None = None


def keep_checksums(cache_dir: str) -> None:
    """Know the next time what files of a checkpoint held when this process read them first."""
    global _cache_dir
    _cache_dir = cache_dir


class Sources:
    """The open files behind a model, and the manifest that says what lies where in them now.

    Invariant: every extent of `manifest` is in a file that is open in the pool under the extent's number; files of
    the checkpoint stay open for good, those of copies as long as a parameter is read from them.

    Args:
        manifest: as described; its files are opened.

    Raises:
        CheckpointError, TierError: a file cannot be opened; nothing is left open.
    """

    def __init__(self, manifest: ModelManifest, io_threads: int, io_bytes: int) -> None:
        self.checkpoint = manifest
        self.manifest = manifest
        opened: list[DirectFile] = []
        try:
            for file in manifest.files:
                opened.append(DirectFile(file.path, file.size))
            self._checks = SourceChecks(manifest.files, _cache_dir)
            self.pool = ReaderPool(opened, io_threads, io_bytes, self._checks, self._mend)
        except BaseException:
            for one in opened:
                one.close()
            raise
        self._numbers: dict[str, int] = {}  # path -> number, of the files of copies

    def relocated(self, copies: Mapping[str, TierCopy | None], tier: Tier) -> ModelManifest:
        """The manifest with these parameters read from their copies on `tier` (None: from the checkpoint).

        Opens what is not open yet. Nothing changes until `adopt`, which is due also when the new manifest is not used.
        """
        files = list(self.manifest.files)
        stored: dict[str, Stored | None] = {}
        for name, copy in copies.items():
            if copy is None:
                stored[name] = None
                continue
            numbers = [self._open(file, tier) for file in copy.files]
            for number, file in zip(numbers, copy.files, strict=True):
                files.extend([file] * (number + 1 - len(files)))
                files[number] = file
            extents = tuple(Extent(numbers[e.file], e.offset, e.nbytes) for e in copy.stored.extents)
            stored[name] = replace(copy.stored, extents=extents)
        parameters = tuple(
            replace(p, stored=stored[p.name]) if p.name in stored else p for p in self.manifest.parameters
        )
        return replace(self.manifest, files=tuple(files), parameters=parameters)

    def exact(self, name: str) -> Parameter:
        """The parameter with the bytes of the checkpoint, from a copy if that has them: what was rounded for a tier is
        never taken for the source."""
        parameter = self.manifest.by_name[name]
        if parameter.stored is not None and parameter.stored.form is not None:
            return self.checkpoint.by_name[name]
        return parameter

    def by_rows(self, name: str) -> Parameter:
        """The parameter where single rows of it can be read: what is coded is so in the checkpoint only."""
        parameter = self.manifest.by_name[name]
        stored = parameter.stored
        if stored is not None and (stored.form is not None or stored.codec.name != "none"):
            return self.checkpoint.by_name[name]
        return parameter

    def _open(self, file: SourceFile, tier: Tier) -> int:
        number = self._numbers.get(file.path)
        if number is None:
            number = self._numbers[file.path] = self.pool.add_file(DirectFile(file.path, file.size), tier)
        return number

    def adopt(self, manifest: ModelManifest) -> None:
        """Read by `manifest` from now on, and close what it does not use; no read of that may be under way."""
        self.manifest = manifest
        used = {e.file for p in manifest.parameters if p.stored is not None for e in p.stored.extents}
        for path, number in list(self._numbers.items()):
            if number not in used:
                del self._numbers[path]
                self.pool.drop_file(number).close()

    def _mend(self, name: str) -> None:
        parameter = self.manifest.by_name[name]
        if parameter.stored is not None:  # else it has been moved away meanwhile
            mend(parameter, self.manifest.files, self._checks)

    def close(self) -> None:
        """End the readers and close all files."""
        self.pool.close()
        self._checks.save()
        for file in self.pool.files:
            file.close()
