"""What is not stored as in the checkpoint: parameters in another form or coded, made once and used again (spec D2).

Each model has a manifest, `<key>.json` in the first directory, that says what was made of which parameter: scheme,
dtype, shape, sizes and checksums of all frames, and where they lie. It is written anew, under another name first, after
every few parameters: what an interrupted conversion has made is not made again. It holds for the checkpoint's files as
they were: of another size, time of change or header, everything is made anew.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from typing import Any

from raytier.checkpoint.manifest import Extent, Parameter, SourceFile, Stored
from raytier.codecs.codec import Frames, checksum
from raytier.codecs.scheme import Scheme
from raytier.errors import TierError
from raytier.tiers.checks import SourceStamp
from raytier.tiers.copies import TierCopy
from raytier.tiers.copying import Opener
from raytier.tiers.owners import KeptDirectory
from raytier.tiers.tier_files import Progress, TierFiles
from raytier.tiers.usage import TierUsage

logger = logging.getLogger(__name__)

_VERSION = 1
#: Source bytes of parameters that are converted before the manifest is written again.
_BATCH_BYTES = 256 << 20
_FILE_NAME = re.compile(r"[0-9a-f]{40}")


class TierStore:
    """Converted parameters of all models, in `directories` that outlive this process.

    Any thread may call anything; several processes may use the same directories. Conversions wait for each other.

    Args: as of `TierFiles`.

    Raises:
        ConfigurationError: a directory cannot be written to.
    """

    def __init__(
        self,
        directories: Sequence[str],
        stripe_bytes: int,
        capacity_bytes: int | None = None,
        min_free_bytes: int = 0,
        *,
        advice: str = "remove something",
        others: Callable[[], int] = int,
        cache_dir: str | None = None,
        opener: Opener = os.open,
    ) -> None:
        for directory in directories:
            os.makedirs(directory, exist_ok=True)
        self._files = TierFiles(
            directories,
            stripe_bytes,
            capacity_bytes,
            min_free_bytes,
            advice=advice,
            kept=True,
            others=others,
            cache_dir=cache_dir,
            opener=opener,
        )
        self._locks = [KeptDirectory(os.path.realpath(directory)) for directory in directories]

    def obtain(
        self,
        model_dir: str,
        sources: Sequence[SourceFile],
        parameters: Sequence[Parameter],
        schemes: Mapping[str, Scheme],
        progress: Progress | None = None,
    ) -> dict[str, TierCopy]:
        """The parameters in their schemes, by name: those that are there, the others made now.

        Raises: as `TierFiles.store`. What has been made by then stays, and is used the next time.
        """
        with ExitStack() as stack:
            for directory in self._locks:
                stack.enter_context(directory.locked())
                directory.remove_unfinished()
            book = _Book.read(self._files.paths[0], model_dir, sources)
            found: dict[str, TierCopy] = {}
            missing: list[Parameter] = []
            for parameter in parameters:
                scheme = schemes[parameter.name]
                copy = book.copy_of(parameter, scheme, self._files.paths)
                if copy is None:
                    missing.append(parameter)
                else:
                    found[parameter.name] = copy
                    self._files.register(_owner(book.key, scheme), parameter.name, copy)
            total = sum(parameter.nbytes for parameter in missing)
            done = 0
            for batch in _batches(missing, schemes):
                scheme, nbytes = schemes[batch[0].name], sum(parameter.nbytes for parameter in batch)

                def show(written: int, most: int, done: int = done, nbytes: int = nbytes) -> None:
                    if progress is not None:
                        progress(done + nbytes * written // max(1, most), total)

                owner = _owner(book.key, scheme)
                names = [parameter.name for parameter in batch]
                self._files.remove(owner, names)  # what was registered and is not as it should be
                copies = self._files.store(owner, sources, batch, show, dict.fromkeys(names, scheme))
                for parameter in batch:
                    book.enter(parameter, scheme, copies[parameter.name])
                book.write()
                found |= copies
                done += nbytes
            return {parameter.name: found[parameter.name] for parameter in parameters}

    def usage(self) -> TierUsage:
        """Of what this process has used, and what it has done."""
        return self._files.usage()

    def close(self) -> None:
        """Stop a conversion under way; what is complete stays. May be called again."""
        self._files.close(remove=False)
        for directory in self._locks:
            directory.close()


def _owner(key: str, scheme: Scheme) -> str:
    return f"{key}/{scheme.version}"


def _batches(parameters: Sequence[Parameter], schemes: Mapping[str, Scheme]) -> Iterator[list[Parameter]]:
    """Consecutive parameters of one scheme, up to `_BATCH_BYTES` of them."""
    batch: list[Parameter] = []
    nbytes = 0
    for parameter in parameters:
        full = nbytes + parameter.nbytes > _BATCH_BYTES
        if batch and (full or schemes[parameter.name] != schemes[batch[0].name]):
            yield batch
            batch, nbytes = [], 0
        batch.append(parameter)
        nbytes += parameter.nbytes
    if batch:
        yield batch


@dataclass
class _Book:
    """The manifest of one model in a store."""

    path: str
    key: str
    model_dir: str
    stamps: tuple[SourceStamp, ...]
    entries: dict[str, dict[str, Any]]  # parameter -> scheme -> what `copy_of` reads

    @classmethod
    def read(cls, directory: str, model_dir: str, sources: Sequence[SourceFile]) -> _Book:
        """As it is on disk, if that holds for the checkpoint as it is now, else an empty one."""
        key = f"{checksum(os.path.realpath(model_dir).encode(errors='surrogateescape')):016x}"
        path = os.path.join(directory, f"{key}.json")
        stamps = tuple(SourceStamp.of(file) for file in sources)
        try:
            with open(path) as file:
                content = json.load(file)
            known = tuple(SourceStamp(**stamp) for stamp in content["source"])
            if content["version"] == _VERSION and known == stamps:
                return cls(path, key, model_dir, stamps, dict(content["entries"]))
            logger.info("%s: the checkpoint has changed, its tier files are made anew", model_dir)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is damaged, the tier files of %s are made anew: %r", path, model_dir, error)
        return cls(path, key, model_dir, stamps, {})

    def copy_of(self, parameter: Parameter, scheme: Scheme, directories: Sequence[str]) -> TierCopy | None:
        """What was made of a parameter, if it is all there."""
        entry = self.entries.get(parameter.name, {}).get(scheme.version)
        if entry is None:
            return None
        try:
            if (entry["dtype"], tuple(entry["shape"])) != (parameter.dtype, parameter.shape):
                return None
            files = tuple(SourceFile(str(path), int(size)) for path, size in entry["files"])
            frames = Frames(
                entry["nbytes"],
                entry["step"],
                tuple(entry["sizes"]),
                tuple(int(sum_, 16) for sum_ in entry["xxh3"]),
                tuple(entry["pieces"]),
            )
            extents = tuple(Extent(*map(int, extent)) for extent in entry["extents"])
            form = scheme.form if entry["form"] else None
            stored = Stored(form, scheme.codec, frames, extents, int(entry["piece_rows"]))
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s: entry of %s is damaged: %r", self.path, parameter.name, error)
            return None
        for file in files:
            directory, name = os.path.split(file.path)
            if directory not in directories or not _FILE_NAME.fullmatch(name):
                return None
            try:
                if os.stat(file.path).st_size != file.size:
                    raise FileNotFoundError
            except OSError:
                logger.warning("%s is not as it was written: %s is converted again", file.path, parameter.name)
                return None
        return TierCopy(files, stored)

    def enter(self, parameter: Parameter, scheme: Scheme, copy: TierCopy) -> None:
        frames = copy.stored.frames
        self.entries.setdefault(parameter.name, {})[scheme.version] = {
            "dtype": parameter.dtype,
            "shape": list(parameter.shape),
            "form": copy.stored.form is not None,  # what does not shrink in it has stayed as it was
            "nbytes": frames.nbytes,
            "step": frames.step,
            "sizes": list(frames.sizes),
            "pieces": list(frames.pieces),
            "piece_rows": copy.stored.piece_rows,
            "xxh3": [f"{sum_:016x}" for sum_ in frames.checksums],
            "files": [[file.path, file.size] for file in copy.files],
            "extents": [[e.file, e.offset, e.nbytes] for e in copy.stored.extents],
        }

    def write(self) -> None:
        """Put it on the disk, in one piece.

        Raises:
            TierError: it cannot be written.
        """
        content = {
            "version": _VERSION,
            "model_dir": self.model_dir,
            "source": [asdict(stamp) for stamp in self.stamps],
            "entries": self.entries,
        }
        try:
            with tempfile.NamedTemporaryFile("w", dir=os.path.dirname(self.path), suffix=".new", delete=False) as file:
                try:
                    json.dump(content, file)
                    file.flush()
                    os.fsync(file.fileno())
                    os.replace(file.name, self.path)
                except BaseException:
                    with suppress(OSError):
                        os.unlink(file.name)
                    raise
        except OSError as error:
            raise TierError(f"writing {self.path} failed: {error.strerror} (errno {error.errno})") from error
