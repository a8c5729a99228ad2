"""What a tier makes of a parameter: its form, and the codec of its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from raytier.codecs import coded, forms, planes
from raytier.codecs.codec import CODEC_VERSION, NONE, Codec
from raytier.codecs.forms import Bytes, Form
from raytier.codecs.planes import BYTES, ELEMENTS, Element

#: Source bytes that are converted at once.
_AT_ONCE = 4 << 20


@dataclass(frozen=True, slots=True)
class Scheme:
    """`form` None: the bytes of the checkpoint."""

    form: Form | None = None
    codec: Codec = NONE

    @property
    def plain(self) -> bool:
        """Whether files hold the bytes of the checkpoint."""
        return self.form is None and self.codec.name == "none"

    def __str__(self) -> str:
        return f"{self.form.name if self.form is not None else 'source'}+{self.codec}"

    @property
    def version(self) -> str:
        """What files say about themselves: those of another version are made anew."""
        return f"{self}/{CODEC_VERSION}"


PLAIN = Scheme()


def use_kernels(cache_dir: str) -> None:
    """Have what forms and codecs have in C in this process, compiled and kept in `cache_dir`, as far as possible."""
    planes.use_kernels(cache_dir)
    coded.use_kernels(cache_dir)
    forms.use_kernels(cache_dir)


def element_of(form: Form | None, dtype: str) -> Element:
    """What the bytes of a parameter of `dtype` consist of in this form."""
    plain = dtype if form is None else form.dtype
    return ELEMENTS.get(plain, BYTES) if plain is not None else BYTES


def form_parts(
    form: Form | None, read: Callable[[int, int], Bytes], nbytes: int, dtype: str, shape: Sequence[int]
) -> Iterator[Bytes]:
    """The bytes of a parameter in a form, part by part: as `Form.encode` of the whole, in a few megabytes of memory.

    Args:
        read: gives bytes [start, stop) of the parameter's `nbytes` in the checkpoint, valid until the next call.

    Raises:
        DoesNotShrinkError, RuntimeError: see `Form.encode`; nothing has been given out then.
    """
    if form is not None and form.coded:  # one piece, of which nobody knows the size before it is made
        yield form.encode(read(0, nbytes), dtype, shape)
        return
    if form is None or form.dtype == dtype:
        for start in range(0, nbytes, _AT_ONCE):
            yield read(start, min(nbytes, start + _AT_ONCE))
        return
    if form.dtype is not None:
        item = nbytes // max(1, prod(shape))
        for start in range(0, nbytes, _AT_ONCE):
            part = read(start, min(nbytes, start + _AT_ONCE))
            yield form.encode(part, dtype, (part.size // item,))
        return
    # Rows are encoded each by itself, sixteen at least; those of int8 have their scales behind all numbers.
    rows, columns = shape
    row = nbytes // rows
    step = max(16, _AT_ONCE // row // 16 * 16)
    scales: list[Bytes] = []
    for first in range(0, rows, step):
        last = min(rows, first + step)
        coded = form.encode(read(first * row, last * row), dtype, (last - first, columns))
        numbers = len(coded) if form.group else (last - first) * columns
        scales.append(coded[numbers:].copy())
        yield coded[:numbers]
    yield np.concatenate(scales)
