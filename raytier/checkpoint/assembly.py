"""Stored tensors that transformers' own conversion operations take apart and put together without reading a byte.

A `StoredTensor` looks enough like a tensor for a `WeightConverter` (stack, cat, chunk, split, transpose) and only keeps
account of where in the checkpoint's files each part of the result lies. What comes out is a list of extents, as a
manifest names them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

import torch

from raytier.checkpoint.manifest import DTYPE_BYTES, Extent
from raytier.checkpoint.safetensors_index import TensorEntry

#: More separate pieces per parameter than this would make its reading slower than anything that it is good for.
MOST_EXTENTS = 64


class NotExpressible(Exception):
    """A conversion whose result is no list of extents; says which."""


@dataclass(frozen=True, slots=True)
class _Box:
    """A rectangle of a tensor: where it starts in it, its shape, and its bytes in a file, `strides` in bytes."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: int
    offset: int
    strides: tuple[int, ...]

    def within(self, dim: int, first: int, last: int) -> _Box | None:
        """The part with index [first, last) of `dim`, counted from `first`; None when there is none."""
        low = max(self.start[dim], first)
        high = min(self.start[dim] + self.shape[dim], last)
        if low >= high:
            return None
        return replace(
            self,
            start=_put(self.start, dim, low - first),
            shape=_put(self.shape, dim, high - low),
            offset=self.offset + (low - self.start[dim]) * self.strides[dim],
        )


def _put(values: tuple[int, ...], dim: int, value: int) -> tuple[int, ...]:
    return (*values[:dim], value, *values[dim + 1 :])


class StoredTensor:
    """Rectangles of checkpoint files that together fill a tensor of `shape` and `dtype` (torch's name)."""

    def __init__(self, shape: tuple[int, ...], dtype: str, boxes: tuple[_Box, ...]) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self._boxes = boxes

    @classmethod
    def of(cls, entry: TensorEntry) -> StoredTensor:
        """A tensor as it is stored."""
        item = DTYPE_BYTES.get(entry.dtype) or entry.nbytes // max(1, prod(entry.shape))
        strides = tuple(item * prod(entry.shape[dim + 1 :]) for dim in range(len(entry.shape)))
        box = _Box((0,) * len(entry.shape), entry.shape, entry.file, entry.offset, strides)
        return cls(entry.shape, entry.dtype, (box,))

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def files(self) -> tuple[int, ...]:
        """Numbers of the files that hold parts of it, in the order of their first part."""
        return tuple(dict.fromkeys(box.file for box in self._boxes))

    def size(self, dim: int) -> int:
        return self.shape[dim]

    def contiguous(self) -> StoredTensor:
        return self

    def squeeze(self, dim: int) -> StoredTensor:
        if self.shape[dim] != 1:
            return self
        boxes = (
            replace(b, start=_drop(b.start, dim), shape=_drop(b.shape, dim), strides=_drop(b.strides, dim))
            for b in self._boxes
        )
        return StoredTensor(_drop(self.shape, dim), self.dtype, tuple(boxes))

    def part(self, dim: int, first: int, last: int) -> StoredTensor:
        """Index [first, last) of `dim`."""
        boxes = (box.within(dim, first, last) for box in self._boxes)
        return StoredTensor(_put(self.shape, dim, last - first), self.dtype, tuple(b for b in boxes if b is not None))

    def unstack(self) -> list[StoredTensor]:
        """Its elements along the first dimension."""
        found: list[list[_Box]] = [[] for _ in range(self.shape[0])]
        for box in self._boxes:
            for index in range(box.start[0], box.start[0] + box.shape[0]):
                one = box.within(0, index, index + 1)
                assert one is not None
                found[index].append(
                    replace(one, start=one.start[1:], shape=one.shape[1:], strides=one.strides[1:]),
                )
        return [StoredTensor(tuple(self.shape[1:]), self.dtype, tuple(boxes)) for boxes in found]

    def blocks(self) -> list[StoredTensor]:
        """Parts along the first dimension that each lie in one piece in a file, as few as there are."""
        extents = self.extents()
        row = self.nbytes // self.shape[0] if self.ndim and self.shape[0] else self.nbytes
        if len(extents) <= 1 or any(extent.nbytes % row for extent in extents):
            return [self]
        parts, first = [], 0
        for extent in extents:
            parts.append(self.part(0, first, first + extent.nbytes // row))
            first += extent.nbytes // row
        return parts

    def extents(self) -> tuple[Extent, ...]:
        """File ranges whose concatenation is the tensor, row-major.

        Raises:
            NotExpressible: there are too many of them, as after a transposition.
        """
        found: list[Extent] = []
        for extent in self._runs(self._boxes, tuple(self.shape)):
            last = found[-1] if found else None
            if last is not None and (last.file, last.offset + last.nbytes) == (extent.file, extent.offset):
                found[-1] = Extent(last.file, last.offset, last.nbytes + extent.nbytes)
            else:
                found.append(extent)
            if len(found) > MOST_EXTENTS:
                raise NotExpressible(f"its bytes lie in more than {MOST_EXTENTS} separate ranges")
        return tuple(found)

    def _runs(self, boxes: Sequence[_Box], shape: tuple[int, ...]) -> Iterator[Extent]:
        item = DTYPE_BYTES[self.dtype]
        if not boxes or not prod(shape):
            return
        if len(boxes) == 1 and boxes[0].strides == tuple(item * prod(shape[d + 1 :]) for d in range(len(shape))):
            yield Extent(boxes[0].file, boxes[0].offset, item * prod(shape))
            return
        borders = sorted({b.start[0] for b in boxes} | {b.start[0] + b.shape[0] for b in boxes})
        for first, last in pairwise(borders):
            part = [b for box in boxes if (b := box.within(0, first, last)) is not None]
            if len(part) == 1 and len(borders) > 2:
                yield from self._runs(part, (last - first, *shape[1:]))
                continue
            for index in range(last - first):
                rows = [b for box in part if (b := box.within(0, index, index + 1)) is not None]
                rows = [replace(b, start=b.start[1:], shape=b.shape[1:], strides=b.strides[1:]) for b in rows]
                yield from self._runs(rows, shape[1:])

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        operation = _OPERATIONS.get(function)
        if operation is None:
            raise NotExpressible(f"{getattr(function, '__name__', function)} of stored tensors")
        return operation(*args, **(kwargs or {}))


def _drop(values: Sequence[int], dim: int) -> tuple[int, ...]:
    return (*values[:dim], *values[dim + 1 :])


def _cat(tensors: Sequence[StoredTensor], dim: int = 0) -> StoredTensor:
    first, boxes, done = tensors[0], [], 0
    for tensor in tensors:
        if tensor.dtype != first.dtype or _drop(tensor.shape, dim) != _drop(first.shape, dim):
            raise NotExpressible(f"{list(tensor.shape)} {tensor.dtype} beside {list(first.shape)} {first.dtype}")
        boxes += [replace(b, start=_put(b.start, dim, b.start[dim] + done)) for b in tensor._boxes]
        done += tensor.shape[dim]
    return StoredTensor(_put(tuple(first.shape), dim, done), first.dtype, tuple(boxes))


def _stack(tensors: Sequence[StoredTensor], dim: int = 0) -> StoredTensor:
    if dim != 0:
        raise NotExpressible(f"stack along dimension {dim}")
    stacked = []
    for tensor in tensors:
        boxes = (
            replace(b, start=(0, *b.start), shape=(1, *b.shape), strides=(b.strides[0] * b.shape[0], *b.strides))
            for b in tensor._boxes
        )
        stacked.append(StoredTensor((1, *tensor.shape), tensor.dtype, tuple(boxes)))
    return _cat(stacked)


def _split(tensor: StoredTensor, sizes: int | Sequence[int], dim: int = 0) -> tuple[StoredTensor, ...]:
    total = tensor.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - start) for start in range(0, total, sizes)]
    parts, first = [], 0
    for size in sizes:
        parts.append(tensor.part(dim, first, first + size))
        first += size
    return tuple(parts)


def _chunk(tensor: StoredTensor, chunks: int, dim: int = 0) -> tuple[StoredTensor, ...]:
    return _split(tensor, -(-tensor.shape[dim] // chunks), dim)


def _transpose(tensor: StoredTensor, dim0: int, dim1: int) -> StoredTensor:
    def swap(values: Sequence[int]) -> tuple[int, ...]:
        swapped = list(values)
        swapped[dim0], swapped[dim1] = swapped[dim1], swapped[dim0]
        return tuple(swapped)

    boxes = (replace(b, start=swap(b.start), shape=swap(b.shape), strides=swap(b.strides)) for b in tensor._boxes)
    return StoredTensor(swap(tensor.shape), tensor.dtype, tuple(boxes))


_OPERATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.cat: _cat,
    torch.stack: _stack,
    torch.split: _split,
    torch.chunk: _chunk,
    torch.transpose: _transpose,
}
