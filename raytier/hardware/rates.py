"""How fast this node is: bytes per second of its disk, its linear layers, its bus. No torch.

Measured once per node, disk and dtype in about two seconds and cached (spec A2). The matrix rate needs
torch and is measured by `raytier.execution.rates`.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import math
import mmap
import os
import random
import socket
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from raytier.errors import ConfigurationError, TierError
from raytier.hardware.inventory import validate

logger = logging.getLogger(__name__)

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]

_ALIGN = 4096
_REQUEST = 8 * 2**20
_QUEUE_DEPTH = 4
_CACHE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates in bytes per second.

    Attributes:
        disk_read_bytes_per_s: O_DIRECT reads in large requests, several in flight.
        matrix_bytes_per_s: (rows, rate) by rising rows: bytes of weights (in the compute dtype) that a linear
            layer consumes per second when it is applied to `rows` activations.
        host_to_device_bytes_per_s: copies to the GPU; None where there is none.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    disk_read_bytes_per_s: Rate
    matrix_bytes_per_s: Annotated[tuple[tuple[Annotated[int, Field(ge=1)], Rate], ...], Field(min_length=1)]
    host_to_device_bytes_per_s: Rate | None = None
    source: Literal["measured", "assumed"] = "measured"

    def __post_init__(self) -> None:
        rows = [r for r, _ in self.matrix_bytes_per_s]
        if not rows or rows != sorted(set(rows)):
            raise ValueError(f"matrix_bytes_per_s: rows must rise, got {rows}")

    def matrix_rate(self, rows: int) -> float:
        """Weight bytes per second at `rows` activations: log-log interpolation between the measured points,
        the first rate below them; above them work grows with the rows, so the rate falls as 1 / rows."""
        points = self.matrix_bytes_per_s
        if rows <= points[0][0]:
            return points[0][1]
        for (r0, rate0), (r1, rate1) in itertools.pairwise(points):
            if rows <= r1:
                share = math.log(rows / r0) / math.log(r1 / r0)
                return math.exp(math.log(rate0) * (1 - share) + math.log(rate1) * share)
        return points[-1][1] * points[-1][0] / rows


#: Used for a CPU node where nothing was measured: a plain SATA/NVMe mix and two memory channels.
DEFAULT_RATES = Rates(1e9, ((1, 10e9), (8, 8e9), (64, 5e9), (512, 1e9)), None, "assumed")
#: The same for a small desktop GPU on PCIe 3.0 x16.
DEFAULT_CUDA_RATES = Rates(1e9, ((1, 300e9), (8, 300e9), (64, 250e9), (512, 50e9)), 10e9, "assumed")


def default_rates(kind: str) -> Rates:
    """Conservative rates for `kind` ("cpu" or "cuda") when nothing was measured."""
    return DEFAULT_CUDA_RATES if kind == "cuda" else DEFAULT_RATES


def measure_disk_read(path: str, seconds: float = 0.5) -> float:
    """Bytes per second of reading an existing file past the page cache.

    Four threads read 8 MiB requests at random aligned offsets, which is how a layer is fetched. Small files are
    read again and again: with O_DIRECT every read reaches the disk. Pass the largest checkpoint file.

    Raises:
        TierError: the file is missing, empty or unreadable.
    """
    fd = -1
    try:
        size = os.path.getsize(path)
        if size == 0:
            raise TierError(f"{path} is empty: the read rate of its disk cannot be measured from it")
        fd = _open_direct(path)
        length = max(_ALIGN, min(_REQUEST, size // _ALIGN * _ALIGN))
        workers = [_DiskReader(fd, size, length, seed) for seed in range(_QUEUE_DEPTH)]
        start = time.perf_counter()
        for worker in workers:
            worker.deadline = start + min(seconds, 1.0)
            worker.start()
        for worker in workers:
            worker.join()
        failed = next((w.error for w in workers if w.error is not None), None)
        if failed is not None:
            raise failed
        return sum(w.nbytes for w in workers) / (max(w.finished for w in workers) - start)
    except OSError as error:
        raise TierError(f"{path} cannot be read: {error}") from error
    finally:
        if fd >= 0:
            os.close(fd)


class _DiskReader(threading.Thread):
    def __init__(self, fd: int, size: int, length: int, seed: int) -> None:
        super().__init__(name=f"disk-rate-{seed}")
        self.deadline = 0.0
        self.finished = 0.0
        self.nbytes = 0
        self.error: OSError | None = None
        self._fd = fd
        self._length = length
        self._offsets = max(1, (size - length) // _ALIGN + 1)
        self._random = random.Random(seed)
        # As `tiers.aligned.AlignedBuffer`, into which layers are read: anonymous maps are page-aligned, as O_DIRECT
        # demands, and with small pages the same disk was measured at a third of its rate.
        self._buffer = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages
            self._buffer.madvise(mmap.MADV_HUGEPAGE)
        self._buffer.write(bytes(length))  # first touch costs more than the read; keep it out of the time

    def run(self) -> None:
        try:
            while True:
                offset = self._random.randrange(self._offsets) * _ALIGN
                self.nbytes += os.preadv(self._fd, [self._buffer], offset)
                self.finished = time.perf_counter()
                if self.finished >= self.deadline:
                    return
        except OSError as error:
            self.error = error
        finally:
            self._buffer.close()


def _open_direct(path: str) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
    logger.info("%s: O_DIRECT is not supported here, the read rate is measured through the page cache", path)
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return fd


@dataclass(frozen=True, slots=True)
class RateKey:
    """What cached rates are valid for: the disk that holds `path` (an existing file or directory), the compute
    `dtype`, the device `kind` and, on a CPU, the number of threads."""

    path: str
    dtype: str
    kind: str = "cpu"
    threads: int = 0

    def __str__(self) -> str:
        device = f"{self.kind}x{self.threads}" if self.kind == "cpu" else self.kind
        return f"{socket.gethostname()}/{os.stat(self.path).st_dev}/{self.dtype}/{device}"


def load_rates(cache_dir: str, key: RateKey) -> Rates | None:
    """Rates of this host from the cache, or None. A damaged cache counts as empty."""
    entry = _read_cache(cache_dir).get(str(key))
    if entry is None:
        return None
    try:
        return validate(Rates, entry, "rates")
    except ConfigurationError as error:
        logger.warning("%s: entry ignored: %s", _cache_file(cache_dir), error)
        return None


def store_rates(cache_dir: str, key: RateKey, rates: Rates) -> None:
    """Put `rates` into the cache, atomically. A cache that cannot be written is logged, not an error."""
    entries = _read_cache(cache_dir) | {str(key): asdict(rates)}
    try:
        os.makedirs(cache_dir, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache_dir, prefix="rates-", delete=False) as file:
            try:
                json.dump({"version": _CACHE_VERSION, "rates": entries}, file, indent=1)
                file.close()
                os.replace(file.name, _cache_file(cache_dir))
            except OSError:
                os.unlink(file.name)
                raise
    except OSError as error:
        logger.warning("%s: measured rates not cached: %s", cache_dir, error)


def _cache_file(cache_dir: str) -> Path:
    return Path(cache_dir) / "rates.json"


def _read_cache(cache_dir: str) -> dict[str, Any]:
    path = _cache_file(cache_dir)
    try:
        content = json.loads(path.read_text())
        if content["version"] == _CACHE_VERSION and isinstance(content["rates"], dict):
            return dict(content["rates"])
        logger.warning("%s: not of this version, ignored", path)
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("%s: damaged, ignored: %r", path, error)
    return {}
