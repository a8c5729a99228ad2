"""Page-aligned memory that O_DIRECT reads can land in."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

#: Alignment in bytes of offset, length and address of every disk read. Every block device accepts 4096.
ALIGNMENT = 4096
#: Bytes of a huge page.
_HUGE = 2 << 20


def align_down(value: int) -> int:
    return value & -ALIGNMENT


def align_up(value: int) -> int:
    return (value + ALIGNMENT - 1) & -ALIGNMENT


def address_of(buffer: memoryview | mmap.mmap) -> int:
    """Address of the first byte of a writable buffer."""
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class AlignedBuffer:
    """Anonymous private memory of `nbytes` (rounded up to `ALIGNMENT`), zero until written.

    Pages are taken when first touched, huge ones where the kernel allows and the buffer fills them: touching, pinning
    and unpinning the pages of a direct read then costs hundreds of times fewer operations.
    """

    def __init__(self, nbytes: int) -> None:
        if nbytes <= 0:
            raise ValueError(f"a buffer of {nbytes} bytes: give a positive size")
        self.nbytes = align_up(nbytes)
        whole = self.nbytes // _HUGE * _HUGE  # of huge pages; what lies around them is never touched
        memory = mmap.mmap(-1, self.nbytes + (_HUGE if whole else 0), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        begin = -address_of(memory) % _HUGE if whole else 0
        if whole:
            with contextlib.suppress(OSError):  # a kernel without transparent huge pages: only slower
                memory.madvise(mmap.MADV_HUGEPAGE, begin, whole)
        self.address = address_of(memory) + begin
        self._view: memoryview | None = memoryview(memory)[begin : begin + self.nbytes]

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
