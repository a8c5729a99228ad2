"""Libraries in C, compiled where they run: for its instructions, in a second, once per machine."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """`sources`, all `*.c` of a directory with their `*.h`, and the `flags` that they are compiled with."""

    name: str
    sources: Path
    flags: tuple[str, ...]

    def load(self, cache_dir: str) -> ctypes.CDLL:
        """The library, from `<cache_dir>/kernels` or compiled and put there.

        Raises:
            OSError, subprocess.SubprocessError: there is no compiler, or it refuses, or the file cannot be written.
        """
        return ctypes.CDLL(str(self._compiled(Path(cache_dir) / "kernels")))

    def _compiled(self, directory: Path) -> Path:
        """The library made of the source as it is now, for this processor."""
        command = compiler()
        if command is None:
            raise FileNotFoundError("there is no C compiler (Debian, Ubuntu: apt-get install gcc libc6-dev)")
        texts = [path.read_bytes() for path in sorted(self.sources.glob("*.[ch]"))]
        # A cache may be shared by machines: with -march=native the instructions are part of what the library is.
        key = hashlib.sha256(repr((command, self.flags, texts, sorted(cpu_flags()))).encode()).hexdigest()[:16]
        library = directory / f"{self.name}-{key}.so"
        if library.exists():
            return library
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=directory) as scratch:
            built = Path(scratch) / library.name
            sources = [str(path) for path in sorted(self.sources.glob("*.c"))]
            full = [*command.split(), *self.flags, "-shared", "-fPIC", "-o", str(built), *sources, "-lm"]
            done = subprocess.run(full, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            if done.returncode:
                raise OSError(f"{' '.join(full)} failed: {done.stderr.strip()[-500:]}")
            os.replace(built, library)  # whoever builds it at the same time makes the same
        return library


def compiler() -> str | None:
    """The command of a C compiler; None where there is none."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")


def cpu_flags() -> frozenset[str]:
    """Instruction sets of this processor as the kernel names them; none where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


#: What codecs and forms have in C, for this processor.
CODECS = NativeLibrary("codecs", Path(__file__).parent / "kernels", ("-O3", "-march=native"))
