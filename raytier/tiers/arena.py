"""The node's RAM pool: one shared-memory segment, and which range of it belongs to whom."""

from __future__ import annotations

import fcntl
import mmap
import os
from bisect import bisect_left
from dataclasses import dataclass
from itertools import pairwise

from raytier.errors import ResourceNotAvailableError, TierError
from raytier.tiers.aligned import ALIGNMENT, align_up


@dataclass(frozen=True, slots=True)
class ArenaHandle:
    """How another process of the node finds an arena: descriptor `fd` of process `pid`.

    `inode` tells the segment from whatever may carry these numbers after its owner has died.
    """

    pid: int
    fd: int
    nbytes: int
    inode: int


class Arena:
    """Shared memory without a name in any filesystem: it is gone when the last process that maps it is.

    Made by `Arena.create` in the owner and `Arena.attach` in its peers.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd = fd
        self.nbytes = nbytes
        self._view: memoryview | None = memoryview(mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED))

    @classmethod
    def create(cls, name: str, nbytes: int) -> Arena:
        """A new arena of `nbytes` rounded up to pages; `name` shows in /proc/<pid>/maps. Pages are taken when touched.

        Small pages: huge ones for a memfd need the administrator (shmem_enabled), and ranges aligned to them brought
        nothing without.

        Raises:
            TierError: the kernel refuses.
        """
        if nbytes <= 0:
            raise ValueError(f"an arena of {nbytes} bytes: give a positive size")
        nbytes = align_up(nbytes)
        fd = -1
        try:
            fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, nbytes)
            # Sealed: no process can shrink it under the others, which would kill them with SIGBUS.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, nbytes)
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            raise TierError(f"cannot create an arena of {nbytes} bytes: {error}; lower tiers.host.max_mb") from error

    @classmethod
    def attach(cls, handle: ArenaHandle) -> Arena:
        """Map the arena of another process of this node.

        Raises:
            TierError: its owner has died or closed it, or belongs to another user.
        """
        path = f"/proc/{handle.pid}/fd/{handle.fd}"
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TierError(f"cannot attach the arena {path}: {error.strerror}; is its owner still running?") from error
        status = os.fstat(fd)
        if (status.st_ino, status.st_size) != (handle.inode, handle.nbytes):
            os.close(fd)
            raise TierError(f"{path} is another file now: the arena's owner has died or closed it")
        return cls(fd, handle.nbytes)

    @property
    def handle(self) -> ArenaHandle:
        """For `attach`; valid while this process lives and has not closed the arena."""
        return ArenaHandle(os.getpid(), self._fd, self.nbytes, os.fstat(self._fd).st_ino)

    @property
    def view(self) -> memoryview:
        """All bytes, writable, format "B"."""
        if self._view is None:
            raise ValueError("the arena is closed")
        return self._view

    @property
    def touched_bytes(self) -> int:
        """Bytes of the pages that it takes from the system now."""
        if self._fd < 0:
            raise ValueError("the arena is closed")
        return os.fstat(self._fd).st_blocks * 512

    def release(self, offset: int, nbytes: int) -> None:
        """Give the pages of a range back to the system, for all processes at once; it reads as zeros from now on.

        Whoever filled the range must have stopped using it. Both numbers are multiples of `ALIGNMENT`.

        Raises:
            TierError: the kernel refuses.
        """
        if offset % ALIGNMENT or nbytes % ALIGNMENT or not 0 <= offset <= offset + nbytes <= self.nbytes:
            raise ValueError(f"cannot release {nbytes} bytes at {offset} of an arena of {self.nbytes}")
        memory = self.view.obj
        assert isinstance(memory, mmap.mmap)
        try:
            # On shared memory this punches a hole, as fallocate does; Python has no fallocate that could.
            memory.madvise(mmap.MADV_REMOVE, offset, nbytes)
        except OSError as error:
            raise TierError(f"cannot release {nbytes} bytes at {offset} of the arena: {error}") from error

    def close(self) -> None:
        """Give up the descriptor; the memory goes when the last view of it does (see `AlignedBuffer.close`)."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._view = None

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class RangeAllocator:
    """Which owner has which range of [0, nbytes): first fit, neighbouring free ranges always joined.

    Invariant: the owned and the free ranges tile [0, capacity); free ranges are sorted and never adjacent.
    """

    def __init__(self, nbytes: int, alignment: int = ALIGNMENT) -> None:
        if alignment <= 0 or nbytes < 0:
            raise ValueError(f"{nbytes} bytes aligned to {alignment}: sizes must not be negative")
        self.alignment = alignment
        self.capacity = nbytes // alignment * alignment
        self._owned: dict[str, tuple[int, int]] = {}  # owner -> (offset, bytes)
        self._free: list[tuple[int, int]] = [(0, self.capacity)] if self.capacity else []  # (offset, bytes)

    @property
    def free_bytes(self) -> int:
        return sum(size for _, size in self._free)

    @property
    def largest_free(self) -> int:
        """Bytes of the largest range that `allocate` could return now."""
        return max((size for _, size in self._free), default=0)

    def range_of(self, owner: str) -> tuple[int, int]:
        """(offset, bytes) of `owner`, the bytes rounded up to the alignment; KeyError when it has none."""
        return self._owned[owner]

    def allocate(self, owner: str, nbytes: int) -> int:
        """Offset of a new range of at least `nbytes` for `owner`, who must not have one yet.

        Raises:
            ResourceNotAvailableError: no free range is large enough; nothing has changed.
        """
        if nbytes <= 0:
            raise ValueError(f"{owner}: cannot allocate {nbytes} bytes")
        if owner in self._owned:
            raise ValueError(f"{owner} already owns a range; free it first")
        size = -(-nbytes // self.alignment) * self.alignment
        for index, (offset, available) in enumerate(self._free):
            if available >= size:
                self._free[index : index + 1] = [(offset + size, available - size)] if available > size else []
                self._owned[owner] = (offset, size)
                return offset
        raise ResourceNotAvailableError(
            f"no room for {size} bytes of {owner}: {self.free_bytes} of {self.capacity} bytes are free, "
            f"the largest range has {self.largest_free}; unload something or raise the tier's budget"
        )

    def free(self, owner: str) -> None:
        """Take back the range of `owner`; KeyError when it has none."""
        offset, size = self._owned.pop(owner)
        index = bisect_left(self._free, (offset, size))
        start, stop = index, index
        if index < len(self._free) and self._free[index][0] == offset + size:
            size += self._free[index][1]
            stop += 1
        if index > 0 and sum(self._free[index - 1]) == offset:
            offset, before = self._free[index - 1]
            size += before
            start -= 1
        self._free[start:stop] = [(offset, size)]

    def check_integrity(self) -> None:
        """AssertionError unless the invariant holds."""
        assert self._free == sorted(self._free)
        assert all(sum(left) < right[0] for left, right in pairwise(self._free)), "adjacent free ranges"
        position = 0
        for offset, size in sorted([*self._free, *self._owned.values()]):
            assert offset == position, f"gap or overlap at {position}"
            assert size > 0
            assert size % self.alignment == 0
            position += size
        assert position == self.capacity
