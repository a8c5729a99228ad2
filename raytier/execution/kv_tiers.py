"""KV blocks between the device, the host's memory and the disk, beside the layers of a step.

A block below the device is one contiguous extent, a *slot*: for every layer of its group in order its keys
`[num_kv_heads, block_size, key_dim]`, then its values, as computed; slots begin at multiples of `ALIGNMENT`, so that
they are written to files as they are. One thread moves what a step orders (`KVOrders`), layer by layer; the step waits
before each layer until that one is in place. Blocks from the disk are read in chunks, by the threads that read weights
and before these, and put in place while the next chunks are read. A second thread writes to the disk, behind the steps.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from queue import SimpleQueue

import torch
from torch import Tensor

from raytier.errors import TierError
from raytier.execution.kv_store import KVStore
from raytier.execution.reader import ReaderPool, Urgency
from raytier.execution.reads import Read
from raytier.execution.threads import compute_with
from raytier.execution.ticket import ReadTicket
from raytier.kv.orders import BlockMove, DiskWrite, KVOrders, KVReport, LowerShape, Moved
from raytier.planner.plan import Tier
from raytier.planner.sizing import KV_CHUNK_BYTES, KV_CHUNKS
from raytier.tiers.aligned import AlignedBuffer, align_up
from raytier.tiers.kv_files import KVFile, remove_others

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Part:
    """Where a pool of a layer (keys or values) lies in a slot: `elements` from `offset` on."""

    pool: Tensor
    offset: int
    elements: int


@dataclass(slots=True)
class _Group:
    """A KV cache group. `parts`: by layer of the model, none for those of other groups. `host`: `[slots, elements]`."""

    slot_bytes: int
    parts: list[tuple[_Part, ...]]
    host: Tensor
    memory: memoryview
    files: list[KVFile] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)  # of the files in the reader pool


@dataclass(frozen=True, slots=True)
class _Batch:
    """Moves of one group, as indices `[n]`: blocks on the device, slots in the host's memory."""

    group: int
    blocks: Tensor
    slots: Tensor
    nbytes: int


class _Job:
    """The orders of one step, and how far they have been carried out."""

    def __init__(self, orders: KVOrders, layers: int) -> None:
        self.orders = orders
        self.layers = layers
        self.done = 0  # layers in place
        self.over = False
        self.error: BaseException | None = None
        self.lost: list[BlockMove] = []
        self.stored = self.loaded = self.disk_loaded = Moved()
        self.changed = threading.Condition()

    def advance(self, layer: int) -> None:
        with self.changed:
            self.done = layer
            self.changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        with self.changed:
            self.over, self.error = True, error
            self.changed.notify_all()

    def wait(self, layer: int) -> None:
        """Return when what this layer needs is in place; `layers`: when all is done."""
        if self.over and self.error is None:
            return
        with self.changed:
            self.changed.wait_for(lambda: self.over or self.done > layer)
            if self.error is not None:
                raise TierError(f"moving KV blocks failed: {self.error!r}") from self.error


class KVTiers:
    """What is below the KV of a device. Steps are begun and finished by one thread.

    Args:
        store: the device's KV.
        memory: of the host's slots, at an aligned address; `kv_setup.host_bytes(shape)` of it.
        pool: reads the files, for as long as this lives.

    Raises:
        TierError: the files cannot be made.
    """

    def __init__(self, store: KVStore, shape: LowerShape, memory: memoryview, pool: ReaderPool) -> None:
        self._store = store
        self._shape = shape
        self._pool = pool
        self._device = store.keys[0].device
        self._job: _Job | None = None
        self._written: list[DiskWrite] = []
        self._failed: list[DiskWrite] = []
        self._why: str | None = None
        self._unwritten = 0
        self._changed = threading.Condition()
        self._groups: list[_Group] = []
        self._staging: AlignedBuffer | None = None
        try:
            self._lay_out(memory)
            if shape.disk_slots:
                self._open_files()
        except BaseException:
            self._close_files()
            raise
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._writes: SimpleQueue[tuple[DiskWrite, ...] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name="raytier-kv", daemon=True),
            threading.Thread(target=self._run_writes, name="raytier-kv-write", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _lay_out(self, memory: memoryview) -> None:
        store, begin = self._store, 0
        for group, nbytes in enumerate(self._shape.block_bytes):
            slot_bytes, offset = align_up(nbytes), 0
            parts: list[tuple[_Part, ...]] = []
            for layer, owner in enumerate(store.group_of):
                both = []
                if owner == group:
                    for pool in (store.keys[layer], store.values[layer]):
                        elements = pool.shape[0] * store.block_size * pool.shape[2]
                        both.append(_Part(pool.view(pool.shape[0], store.num_blocks, -1), offset, elements))
                        offset += elements
                parts.append(tuple(both))
            if offset * store.dtype.itemsize != nbytes:
                raise ValueError(f"group {group} has blocks of {offset * store.dtype.itemsize} bytes, not {nbytes}")
            size = slot_bytes * self._shape.host_slots
            view = memory[begin : begin + size]
            host = torch.frombuffer(view, dtype=store.dtype).view(self._shape.host_slots, -1)
            self._groups.append(_Group(slot_bytes, parts, host, view))
            begin += size

    def _open_files(self) -> None:
        shape = self._shape
        count = len(shape.directories)
        names = [f"{shape.name}-{group}" for group in range(len(self._groups))]
        for number, directory in enumerate(shape.directories):
            slots = (shape.disk_slots + count - 1 - number) // count
            for group, name in zip(self._groups, names, strict=True):
                group.files.append(KVFile(directory, name, group.slot_bytes, slots, persist=shape.persist))
            if shape.persist:
                most = sum(shape.disk_slots * group.slot_bytes for group in self._groups) // count
                remove_others(directory, names, most)
        for group in self._groups:
            group.numbers = [self._pool.add_file(file.file, Tier.NVME) for file in group.files]
        self._staging = AlignedBuffer(KV_CHUNKS * max(KV_CHUNK_BYTES, *(group.slot_bytes for group in self._groups)))

    def restored(self) -> list[list[tuple[int, bytes]]]:
        """Per group (slot, hash) of what the files held when they were opened."""
        found = []
        for group in self._groups:
            count = len(group.files)
            each = [
                (slot * count + number, digest)
                for number, file in enumerate(group.files)
                for slot, digest in file.entries()
            ]
            found.append(sorted(each))
        return found

    # ---- the step's thread ---------------------------------------------------------------------

    def begin(self, orders: KVOrders | None) -> None:
        """Carry out the orders of a step that begins."""
        if orders is None:
            self._job = None
            return
        self._job = job = _Job(orders, len(self._store.keys))
        if orders.stores or orders.loads or orders.disk_loads or orders.writes:
            self._jobs.put(job)
        else:
            job.end()

    def ready(self, layer: int) -> None:
        """Return when the blocks of a layer are in place and may be written to.

        Raises:
            TierError: they cannot be moved.
        """
        if self._job is not None:
            self._job.wait(layer)

    def wait(self) -> None:
        """Return when the blocks of all layers are in place."""
        self.ready(len(self._store.keys))

    def finish(self) -> KVReport:
        """What became of the step's orders, and of earlier writes."""
        job, self._job = self._job, None
        if job is not None:
            job.wait(job.layers)
        with self._changed:
            if job is not None and job.orders.settle:
                self._changed.wait_for(lambda: not self._unwritten)
            report = KVReport(tuple(self._written), tuple(self._failed), self._why)
            self._written, self._failed, self._why = [], [], None
        if job is None:
            return report
        return KVReport(
            report.written,
            report.failed,
            report.why,
            tuple(job.lost),
            job.stored,
            job.loaded,
            job.disk_loaded,
        )

    def close(self) -> None:
        """End the threads after what they do now, and close the files; no step runs."""
        self._jobs.put(None)
        self._threads[0].join()
        self._writes.put(None)
        self._threads[1].join()
        self._close_files()

    def _close_files(self) -> None:
        for group in self._groups:
            for number in group.numbers:
                self._pool.drop_file(number)
            for file in group.files:
                file.close()
            group.numbers, group.files = [], []

    # ---- moves ---------------------------------------------------------------------------------

    def _run(self) -> None:
        compute_with(1)  # beside the layers
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None:
                try:
                    self._execute(job)
                except BaseException as error:
                    logger.exception("KV blocks could not be moved")
                    job.end(error)
                else:
                    job.end()

    def _execute(self, job: _Job) -> None:
        orders = job.orders
        stores, loads = self._batches(orders.stores), self._batches(orders.loads)
        stored = loaded = 0.0
        early = bool(orders.disk_loads)  # what comes from disk takes blocks that are stored before
        if early:
            began = time.perf_counter()
            chunks = _DiskLoads(self, orders.disk_loads)
            stored = self._store_layers(stores, range(job.layers))
            job.lost = chunks.execute()
            job.disk_loaded = Moved(len(orders.disk_loads), chunks.nbytes, time.perf_counter() - began - stored)
        for layer in range(job.layers):
            if not early:
                stored += self._store_layers(stores, (layer,))
            began = time.perf_counter()
            for batch in loads:
                for part in self._groups[batch.group].parts[layer]:
                    self._load(part, self._groups[batch.group].host, batch)
            loaded += time.perf_counter() - began
            job.advance(layer + 1)
        job.stored = Moved(len(orders.stores), sum(batch.nbytes for batch in stores), stored)
        job.loaded = Moved(len(orders.loads), sum(batch.nbytes for batch in loads), loaded)
        if orders.writes:
            with self._changed:
                self._unwritten += len(orders.writes)
            self._writes.put(orders.writes)

    def _batches(self, moves: Sequence[BlockMove]) -> list[_Batch]:
        batches = []
        for group in sorted({move.group for move in moves}):
            own = sorted((move.block, move.slot) for move in moves if move.group == group)
            blocks, slots = torch.tensor(own, dtype=torch.int64).unbind(1)
            nbytes = len(own) * self._shape.block_bytes[group]
            batches.append(_Batch(group, blocks.to(self._device), slots, nbytes))
        return batches

    def _store_layers(self, batches: Sequence[_Batch], layers: Sequence[int]) -> float:
        began = time.perf_counter()
        for layer in layers:
            for batch in batches:
                group = self._groups[batch.group]
                for part in group.parts[layer]:
                    rows = part.pool.index_select(1, batch.blocks).transpose(0, 1).to("cpu")
                    self._place(part, group.host).index_copy_(0, batch.slots, rows)
        return time.perf_counter() - began

    def _load(self, part: _Part, slots: Tensor, batch: _Batch) -> None:
        rows = self._place(part, slots).index_select(0, batch.slots).to(self._device)
        part.pool.index_copy_(1, batch.blocks, rows.transpose(0, 1))

    def _place(self, part: _Part, slots: Tensor) -> Tensor:
        """A part of slots `[n, elements]`, as `[n, num_kv_heads, elements of a head]`."""
        heads, begin = part.pool.shape[0], part.offset
        return slots.as_strided(
            (slots.shape[0], heads, part.elements // heads), (slots.shape[1], part.elements // heads, 1), begin
        )

    # ---- writes --------------------------------------------------------------------------------

    def _run_writes(self) -> None:
        while (writes := self._writes.get()) is not None:
            ordered = sorted(writes, key=self._address)
            # Consecutive slots of one file in one call.
            for _, run in groupby(enumerate(ordered), lambda item: (*self._address(item[1])[:2], self._gap(*item))):
                self._write([write for _, write in run])

    def _address(self, write: DiskWrite) -> tuple[int, int, int]:
        """(group, file, slot in it)."""
        slot, number = divmod(write.target, len(self._groups[write.group].files))
        return write.group, number, slot

    def _gap(self, position: int, write: DiskWrite) -> int:
        return self._address(write)[2] - position

    def _write(self, run: list[DiskWrite]) -> None:
        group, number, slot = self._address(run[0])
        size, memory = self._groups[group].slot_bytes, self._groups[group].memory
        views = [memory[write.source * size : (write.source + 1) * size] for write in run]
        why = None
        try:
            self._groups[group].files[number].write(slot, [write.digest for write in run], views)
        except TierError as error:
            why = error.message
            logger.warning("%s; these blocks will be computed again", why)
        with self._changed:
            (self._written if why is None else self._failed).extend(run)
            self._why = why or self._why
            self._unwritten -= len(run)
            self._changed.notify_all()


class _DiskLoads:
    """Reads blocks in chunks into the staging memory, a few ahead of the one that is put in place."""

    def __init__(self, tiers: KVTiers, moves: Sequence[BlockMove]) -> None:
        self._tiers = tiers
        self.nbytes = 0
        self._chunks: list[
            tuple[_Group, int, list[tuple[int, int, int]]]
        ] = []  # group, its number, (file, slot, block)
        for number, group in enumerate(tiers._groups):
            count = len(group.files)
            own = sorted((move.slot % count, move.slot // count, move.block) for move in moves if move.group == number)
            size = max(1, KV_CHUNK_BYTES // group.slot_bytes)
            self._chunks += [(group, number, own[i : i + size]) for i in range(0, len(own), size)]
            self.nbytes += len(own) * tiers._shape.block_bytes[number]
        self._tickets = [self._submit(index) for index in range(min(KV_CHUNKS, len(self._chunks)))]

    def execute(self) -> list[BlockMove]:
        """Put everything in place; what could not be had."""
        lost: list[BlockMove] = []
        for index, (group, number, rows) in enumerate(self._chunks):
            view = self._view(index)
            try:
                self._tickets[index].wait()
                good = [group.files[file].holds(slot, self._slot(view, group, i)) for i, (file, slot, _) in _each(rows)]
            except TierError as error:
                logger.warning("%s; what was to be loaded is computed again", error.message)
                good = [False] * len(rows)
            count = len(group.files)
            lost += [
                BlockMove(number, block, slot * count + file) for i, (file, slot, block) in _each(rows) if not good[i]
            ]
            if any(good):
                self._place(group, number, view, [(i, row[2]) for i, row in _each(rows) if good[i]])
            if index + KV_CHUNKS < len(self._chunks):
                self._tickets.append(self._submit(index + KV_CHUNKS))
        return lost

    def _place(self, group: _Group, number: int, view: memoryview, rows: list[tuple[int, int]]) -> None:
        tiers = self._tiers
        slots, blocks = torch.tensor(rows, dtype=torch.int64).unbind(1)
        batch = _Batch(number, blocks.to(tiers._device), slots, 0)
        whole = len(view) // group.slot_bytes * group.slot_bytes
        staged = torch.frombuffer(view[:whole], dtype=tiers._store.dtype).view(whole // group.slot_bytes, -1)
        for parts in group.parts:
            for part in parts:
                tiers._load(part, staged, batch)

    def _view(self, index: int) -> memoryview:
        staging = self._tiers._staging
        assert staging is not None, "there are files, so there is staging memory"
        size = staging.nbytes // KV_CHUNKS
        return staging.view[index % KV_CHUNKS * size : (index % KV_CHUNKS + 1) * size]

    def _slot(self, view: memoryview, group: _Group, index: int) -> memoryview:
        return view[index * group.slot_bytes : (index + 1) * group.slot_bytes]

    def _submit(self, index: int) -> ReadTicket:
        group, _, rows = self._chunks[index]
        reads: list[Read] = []
        size = group.slot_bytes
        for i, (file, slot, _) in _each(rows):
            number, offset, dest = group.numbers[file], slot * size, i * size
            if reads and reads[-1].file == number and reads[-1].offset + reads[-1].nbytes == offset:
                reads[-1] = Read(number, reads[-1].offset, reads[-1].nbytes + size, reads[-1].dest)
            else:
                reads.append(Read(number, offset, size, dest))
        return self._tiers._pool.submit(reads, self._view(index), Urgency.URGENT)


def _each(rows: list[tuple[int, int, int]]) -> list[tuple[int, tuple[int, int, int]]]:
    return list(enumerate(rows))
