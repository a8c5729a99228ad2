"""Measuring what this node can do: disks beside compute, linear layers, memory, the bus, the steps around them."""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from statistics import median

import torch
from torch import nn

from raytier.codecs import planes
from raytier.execution import cpu_kernels, linears
from raytier.execution.step_rates import measure_steps
from raytier.execution.threads import num_threads
from raytier.execution.timing import calls_per_second, typical_seconds, wait
from raytier.hardware.codec_rates import measure_decoding
from raytier.hardware.disk_rates import DiskReaders, probe_files
from raytier.hardware.inventory import nearest_existing
from raytier.hardware.load import LoadMeter
from raytier.hardware.rates import BUSY_CORES, Overlap, Progress, RateKey, Rates, load_rates, store_rates

logger = logging.getLogger(__name__)

ROWS = (1, 8, 32, 64, 512)
#: Weights of the measurement: shaped like those of a mid-sized layer, together larger than any last-level cache.
_SHAPE = (2048, 4096)
_TOTAL_BYTES = 256 * 2**20
_COPY_BYTES = 64 * 2**20
_READ_SECONDS = 0.5
_ROUNDS = 4  # slices of that time, to compare reading alone and beside compute under the same conditions
_WRITE_SECONDS = 0.1  # of the ramdisk's probe, which only needs to be there

Points = tuple[tuple[int, float], ...]


def node_rates(
    path: str,
    *,
    dtype: str,
    threads: int,
    cache_dir: str,
    kind: str = "cpu",
    nvme_paths: Sequence[str] = (),
    ramdisk: str | None = None,
    refresh: bool = False,
    progress: Progress | None = None,
) -> Rates:
    """Rates of this node: from the cache, else measured in a few seconds and cached.

    What was measured while other work used the node is measured again, until it has been alone once; of two disturbed
    measurements the less disturbed one counts.

    Args:
        path: an existing checkpoint file, the larger the better, or a directory; where `nvme_paths` are not given, its
            disk is the one that is read.
        kind: "cpu" or "cuda".
        nvme_paths, ramdisk: directories of these tiers.
        refresh: measure again.

    Raises:
        TierError: `path` cannot be read.
    """
    key = RateKey(path, dtype, kind, threads, tuple(nvme_paths), ramdisk)
    cached = None if refresh else load_rates(cache_dir, key)
    if cached is not None:
        if not cached.busy:
            return cached
        logger.info(
            "rates of this node were measured while other work used %.1f of its cores: measuring again",
            cached.other_cores,
        )
    rates = _measure(key, cache_dir, progress or _no_progress)
    if rates.busy:
        logger.warning(
            "other work used %.1f cores while the rates of this node were measured: predictions will be rough until "
            "they are measured again, at the next start or with `raytier doctor --measure`",
            rates.other_cores,
        )
        if cached is not None and cached.other_cores < rates.other_cores:
            return cached
    store_rates(cache_dir, key, rates)
    logger.info("measured rates: %s", rates)
    return rates


def _no_progress(what: str, done: float) -> None:
    pass


def _measure(key: RateKey, cache_dir: str, progress: Progress) -> Rates:
    cpu = key.kind == "cpu"
    own = key.nvme_paths or ((key.path,) if os.path.isdir(key.path) else ())
    load = LoadMeter()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(num_threads(key.threads))
        if cpu:
            cpu_kernels.use(cache_dir)
        progress("writing to disk", 0.0)
        probes, write = stack.enter_context(probe_files([nearest_existing(place) for place in own or (cache_dir,)]))
        progress("linear layers", 0.1)
        layers = LinearLayers(key.dtype, key.kind)
        matrix = measure_matrix(layers)
        beside = layers if cpu else None
        progress("reading from disk", 0.3)
        read, overlap = measure_reading((probes if own else []) or [key.path], beside)
        rates = Rates(read, matrix, disk_write_bytes_per_s=write, overlap=overlap)
        if key.ramdisk is not None:
            progress("reading from the ramdisk", 0.5)
            copies, _ = stack.enter_context(probe_files([nearest_existing(key.ramdisk)], _WRITE_SECONDS))
            if copies:
                read, overlap = measure_reading(copies, beside)
                rates = replace(rates, ramdisk_read_bytes_per_s=read, ramdisk_overlap=overlap)
        if cpu and layers.can_pack:
            progress("packed linear layers", 0.6)
            layers.pack()
            rates = replace(rates, packed_matrix_bytes_per_s=measure_matrix(layers))
        del layers, beside
        progress("decoding", 0.7)
        planes.use_kernels(cache_dir)
        rates = replace(rates, decode_bytes_per_s=measure_decoding(key.threads or os.cpu_count() or 1))
        progress("copying in memory", 0.75)
        rates = replace(rates, memory_copy_bytes_per_s=measure_copy())
        if not cpu:
            to_device, to_host = measure_bus(key.kind)
            rates = replace(rates, host_to_device_bytes_per_s=to_device, device_to_host_bytes_per_s=to_host)
        progress("attention and the calls of a step", 0.8)
        steps = measure_steps(
            key.dtype,
            key.threads,
            rates,
            device=key.kind,
            disturbed=load.other_cores >= BUSY_CORES,
        )
    progress("done", 1.0)
    return replace(rates, **asdict(steps), other_cores=round(load.other_cores, 3))


class LinearLayers:
    """Linear layers to measure with: their weights rotate through more memory than the caches hold, as they do in a
    sweep over the layers of a model.

    Args:
        dtype: torch's name of the dtype, for instance "bfloat16".

    Attributes:
        nbytes: of one weight, in that dtype.
    """

    def __init__(self, dtype: str, device: str = "cpu") -> None:
        self._element = getattr(torch, dtype)
        self._device = device
        self.nbytes = _SHAPE[0] * _SHAPE[1] * self._element.itemsize
        count = max(2, _TOTAL_BYTES // self.nbytes)
        self._modules = [nn.Linear(_SHAPE[1], _SHAPE[0], bias=False, device="meta") for _ in range(count)]
        for module in self._modules:
            weight = torch.full(_SHAPE, 0.01, dtype=self._element, device=device)
            module.weight = nn.Parameter(weight, requires_grad=False)
            linears.adopt(module)
        self._rotation = itertools.cycle(self._modules)

    @property
    def can_pack(self) -> bool:
        return linears.can_pack(self._modules[0], self._element)

    def pack(self) -> None:
        """Bring every weight into the layout of the CPU's kernels, in place of the plain one."""
        for module in self._modules:
            packed = linears.pack(module.weight)
            module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)
            linears.bind(module, packed)

    def caller(self, rows: int) -> Callable[[], None]:
        """A function that applies the next layer to `rows` activations, and waits for the result."""
        activations = torch.full((rows, _SHAPE[1]), 0.01, dtype=self._element, device=self._device)

        def call() -> None:
            next(self._rotation)(activations)
            wait(self._device)

        return call


def measure_matrix(layers: LinearLayers, rows: Sequence[int] = ROWS, seconds: float = 0.4) -> Points:
    """(rows, weight bytes per second) of a linear layer for each of `rows` activations, in about `seconds` in all."""
    return tuple((n, layers.nbytes / typical_seconds(layers.caller(n), seconds / len(rows))) for n in rows)


def measure_reading(
    files: Sequence[str], layers: LinearLayers | None, seconds: float | None = None
) -> tuple[float, Overlap]:
    """Bytes per second of reading `files`, and what is left of reading and of computing when both go on.

    Args:
        layers: to compute with beside, at one row, so that their weights keep the memory busy; None: no overlap.
    """
    seconds = _READ_SECONDS if seconds is None else seconds
    if layers is None:
        with DiskReaders(files) as readers:
            readers.wait_for_first()
            return readers.rate_over(seconds), Overlap()
    call, slice_ = layers.caller(1), seconds / _ROUNDS
    alone = max(calls_per_second(call, slice_ / 2) for _ in range(_ROUNDS))
    reads, both, reads_beside = [], [], []
    with DiskReaders(files) as readers:
        readers.wait_for_first()
        for _ in range(_ROUNDS):
            reads.append(readers.rate_over(slice_))
            before, began = readers.read_so_far(), time.perf_counter()
            both.append(calls_per_second(call, slice_))
            reads_beside.append((readers.read_so_far() - before) / (time.perf_counter() - began))
    # Other work only ever makes something slower: the best slices are compared.
    return median(reads), Overlap(_share(max(reads_beside) / max(reads)), _share(max(both) / alone))


def _share(value: float) -> float:
    return min(1.0, max(0.05, value))


def measure_copy(seconds: float = 0.1) -> float:
    """Bytes per second of copying host memory with all threads."""
    source = torch.ones(_COPY_BYTES, dtype=torch.uint8)
    target = torch.ones_like(source)
    return source.nbytes / typical_seconds(lambda: target.copy_(source), seconds)


def measure_bus(device: str = "cuda", seconds: float = 0.2) -> tuple[float, float]:
    """Bytes per second of copies between pinned host memory and the GPU: there, and back."""
    host = torch.zeros(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty_like(host, device=device)

    def rate(target: torch.Tensor, source: torch.Tensor) -> float:
        def call() -> None:
            target.copy_(source, non_blocking=True)
            wait(device)

        return host.nbytes / typical_seconds(call, seconds / 2)

    return rate(there, host), rate(host, there)
