"""How many CPU threads the calling thread computes with.

libgomp, torch's OpenMP, keeps a pool of threads for every thread that computes in parallel. While there are more of
these in a process than cores, they sleep between two operations instead of spinning, and each of the thousand
operations of a step waits until the system has woken them: 15 to 40 % of a decode step. Hence the one thread that
computes steps has a pool, and all that goes on beside it computes alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def compute_with(threads: int) -> None:
    """Let the calling thread compute with `threads` from now on: torch remembers that for every thread, and a thread
    that was never told takes over what any other was told last."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """Compute with so many CPU threads meanwhile."""
    before = torch.get_num_threads()
    compute_with(threads)
    try:
        yield
    finally:
        compute_with(before)
