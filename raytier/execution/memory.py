"""Memory that a process of models does not use any more goes back to the system. No torch."""

from __future__ import annotations

import ctypes
import gc
import re
from pathlib import Path

_MADV_NOHUGEPAGE = 15
_REGION = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


def give_back() -> None:
    """Collect garbage and have the allocator let go of its free pages.

    For a moment in which no model is loaded. What torch had asked to be huge pages stays marked as such in the
    allocator's regions, and wherever one small object still lies there the kernel (khugepaged) fills two megabytes
    again, now and then, with nothing in them. So the marks are taken away first.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    for start, stop in _marked_regions():
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _MADV_NOHUGEPAGE)
    libc.malloc_trim(0)


def _marked_regions() -> list[tuple[int, int]]:
    """(start, stop) of the regions of this process that are to be backed by huge pages."""
    found: list[tuple[int, int]] = []
    region = (0, 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if (match := _REGION.match(line)) is not None:
            region = (int(match[1], 16), int(match[2], 16))
        elif line.startswith("VmFlags:") and "hg" in line.split():
            found.append(region)
    return found
