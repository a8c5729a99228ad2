"""KV blocks on disk: files of fixed slots with a checksum for each, private to the process or kept for the next one.

A kept file `<name>.kv` has an index `<name>.index` beside it: a page that says for what the slots are, then a record of
32 bytes per slot: hash of the content (16), xxh3 of its bytes (8), and 8 bytes that tell a record from nothing. The
record is taken away before its slot is written again and put back afterwards; whatever a crash leaves, bytes that do
not have their checksum are not used. Who opens a kept file locks its index; a second process gets a private one.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import struct
from collections.abc import Sequence
from contextlib import suppress

import xxhash

from raytier.errors import TierError
from raytier.tiers.aligned import ALIGNMENT, align_up
from raytier.tiers.files import DirectFile

logger = logging.getLogger(__name__)

_VERSION = 1
_RECORD = struct.Struct("<16sQQ")
_PRESENT = 0x6B76_5F62_6C6F_636B
#: The kernel takes no more buffers in one call (IOV_MAX).
_MOST_VIEWS = 1024


class KVFile:
    """`num_slots` slots of `slot_bytes` each (rounded up to `ALIGNMENT`) for the KV blocks of one group.

    Slots may be read and written by several threads at once, each slot by one at a time (`LowerTiers` pins them).

    Args:
        name: of the files in `directory`; another model's or layout's has another one.
        persist: keep the files.

    Attributes:
        file: for `ReaderPool`.
        kept: whether the files will be found by the next process.

    Raises:
        TierError: the file cannot be made.
    """

    def __init__(self, directory: str, name: str, slot_bytes: int, num_slots: int, *, persist: bool) -> None:
        self.slot_bytes = align_up(slot_bytes)
        self.num_slots = num_slots
        self.path = os.path.join(directory, f"{name}.kv")
        self._index = -1
        self._sums: dict[int, tuple[bytes, int]] = {}  # slot -> (content, xxh3)
        size = self.slot_bytes * num_slots
        try:
            os.makedirs(directory, exist_ok=True)
            self.kept = persist and self._open_index(os.path.join(directory, f"{name}.index"))
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
            path = self.path if self.kept else os.path.join(directory, f".{name}-{os.getpid()}-{id(self):x}.kv")
            self._fd = os.open(path, flags, 0o600)
            if not self.kept:
                os.unlink(path)  # nothing is left of it, however this process ends
            os.ftruncate(self._fd, size)
            self.file = DirectFile(f"/proc/self/fd/{self._fd}", size)
        except OSError as error:
            self._close_index()
            raise TierError(
                f"no KV blocks can be kept in {directory}: {error.strerror} (errno {error.errno})"
            ) from error
        with suppress(OSError):  # where there is no O_DIRECT, writes go through the page cache
            fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) | os.O_DIRECT)

    def entries(self) -> list[tuple[int, bytes]]:
        """(slot, hash) of what is there."""
        return [(slot, digest) for slot, (digest, _) in sorted(self._sums.items())]

    def write(self, slot: int, digests: Sequence[bytes], views: Sequence[memoryview]) -> None:
        """Write consecutive slots from `slot` on, each from a view of `slot_bytes` at an aligned address.

        Raises:
            TierError: the disk is full or fails; none of the slots holds anything then.
        """
        slots = range(slot, slot + len(views))
        for each in slots:
            self._forget(each)
        sums = [xxhash.xxh3_64_intdigest(view) for view in views]
        try:
            for begin in range(0, len(views), _MOST_VIEWS):
                part = views[begin : begin + _MOST_VIEWS]
                self._write_all(part, (slot + begin) * self.slot_bytes)
            for each, digest, checksum in zip(slots, digests, sums, strict=True):
                if self._index >= 0:
                    record = _RECORD.pack(digest, checksum, _PRESENT)
                    os.pwrite(self._index, record, ALIGNMENT + each * _RECORD.size)
                self._sums[each] = digest, checksum
        except OSError as error:
            for each in slots:
                with suppress(OSError):
                    self._forget(each)
            raise TierError(
                f"writing KV blocks to {self.path} failed: {error.strerror} (errno {error.errno})"
            ) from error

    def _write_all(self, views: Sequence[memoryview], offset: int) -> None:
        done = os.pwritev(self._fd, views, offset)
        if done < sum(map(len, views)):
            # What comes short is nearly always a full disk: the next write says so, from the last whole block on.
            flat = b"".join(views)
            fcntl.fcntl(self._fd, fcntl.F_SETFL, fcntl.fcntl(self._fd, fcntl.F_GETFL) & ~os.O_DIRECT)
            while done < len(flat):
                done += os.pwrite(self._fd, flat[done:], offset + done)

    def holds(self, slot: int, view: memoryview) -> bool:
        """Whether `view` is what was written to a slot; what is not is forgotten."""
        known = self._sums.get(slot)
        if known is not None and xxhash.xxh3_64_intdigest(view) == known[1]:
            return True
        with suppress(OSError):
            self._forget(slot)
        return False

    def close(self) -> None:
        """The caller makes sure that nothing is read or written any more."""
        self.file.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self._close_index()

    def _forget(self, slot: int) -> None:
        if self._sums.pop(slot, None) is not None and self._index >= 0:
            os.pwrite(self._index, bytes(_RECORD.size), ALIGNMENT + slot * _RECORD.size)

    def _open_index(self, path: str) -> bool:
        """Open and lock the index, and read what it says; False where another process has it."""
        self._index = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._index, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("%s is another process's: what this one keeps on disk ends with it", path)
            self._close_index()
            return False
        head = json.dumps({"version": _VERSION, "slot_bytes": self.slot_bytes}).encode()
        page = head.ljust(ALIGNMENT)
        if os.pread(self._index, ALIGNMENT, 0) == page and os.path.exists(self.path):
            records = os.pread(self._index, self.num_slots * _RECORD.size, ALIGNMENT)
            whole = records[: len(records) // _RECORD.size * _RECORD.size]
            for slot, (digest, checksum, present) in enumerate(_RECORD.iter_unpack(whole)):
                if present == _PRESENT:
                    self._sums[slot] = digest, checksum
        else:
            os.ftruncate(self._index, 0)
            os.pwrite(self._index, page, 0)
        return True

    def _close_index(self) -> None:
        if self._index >= 0:
            os.close(self._index)
            self._index = -1


def remove_others(directory: str, keep: Sequence[str], most_bytes: int) -> None:
    """Remove the oldest kept files of other models until all in `directory` take at most `most_bytes`; `keep`: names
    of the files that count and stay. Those that a process has open stay as well."""
    with suppress(FileNotFoundError):
        sizes = {}
        for entry in os.scandir(directory):
            if entry.name.endswith(".kv") and not entry.name.startswith("."):
                status = entry.stat()
                sizes[entry.name.removesuffix(".kv")] = (status.st_mtime, status.st_blocks * 512)
        total = sum(size for _, size in sizes.values())
        for name, (_, size) in sorted(sizes.items(), key=lambda item: item[1][0]):
            if total <= most_bytes:
                return
            if name in keep:
                continue
            index = os.path.join(directory, f"{name}.index")
            try:
                fd = os.open(index, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except OSError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(os.path.join(directory, f"{name}.kv"))
                os.unlink(index)
                total -= size
            except OSError:
                continue
            finally:
                os.close(fd)
