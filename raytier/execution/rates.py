"""Measuring what only torch can: how fast linear layers consume weights, and the bus to the GPU."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from statistics import quantiles

import torch
import torch.nn.functional as F

from raytier.hardware.rates import RateKey, Rates, load_rates, measure_disk_read, store_rates

logger = logging.getLogger(__name__)

ROWS = (1, 8, 64, 512)
#: Weights of the measurement: shaped like those of a mid-sized layer, together larger than any last-level cache.
_SHAPE = (2048, 4096)
_TOTAL_BYTES = 256 * 2**20


def measure_matrix(
    dtype: str, threads: int, rows: Sequence[int] = ROWS, seconds: float = 0.4, *, device: str = "cpu"
) -> tuple[tuple[int, float], ...]:
    """(rows, weight bytes per second) of plain `F.linear` for each of `rows` activations.

    Weights rotate through more memory than the caches hold, as they do in a sweep over layers.

    Args:
        dtype: torch's name of the dtype, for instance "bfloat16".
        threads: CPU threads to compute with (restored afterwards).
        seconds: time for all row counts together; at least three calls are made for each.
    """
    element = getattr(torch, dtype)
    count = max(2, _TOTAL_BYTES // (_SHAPE[0] * _SHAPE[1] * element.itemsize))
    rates = []
    with torch.inference_mode(), _num_threads(threads):
        weights = [torch.full(_SHAPE, 0.01, dtype=element, device=device) for _ in range(count)]
        rotation = cycle(weights)
        nbytes = weights[0].nbytes
        for number in rows:
            activations = torch.full((number, _SHAPE[1]), 0.01, dtype=element, device=device)

            def call(x: torch.Tensor = activations) -> None:
                F.linear(x, next(rotation))
                _wait(device)

            rates.append((number, nbytes / _typical_seconds(call, seconds / len(rows))))
    return tuple(rates)


def measure_bus(device: str = "cuda", seconds: float = 0.2) -> float:
    """Bytes per second of copies from pinned host memory to the GPU."""
    source = torch.zeros(64 * 2**20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device=device)

    def call() -> None:
        target.copy_(source, non_blocking=True)
        _wait(device)

    return source.nbytes / _typical_seconds(call, seconds)


def node_rates(
    path: str, *, dtype: str, threads: int, cache_dir: str, kind: str = "cpu", refresh: bool = False
) -> Rates:
    """Rates of this node: from the cache, else measured in about two seconds and cached.

    Args:
        path: an existing checkpoint file, the larger the better; its disk is the one that is measured.
        kind: "cpu" or "cuda".
        refresh: measure again.

    Raises:
        TierError: `path` cannot be read.
    """
    key = RateKey(path, dtype, kind, threads)
    cached = None if refresh else load_rates(cache_dir, key)
    if cached is not None:
        return cached
    rates = Rates(
        disk_read_bytes_per_s=measure_disk_read(path),
        matrix_bytes_per_s=measure_matrix(dtype, threads, device=kind),
        host_to_device_bytes_per_s=measure_bus(kind) if kind == "cuda" else None,
    )
    store_rates(cache_dir, key, rates)
    logger.info("measured rates: %s", rates)
    return rates


def _typical_seconds(call: Callable[[], None], seconds: float) -> float:
    """Lower quartile of the durations of `call` over at least three calls and `seconds`, a warm-up call left out.

    The quartile, because other work on the machine only ever makes a call slower.
    """
    call()
    durations: list[float] = []
    end = time.perf_counter() + seconds
    while len(durations) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        durations.append(time.perf_counter() - start)
    return quantiles(durations, n=4)[0]


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)


@contextmanager
def _num_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
