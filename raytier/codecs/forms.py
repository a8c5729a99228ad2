"""Forms: how the bytes of a parameter look where it is computed on.

A form says that for a matrix `[rows, columns]`; its bytes are one piece, without what a file may add (codecs do that).
Kernels compute on them as they are (`execution/kernels/linear_forms.c` knows the layouts). Every form decodes to the
weight that `F.linear` would have to be given for the same result, up to rounding and the order of summation. What is
used by parts of its rows (an output head that streams in chunks) is encoded by such parts, each one piece.

- plain: elements of a dtype, row-major, as safetensors has them.
- `bf16-coded`: lossless, see `coded`; how many bytes depends on the weights.
- `int8`, `int8-dynamic`: numbers -127..127 row-major, padding to 64 bytes, then a scale per row in fp32; weight =
  scale * number. The two differ in what kernels do with activations.
- `int4-32`, `int4-64`, `int4-128`: each row by itself, in blocks of 64 (of 128 with groups of 128) columns: for every
  group of columns a scale and a minimum in bf16, then 32 bytes for each 64 columns, whose low halves are the first 32
  columns and whose high halves the others; weight = minimum + scale * number.
"""

from __future__ import annotations

import ctypes
import logging
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raytier.codecs import coded
from raytier.codecs.native import CODECS
from raytier.errors import ConfigurationError

logger = logging.getLogger(__name__)

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

#: Dtypes by the names that configurations use for them, and their bytes per element.
_PLAIN = {"fp32": ("float32", 4), "fp16": ("float16", 2), "bf16": ("bfloat16", 2)}
INT4_GROUPS = (32, 64, 128)
#: Weights that are converted at once: what is computed on them stays in a core's cache.
_AT_ONCE = 2**16
_LEVELS = 15
_kernels: dict[str, Any] = {}
#: Norm of the error over the norm of the weights, where these are normally distributed, as trained ones nearly are.
_ERRORS = {"int8": 0.0087, "int8-dynamic": 0.0087, "int4-32": 0.0733, "int4-64": 0.0846, "int4-128": 0.0936}
#: The same of rounding fp32 to what has fewer digits.
_ROUNDING = {"fp16": 0.0002, "bf16": 0.0017}
#: How much of a group's range the numbers may cover; what is outside is clipped.
_RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True, slots=True)
class Form:
    """A form by its name; `FORMS` has all of them.

    Attributes:
        dtype: of the elements, where they are plain (torch's name without the prefix: `bfloat16`), else None.
        group: columns that share a scale; 0 where a whole row does.
    """

    name: str
    dtype: str | None = None
    group: int = 0

    @property
    def coded(self) -> bool:
        return self.name == "bf16-coded"

    @property
    def dynamic(self) -> bool:
        """Whether activations are computed in 8 bits as well."""
        return self.name == "int8-dynamic"

    def rounds(self, dtype: str) -> bool:
        """Whether weights of `dtype` may not be what they were."""
        return not self.coded and self.dtype not in (dtype, "float32")

    def typical_error(self, dtype: str) -> float:
        """Relative error (root of the mean square) of normally distributed weights of `dtype` in this form."""
        if dtype == "float32" and self.name in _ROUNDING:
            return _ROUNDING[self.name]
        return _ROUNDING["bf16"] if dtype == "float16" and self.dtype == "bfloat16" else _ERRORS.get(self.name, 0.0)

    def fits(self, shape: Sequence[int]) -> bool:
        """Whether a parameter of this shape can have the form: everything can be plain, the others are for matrices."""
        return self.dtype is not None or (len(shape) == 2 and shape[0] % 16 == shape[1] % max(64, self.group) == 0)

    def nbytes(self, shape: Sequence[int]) -> int | None:
        """Bytes of a parameter that `fits`; None where they depend on its weights."""
        if self.coded:
            return None
        if self.dtype is not None:
            return prod(shape) * _PLAIN[self.name][1]
        rows, columns = shape
        if self.group:
            return rows * columns // 64 * self._block_bytes * 64 // self._block
        return _padded(rows * columns) + 4 * rows

    @property
    def _block(self) -> int:
        return max(64, self.group)

    @property
    def _block_bytes(self) -> int:
        return 4 * (self._block // self.group) + self._block // 2

    def encode(self, source: Bytes, dtype: str, shape: Sequence[int]) -> Bytes:
        """The bytes of a parameter in this form.

        Args:
            source: its elements, row-major. dtype: of those (`float32`, `bfloat16`, `float16`).

        Raises:
            ValueError: it has no such form, or `source` has not the bytes that it should have.
            DoesNotShrinkError: coded, it would be no smaller. RuntimeError: see `coded.use_kernels`.
        """
        if not self.fits(shape):
            raise ValueError(f"a parameter of shape {tuple(shape)} has no form {self.name}")
        if source.size != prod(shape) * _itemsize(dtype):
            raise ValueError(f"{source.size} bytes for a parameter of shape {tuple(shape)} in {dtype}")
        if self.dtype == dtype:
            return source
        if self.coded and dtype == "bfloat16":
            return coded.encode(source, *shape)
        weights = to_float(source, dtype)
        if self.coded or self.dtype is not None:
            rounded = _from_float(weights, self.dtype or "bfloat16")
            return coded.encode(rounded, *shape) if self.coded else rounded
        weights = weights.reshape(tuple(shape))
        return self._encode_int4(weights) if self.group else _encode_int8(weights)

    def decode(self, data: Bytes, shape: Sequence[int], start: int = 0, stop: int | None = None) -> Floats:
        """The weights of rows [start, stop) of a parameter of shape `shape` whose bytes in this form are `data`."""
        if self.dtype is not None:
            return to_float(data, self.dtype).reshape(tuple(shape))[start:stop]
        rows, columns = shape
        count = (rows if stop is None else stop) - start
        if self.coded:
            return to_float(coded.decode(data, start, count, columns), "bfloat16").reshape(count, columns)
        if not self.group:
            numbers, scales = self.integers(data, shape)
            return numbers[start:stop] * scales[start:stop, None]
        blocks = data.reshape(rows, columns // self._block, self._block_bytes)[start:stop]
        head = 4 * (self._block // self.group)
        scale, least = _pairs(blocks[..., :head])
        packed = blocks[..., head:].reshape(count, columns // 64, 32)
        numbers4 = np.concatenate((packed & 15, packed >> 4), axis=2).reshape(count, columns // self.group, self.group)
        return (scale.reshape(count, -1, 1) * numbers4 + least.reshape(count, -1, 1)).reshape(count, columns)

    def integers(self, data: Bytes, shape: Sequence[int]) -> tuple[NDArray[np.int8], Floats]:
        """Numbers `[rows, columns]` and scales `[rows]` of one of the forms in 8 bits: views of `data`."""
        rows, columns = shape
        scales: Floats = data[_padded(rows * columns) :].view(np.float32)
        return data[: rows * columns].view(np.int8).reshape(rows, columns), scales

    def _encode_int4(self, weights: Floats) -> Bytes:
        rows, columns = weights.shape
        groups = weights.reshape(-1, self.group)
        numbers = np.empty(groups.shape, np.uint8)
        pairs = np.empty((len(groups), 4), np.uint8)
        step = max(1, _AT_ONCE // self.group)
        for start in range(0, len(groups), step):
            part = slice(start, start + step)
            pairs[part], numbers[part] = _fit_int4(groups[part])
        halves = numbers.reshape(rows, columns // 64, 2, 32)
        packed = (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(rows, columns // self._block, self._block // 2)
        heads = pairs.reshape(rows, columns // self._block, -1)
        return np.concatenate((heads, packed), axis=2).reshape(-1)


def use_kernels(cache_dir: str) -> None:
    """Quantise in C, compiled and kept in `cache_dir`, where that is possible."""
    try:
        function = CODECS.load(cache_dir).raytier_fit_int4
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("weights are quantised by numpy, more slowly: %s", error)
        return
    pointer, number = ctypes.c_void_p, ctypes.c_long
    function.argtypes, function.restype = (pointer, number, number, pointer, pointer), None
    _kernels["fit_int4"] = function


def _padded(nbytes: int) -> int:
    return -(-nbytes // 64) * 64


def _itemsize(dtype: str) -> int:
    return next(size for name, size in _PLAIN.values() if name == dtype)


def to_float(data: Bytes, dtype: str) -> Floats:
    """Elements of `float32`, `float16` or `bfloat16` as fp32, flat."""
    if dtype == "bfloat16":
        wide: Floats = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        return wide
    elements: NDArray[np.floating[Any]] = data.view(dtype)
    return elements.astype(np.float32)


def _from_float(weights: Floats, dtype: str) -> Bytes:
    """Rounded to nearest, ties to even, NaN kept."""
    flat = np.ascontiguousarray(weights).reshape(-1)
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return flat.astype(dtype).view(np.uint8)
    bits = flat.view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    nan = np.isnan(flat)
    if nan.any():
        rounded[nan] = (bits[nan] >> 16).astype(np.uint16) | 0x40
    return rounded.view(np.uint8)


def _pairs(heads: Bytes) -> tuple[Floats, Floats]:
    """Scales and minima `[...]` of headers `[..., 4 * groups]`."""
    values = to_float(np.ascontiguousarray(heads).reshape(-1), "bfloat16").reshape(-1, 2)
    return values[:, 0], values[:, 1]


def _encode_int8(weights: Floats) -> Bytes:
    rows, columns = weights.shape
    data = np.zeros(_padded(rows * columns) + 4 * rows, np.uint8)
    numbers = data[: rows * columns].view(np.int8).reshape(rows, columns)
    scales = np.abs(weights).max(axis=1) / np.float32(127)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    step = max(1, _AT_ONCE // columns)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        numbers[part] = np.rint(weights[part] * inverse[part, None])
    data[_padded(rows * columns) :] = scales.view(np.uint8)
    return data


def _fit_int4(groups: Floats) -> tuple[Bytes, Bytes]:
    """Pairs of scale and minimum `[n, 4]` and numbers `[n, group]` with a small squared error.

    For several ranges numbers are assigned and scale and minimum fitted to them by least squares; the best of these
    are rounded to bf16 and numbers assigned for the last time.
    """
    if "fit_int4" in _kernels:
        count, group = groups.shape
        pairs, numbers = np.empty((count, 4), np.uint8), np.empty((count, group), np.uint8)
        source = np.ascontiguousarray(groups)
        _kernels["fit_int4"](source.ctypes.data, count, group, pairs.ctypes.data, numbers.ctypes.data)
        return pairs, numbers
    return _fit_int4_slowly(groups)


def _fit_int4_slowly(groups: Floats) -> tuple[Bytes, Bytes]:
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    best: tuple[Floats, Floats] | None = None
    error = np.full(low.shape, np.inf, np.float32)
    for part in _RANGES:
        scale, least = _least_squares(groups, _assign(groups, (high - low) * (part / _LEVELS), low * part))
        found = np.square(groups - scale * _assign(groups, scale, least) - least).sum(axis=1, keepdims=True)
        if best is None:
            best, error = (scale, least), found
        else:
            better = found < error
            best = np.where(better, scale, best[0]), np.where(better, least, best[1])
            error = np.minimum(found, error)
    assert best is not None
    packed = _from_float(np.concatenate(best, axis=1), "bfloat16").reshape(-1, 4)
    rounded = to_float(packed.reshape(-1), "bfloat16").reshape(-1, 2)
    return packed, _assign(groups, rounded[:, :1], rounded[:, 1:]).astype(np.uint8)


def _assign(groups: Floats, scale: Floats, least: Floats) -> Floats:
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    numbers: Floats = np.clip(np.rint((groups - least) * inverse), 0, _LEVELS)
    return numbers


def _least_squares(groups: Floats, numbers: Floats) -> tuple[Floats, Floats]:
    """Scale and minimum for which scale * numbers + minimum is nearest to the groups."""
    mean, centre = numbers.mean(axis=1, keepdims=True), groups.mean(axis=1, keepdims=True)
    spread = np.square(numbers - mean).sum(axis=1, keepdims=True)
    joint = ((numbers - mean) * (groups - centre)).sum(axis=1, keepdims=True)
    scale = np.divide(joint, spread, out=np.zeros_like(joint), where=spread > 0)
    return scale, centre - scale * mean


FORMS: dict[str, Form] = {
    **{name: Form(name, dtype) for name, (dtype, _) in _PLAIN.items()},
    "bf16-coded": Form("bf16-coded"),
    "int8": Form("int8"),
    "int8-dynamic": Form("int8-dynamic"),
    **{f"int4-{group}": Form(f"int4-{group}", group=group) for group in INT4_GROUPS},
}


def form_of(name: str) -> Form:
    """The form of that name.

    Raises:
        ConfigurationError: there is none; the message names those that are.
    """
    if name not in FORMS:
        raise ConfigurationError(f"{name!r} is no precision; there are source, {', '.join(FORMS)}")
    return FORMS[name]
