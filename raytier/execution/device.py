"""The device that a compute process uses."""

from __future__ import annotations

import torch

from raytier.codecs import scheme
from raytier.errors import ResourceNotAvailableError
from raytier.execution import cpu_kernels
from raytier.execution.sources import keep_checksums


def use_device(kind: str, threads: int, cache_dir: str) -> str:
    """Prepare this process to compute with `kind` ("cpu" or "cuda") and `threads` CPU threads; torch's device name.

    Ray sets OMP_NUM_THREADS to 1 in an actor with a fractional CPU, so the number is always set here.

    Args:
        cache_dir: where compiled kernels, and checksums of checkpoints, are kept.

    Raises:
        ResourceNotAvailableError: torch sees no CUDA device.
    """
    torch.set_num_threads(threads)
    scheme.use_kernels(cache_dir)
    keep_checksums(cache_dir)
    if kind == "cpu":
        cpu_kernels.use(cache_dir)
        return "cpu"
    if not torch.cuda.is_available():
        raise ResourceNotAvailableError(
            "compute.device is cuda, but torch sees no CUDA device in the compute process: "
            "install a CUDA build of torch, or set compute.device to cpu"
        )
    return "cuda:0"
