"""Page-aligned memory that O_DIRECT reads can land in."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

#: Alignment in bytes of offset, length and address of every disk read. Every block device accepts 4096.
ALIGNMENT = 4096


def align_down(value: int) -> int:
    return value & -ALIGNMENT


def align_up(value: int) -> int:
    return (value + ALIGNMENT - 1) & -ALIGNMENT


def address_of(buffer: memoryview | mmap.mmap) -> int:
    """Address of the first byte of a writable buffer."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class AlignedBuffer:
    """Anonymous private memory of `nbytes` (rounded up to `ALIGNMENT`), zero until written.

    Pages are taken when first touched, huge ones where the kernel allows: pinning and unpinning the pages of
    a direct read then costs hundreds of times fewer operations.
    """

    def __init__(self, nbytes: int) -> None:
        if nbytes <= 0:
            raise ValueError(f"a buffer of {nbytes} bytes: give a positive size")
        self.nbytes = align_up(nbytes)
        memory = mmap.mmap(-1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without transparent huge pages: only slower
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.address = address_of(memory)
        self._view: memoryview | None = memoryview(memory)

    @property
    def view(self) -> memoryview:
        """All bytes, writable, format "B"."""
        if self._view is None:
            raise ValueError("the buffer is closed")
        return self._view

    def close(self) -> None:
        """Let go of the memory; it is unmapped as soon as the last view of it is gone.

        The view is dropped, never released: a tensor made from it keeps the view alive but holds no export,
        so releasing would unmap memory that the tensor still points into.
        """
        self._view = None

    def __enter__(self) -> AlignedBuffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
