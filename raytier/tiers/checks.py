"""What ranges of checkpoint files hold: checksums that are learned when a range is read for the first time, and kept in
the cache for the next start (spec B5).

Ranges are cut the same whatever is read with them: parts of a parameter (`Parameter.step`) within one of its extents,
or single rows of the embedding. They hold for a file as it is: of another size, time of change or header, they are
learned anew.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from raytier.checkpoint.manifest import Extent, Parameter, SourceFile
from raytier.codecs.codec import checksum
from raytier.errors import CheckpointError

logger = logging.getLogger(__name__)

#: A header of safetensors is no longer than that.
_MOST_HEADER = 100 << 20
#: What has been learned is written no more often than that.
_SAVE_EVERY_S = 10.0

#: (offset, bytes) -> xxh3.
Sums = dict[tuple[int, int], int]


@dataclass(frozen=True, slots=True)
class SourceStamp:
    """A checkpoint file as it was: another one has another stamp. `header`: xxh3 of its safetensors header."""

    path: str
    size: int
    mtime_ns: int
    header: int

    @classmethod
    def of(cls, file: SourceFile) -> SourceStamp:
        """Of a file as it is now; CheckpointError when it cannot be read."""
        try:
            with open(file.path, "rb") as opened:
                status = os.fstat(opened.fileno())
                length = opened.read(8)
                header = length + opened.read(min(int.from_bytes(length, "little"), _MOST_HEADER))
        except OSError as error:
            raise CheckpointError(f"{file.path}: {error.strerror}; restore the file") from None
        return cls(file.path, status.st_size, status.st_mtime_ns, checksum(header))


class SourceChecks:
    """The known ranges of `files`, one `Sums` each, which any thread may read and add to.

    Args:
        cache_dir: where they are kept; None: nowhere.

    Raises:
        CheckpointError: a file cannot be read.
    """

    def __init__(self, files: Sequence[SourceFile], cache_dir: str | None) -> None:
        self._directory = Path(cache_dir) / "checksums" if cache_dir is not None else None
        self._stamps = [SourceStamp.of(file) for file in files] if self._directory is not None else []
        self.sums: list[Sums] = [self._load(stamp) for stamp in self._stamps] or [{} for _ in files]
        self._saved = [len(sums) for sums in self.sums]
        self._saving = threading.Lock()
        self._next = time.monotonic() + _SAVE_EVERY_S

    def save_sometimes(self) -> None:
        """Write what is new, if that has not been done for a while."""
        if time.monotonic() >= self._next:
            self.save()

    def save(self) -> None:
        """Write what is new. A cache that cannot be written to is logged, not an error."""
        if not self._saving.acquire(blocking=False):
            return
        try:
            self._next = time.monotonic() + _SAVE_EVERY_S
            for number, stamp in enumerate(self._stamps):
                sums = self.sums[number]
                known = sums.copy()  # others add to it meanwhile
                if len(known) > self._saved[number]:
                    self._write(stamp, known)
                    self._saved[number] = len(known)
        except OSError as error:
            logger.warning("%s: checksums of the checkpoint are not kept: %s", self._directory, error)
        finally:
            self._saving.release()

    def _path(self, stamp: SourceStamp) -> Path:
        assert self._directory is not None
        name = checksum(os.path.realpath(stamp.path).encode(errors="surrogateescape"))
        return self._directory / f"{name:016x}.npz"

    def _load(self, stamp: SourceStamp) -> Sums:
        path = self._path(stamp)
        try:
            with np.load(path, allow_pickle=False) as content:
                if SourceStamp(**json.loads(str(content["stamp"]))) != stamp:
                    logger.info("%s has changed: its checksums are learned anew", stamp.path)
                    return {}
                table = content["ranges"]
            return {(int(offset), int(nbytes)): int(value) for offset, nbytes, value in table.tolist()}
        except FileNotFoundError:
            pass
        except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            logger.warning("%s is damaged: the checksums of %s are learned anew: %r", path, stamp.path, error)
        return {}

    def _write(self, stamp: SourceStamp, sums: Sums) -> None:
        assert self._directory is not None
        self._directory.mkdir(parents=True, exist_ok=True)
        table = np.array([(*key, value) for key, value in sums.items()], np.uint64)
        with tempfile.NamedTemporaryFile(dir=self._directory, suffix=".new", delete=False) as file:
            try:
                np.savez(file, stamp=np.array(json.dumps(asdict(stamp))), ranges=table)
                file.close()
                os.replace(file.name, self._path(stamp))
            except BaseException:
                with suppress(OSError):
                    os.unlink(file.name)
                raise


def check_ranges(parameter: Parameter, start: int, stop: int, step: int | None = None) -> Iterator[tuple[int, Extent]]:
    """The ranges that are checked of bytes [start, stop) of a parameter in the checkpoint, and where in it they begin.

    Args:
        step: bytes of each, counted from the beginning of an extent; None: as it always is but for single rows.
    """
    step = parameter.step(parameter.nbytes) if step is None else step
    position = 0
    for extent in parameter.extents:
        first, last = max(start, position), min(stop, position + extent.nbytes)
        while first < last:
            border = min(last, position + ((first - position) // step + 1) * step)
            yield first, Extent(extent.file, extent.offset + first - position, border - first)
            first = border
        position += extent.nbytes
