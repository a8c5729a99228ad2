"""Kernels in C for the CPU, compiled where they run: for its instructions, in a second, once per machine.

What they compute torch can compute too. Without a compiler, or on another processor, that is what happens, slower.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from enum import IntFlag
from pathlib import Path

logger = logging.getLogger(__name__)

_DIRECTORY = Path(__file__).parent / "kernels"
_FLAGS = ("-O3", "-fopenmp", "-shared", "-fPIC", *(f"-m{i}" for i in ("avx512f", "avx512bw", "avx512dq", "avx512vl")))
_FLAGS += ("-mavx512bf16", "-mamx-tile", "-mamx-bf16")
_TIMEOUT_S = 60.0


class Features(IntFlag):
    """Instructions that the processor has and the system lets this process use."""

    DOT_BF16 = 1
    TILES_BF16 = 2


def why_none() -> str | None:
    """What a user can do to have kernels here; None where they are there, or of no use."""
    if "avx512_bf16" in _cpu_flags() and _compiler() is None:
        return (
            "there is no C compiler, so torch's own kernels compute in bf16: a decode step takes 1.4 to 1.6x as long; "
            "apt-get install gcc libc6-dev"
        )
    return None


def load_kernels(cache_dir: str) -> tuple[ctypes.CDLL, Features] | None:
    """The compiled kernels, from `cache_dir` or put there; None where there is no use for them or no way to make them.

    Never an exception: why there are none is logged.
    """
    if "avx512_bf16" not in _cpu_flags():
        return None
    try:
        library = ctypes.CDLL(str(_compiled(Path(cache_dir) / "kernels")))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("no kernels of our own for this processor, torch's are slower for few rows: %s", error)
        return None
    library.raytier_linear_features.restype = ctypes.c_int
    features = Features(library.raytier_linear_features())
    return (library, features) if features else None


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def _compiled(directory: Path) -> Path:
    """The library made of the source as it is now.

    Raises:
        OSError, subprocess.SubprocessError: there is no compiler, or it refuses.
    """
    compiler = _compiler()
    if compiler is None:
        raise FileNotFoundError("there is no C compiler (Debian, Ubuntu: apt-get install gcc libc6-dev)")
    texts = [path.read_bytes() for path in sorted(_DIRECTORY.glob("*.[ch]"))]
    key = hashlib.sha256(repr((compiler, _FLAGS, texts)).encode()).hexdigest()[:16]
    library = directory / f"bf16-{key}.so"
    if library.exists():
        return library
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=directory) as scratch:
        built = Path(scratch) / library.name
        sources = [str(path) for path in sorted(_DIRECTORY.glob("*.c"))]
        command = [*compiler.split(), *_FLAGS, "-o", str(built), *sources, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode:
            raise OSError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
        os.replace(built, library)  # whoever builds it at the same time makes the same
    return library
