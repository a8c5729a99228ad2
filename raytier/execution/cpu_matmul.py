"""Linear layers in bf16 on the CPU by kernels of our own, on plain weights and on those of other forms."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from raytier.execution.cpu_kernels import INT, LONG, POINTER, is_plain, library
from raytier.execution.formed import FormedWeight, Weight

#: Numbers of the forms in `kernels/bf16.h`.
_CODES = {"bf16-coded": 1, "int8": 2, "int4-32": 3, "int4-64": 4, "int4-128": 5, "int8-dynamic": 6}
#: Up to so many rows dot products are faster than tiles: with plain weights, and with others.
_DOT_BEST, _DOT_BEST_FORMED = 4, 2


class Matrix(ctypes.Structure):
    """A weight with its bias as the kernels take it."""

    _fields_ = (("data", POINTER), ("bias", POINTER), ("outputs", LONG), ("inputs", LONG), ("form", INT))

    @classmethod
    def of(cls, weight: Weight, bias: Tensor | None) -> Matrix:
        data, code = (weight.data, _CODES[weight.form.name]) if isinstance(weight, FormedWeight) else (weight, 0)
        return cls(data.data_ptr(), bias.data_ptr() if bias is not None else None, *weight.shape, code)


def computes_on(weight: Weight) -> bool:
    """Whether the kernels are made for a weight: plain bf16 or a form, in whole blocks."""
    kernels = library()
    if kernels is None:
        return False
    if isinstance(weight, FormedWeight):
        return kernels.forms and weight.form.name in _CODES
    outputs, inputs = weight.shape
    return is_plain(weight) and weight.is_contiguous() and inputs % 32 == outputs % 16 == 0


def by_tiles(rows: int, *weights: Weight) -> bool:
    """Whether so many rows are computed by tiles."""
    kernels = library()
    plain = not any(isinstance(weight, FormedWeight) for weight in weights)
    return kernels is not None and kernels.tiles and rows > (_DOT_BEST if plain else _DOT_BEST_FORMED)


def fits_linear(hidden: Tensor, weight: Weight) -> bool:
    """Whether `linear` is made for `F.linear(hidden, weight)`."""
    kernels = library()
    if kernels is None or not is_plain(hidden) or not computes_on(weight):
        return False
    return 0 < hidden.numel() // weight.shape[1] <= kernels.most_rows


def linear(hidden: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
    """`F.linear` of hidden `[..., in]`, weight `[out, in]`, bias `[out]`, up to rounding and the order of summation."""
    kernels = library()
    assert kernels is not None
    hidden = hidden.contiguous()
    outputs, inputs = weight.shape
    rows = hidden.numel() // inputs
    result = hidden.new_empty(*hidden.shape[:-1], outputs)
    tiles, threads = by_tiles(rows, weight), torch.get_num_threads()
    matrix = ctypes.byref(Matrix.of(weight, bias))
    scratch = torch.empty(kernels.work["linear"](matrix, rows, threads, tiles), dtype=torch.uint8)
    kernels.functions["linear"](hidden.data_ptr(), matrix, result.data_ptr(), scratch.data_ptr(), rows, threads, tiles)
    return result


def decode(weight: FormedWeight, first: int, count: int) -> Tensor:
    """Rows [first, first + count) of a weight that `computes_on`, in bf16 `[count, in]`."""
    kernels = library()
    assert kernels is not None
    rows = torch.empty(count, weight.shape[1], dtype=torch.bfloat16)
    matrix = ctypes.byref(Matrix.of(weight, None))
    kernels.functions["decode"](matrix, first, count, rows.data_ptr(), torch.get_num_threads())
    return rows
