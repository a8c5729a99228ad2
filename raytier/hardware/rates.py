"""How fast this node is: its disks, its memory, its bus, its linear layers and attention. No torch.

Measured once per node, set of disks and dtype in a few seconds and cached (spec A2): the disks by `disk_rates`, what
needs torch by `raytier.execution.rates`.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import socket
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from raytier.errors import ConfigurationError
from raytier.hardware.inventory import nearest_existing, validate

logger = logging.getLogger(__name__)

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Points = Annotated[tuple[tuple[Annotated[int, Field(ge=1)], Rate], ...], Field(min_length=1)]
#: Called with what is measured next and the share of the measuring that is done (0..1).
Progress = Callable[[str, float], None]

_CACHE_VERSION = 4
#: Cores that other work used while rates were measured, from which on they are not trusted.
BUSY_CORES = 0.15
#: Packed weights are used where they are faster by this much over all row counts.
_PACKED_GAIN = 1.03


@dataclass(frozen=True, slots=True)
class Overlap:
    """What is left of two rates when reading and computing go on at the same time; 1 and 1: neither slows the other.

    Attributes:
        reading: share of the read rate while every compute thread works.
        computing: share of the matrix rate while files are read as fast as they can be.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    reading: Share = 1.0
    computing: Share = 1.0


@dataclass(frozen=True, slots=True)
class Rates:
    """Rates in bytes per second, durations in seconds.

    Attributes:
        disk_read_bytes_per_s, disk_write_bytes_per_s: O_DIRECT in large requests, several in flight, over all
            directories of the disk tier together. None: not measured.
        matrix_bytes_per_s: (rows, rate) by rising rows: bytes of weights (in the compute dtype) that a linear
            layer consumes per second when it is applied to `rows` activations. Weights as they lie in a file.
        packed_matrix_bytes_per_s: the same with weights in the layout of the CPU's matrix kernels; None where that
            does not exist.
        host_to_device_bytes_per_s, device_to_host_bytes_per_s: copies over the bus of a GPU; None where there is none.
        ramdisk_read_bytes_per_s: reads from the ramdisk's directory into memory of the process.
        memory_copy_bytes_per_s: host memory to host memory, all threads; None: not measured.
        attention_bytes_per_s: keys and values that attention of decode steps reads; None: not counted.
        logits_per_s: numbers of the output head that sampling goes through; None: not counted.
        layer_seconds: what a decoder layer costs beside its weights and KV: dispatch, norms, rotary embedding.
        step_seconds: what a step costs beside its layers: inputs, embedding, the final norm.
        layer_sequence_seconds, step_sequence_seconds: what every further sequence adds to each.
        prompt_bytes_per_s: activations of prompt tokens (`planner.sizing.token_bytes`) that a layer goes through beside
            its linear layers and attention; None: not counted.
        prompt_flops: arithmetic operations per second of attention between the tokens of prompts; None: not counted.
        matrix_seconds, packed_matrix_seconds: what a linear layer costs beside its bytes: waking all threads.
        overlap, ramdisk_overlap: reading beside computing, on disk and on the ramdisk.
        decode_bytes_per_s: bytes into which all cores together decode bf16 weights in byte planes; None: not measured.
        other_cores: cores that other work used on average while this was measured.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    disk_read_bytes_per_s: Rate
    matrix_bytes_per_s: Points
    host_to_device_bytes_per_s: Rate | None = None
    source: Literal["measured", "assumed"] = "measured"
    packed_matrix_bytes_per_s: Points | None = None
    disk_write_bytes_per_s: Rate | None = None
    ramdisk_read_bytes_per_s: Rate | None = None
    memory_copy_bytes_per_s: Rate | None = None
    device_to_host_bytes_per_s: Rate | None = None
    attention_bytes_per_s: Rate | None = None
    logits_per_s: Rate | None = None
    layer_seconds: Seconds = 0.0
    layer_sequence_seconds: Seconds = 0.0
    step_seconds: Seconds = 0.0
    step_sequence_seconds: Seconds = 0.0
    prompt_bytes_per_s: Rate | None = None
    prompt_flops: Rate | None = None
    matrix_seconds: Seconds = 0.0
    packed_matrix_seconds: Seconds = 0.0
    overlap: Overlap = Overlap()
    ramdisk_overlap: Overlap = Overlap()
    decode_bytes_per_s: Rate | None = None
    other_cores: Seconds = 0.0

    def __post_init__(self) -> None:
        for name, points in (("", self.matrix_bytes_per_s), ("packed_", self.packed_matrix_bytes_per_s)):
            rows = [r for r, _ in points] if points is not None else [1]
            if not rows or rows != sorted(set(rows)):
                raise ValueError(f"{name}matrix_bytes_per_s: rows must rise, got {rows}")

    def matrix_rate(self, rows: int, *, packed: bool = False) -> float:
        """Weight bytes per second at `rows` activations: log-log interpolation between the measured points,
        the first rate below them; above them work grows with the rows, so the rate falls as 1 / rows."""
        points = self.packed_matrix_bytes_per_s if packed else None
        points = points or self.matrix_bytes_per_s
        if rows <= points[0][0]:
            return points[0][1]
        for (r0, rate0), (r1, rate1) in itertools.pairwise(points):
            if rows <= r1:
                share = math.log(rows / r0) / math.log(r1 / r0)
                return math.exp(math.log(rate0) * (1 - share) + math.log(rate1) * share)
        return points[-1][1] * points[-1][0] / rows

    def linear_seconds(self, nbytes: int, saved: int, rows: int, *, packed: bool = False) -> float:
        """Seconds of linear layers whose weights have `nbytes`, which is `saved` fewer than in the compute dtype.

        At one row they take what reading the weights from memory takes, so that fewer bytes are so much faster. What
        more rows take beyond that is arithmetic, of which a smaller form has as much.
        """
        at_rows = nbytes / self.matrix_rate(rows, packed=packed)
        if not saved:
            return at_rows
        one = self.matrix_rate(1, packed=packed)
        arithmetic = (nbytes + saved) * (1 / self.matrix_rate(rows, packed=packed) - 1 / one)
        return max(at_rows, nbytes / one + arithmetic)

    def with_slower_reads(self, factor: float) -> Rates:
        """The same with files read at `factor` of the rates."""
        ramdisk = self.ramdisk_read_bytes_per_s
        return replace(
            self,
            disk_read_bytes_per_s=factor * self.disk_read_bytes_per_s,
            ramdisk_read_bytes_per_s=None if ramdisk is None else factor * ramdisk,
        )

    @property
    def packed_pays(self) -> bool:
        """Whether resident linear layers are faster packed, over all measured row counts (geometric mean)."""
        if self.packed_matrix_bytes_per_s is None:
            return False
        rows = [r for r, _ in self.matrix_bytes_per_s]
        gains = [math.log(self.matrix_rate(r, packed=True) / self.matrix_rate(r)) for r in rows]
        return math.exp(sum(gains) / len(gains)) >= _PACKED_GAIN

    @property
    def busy(self) -> bool:
        """Whether other work used so much of the node during the measurement that the rates are too low."""
        return self.other_cores >= BUSY_CORES


#: Used for a CPU node where nothing was measured: a plain SATA/NVMe mix and two memory channels.
DEFAULT_RATES = Rates(
    1e9,
    ((1, 10e9), (8, 8e9), (64, 5e9), (512, 1e9)),
    None,
    "assumed",
    ramdisk_read_bytes_per_s=5e9,
    attention_bytes_per_s=5e9,
    logits_per_s=5e8,
    layer_seconds=3e-4,
    layer_sequence_seconds=2e-5,
    step_seconds=1e-3,
    step_sequence_seconds=2e-5,
    prompt_bytes_per_s=1e9,
    prompt_flops=1e11,
    # tmpfs is copied by the CPU: what reads does not compute.
    ramdisk_overlap=Overlap(0.5, 0.5),
)
#: The same for a small desktop GPU on PCIe 3.0 x16.
DEFAULT_CUDA_RATES = Rates(
    1e9,
    ((1, 300e9), (8, 300e9), (64, 250e9), (512, 50e9)),
    10e9,
    "assumed",
    ramdisk_read_bytes_per_s=5e9,
    attention_bytes_per_s=100e9,
    logits_per_s=5e9,
    layer_seconds=3e-4,
    layer_sequence_seconds=2e-5,
    step_seconds=1e-3,
    step_sequence_seconds=2e-5,
    prompt_bytes_per_s=100e9,
    prompt_flops=1e13,
)


def default_rates(kind: str) -> Rates:
    """Conservative rates for `kind` ("cpu" or "cuda") when nothing was measured."""
    return DEFAULT_CUDA_RATES if kind == "cuda" else DEFAULT_RATES


@dataclass(frozen=True, slots=True)
class RateKey:
    """What cached rates are valid for: the compute `dtype`, the device `kind` and, on a CPU, the number of threads,
    and the disks that are read.

    Attributes:
        path: a checkpoint file; its disk is read where the disk tier has no directories of its own.
        nvme_paths: directories of the disk tier (`tiers.nvme.paths`).
        ramdisk: directory of the ramdisk, or None.
    """

    path: str
    dtype: str
    kind: str = "cpu"
    threads: int = 0
    nvme_paths: tuple[str, ...] = ()
    ramdisk: str | None = None

    def __str__(self) -> str:
        device = f"{self.kind}x{self.threads}" if self.kind == "cpu" else self.kind
        disks = "+".join(str(_device(path)) for path in self.nvme_paths or (self.path,))
        ramdisk = f"/ramdisk {_device(self.ramdisk)}" if self.ramdisk is not None else ""
        return f"{socket.gethostname()}/{disks}/{self.dtype}/{device}{ramdisk}"


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
    """Put `rates` into the cache of `cache_dir`, atomically. A cache that cannot be written is logged, not an error."""
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


def _device(path: str) -> int:
    return os.stat(nearest_existing(path)).st_dev


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
