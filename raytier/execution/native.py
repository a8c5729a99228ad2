"""Kernels in C for the CPU, compiled where they run.

What they compute torch can compute too. Without a compiler, or on another processor, that is what happens, slower.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from enum import IntFlag
from pathlib import Path

from raytier.codecs.native import NativeLibrary, compiler, cpu_flags

logger = logging.getLogger(__name__)

_FLAGS = ("-O3", "-fopenmp", *(f"-m{i}" for i in ("avx512f", "avx512bw", "avx512dq", "avx512vl")))
_FLAGS += ("-mavx512bf16", "-mamx-tile", "-mamx-bf16")
_BF16 = NativeLibrary("bf16", Path(__file__).parent / "kernels", _FLAGS)


class Features(IntFlag):
    """Instructions that the processor has and the system lets this process use."""

    DOT_BF16 = 1
    TILES_BF16 = 2
    FORMS = 4


def why_none() -> str | None:
    """What a user can do to have kernels here; None where they are there, or of no use."""
    if "avx512_bf16" in cpu_flags() and compiler() is None:
        return (
            "there is no C compiler, so torch's own kernels compute in bf16: a decode step takes 1.4 to 1.6x as long; "
            "apt-get install gcc libc6-dev"
        )
    return None


def load_kernels(cache_dir: str) -> tuple[ctypes.CDLL, Features] | None:
    """The compiled kernels, from `cache_dir` or put there; None where there is no use for them or no way to make them.

    Never an exception: why there are none is logged.
    """
    if "avx512_bf16" not in cpu_flags():
        return None
    try:
        library = _BF16.load(cache_dir)
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("no kernels of our own for this processor, torch's are slower for few rows: %s", error)
        return None
    library.raytier_linear_features.restype = ctypes.c_int
    features = Features(library.raytier_linear_features())
    return (library, features) if features else None
