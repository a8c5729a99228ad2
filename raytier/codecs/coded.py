"""bf16 with coded exponents: lossless, about 0.7 of the size, computed on as it is. Layout: `kernels/coded.c`."""

from __future__ import annotations

import ctypes
import logging
import subprocess
from typing import Any

import numpy as np
import numpy.typing as npt

from raytier.codecs.native import CODECS, cpu_flags

logger = logging.getLogger(__name__)

Bytes = npt.NDArray[np.uint8]

#: What the encoder is made of, and the kernels that compute on what it makes.
_NEEDED = frozenset({"avx512bw", "avx512_vbmi2", "avx512vbmi", "avx512_vnni", "avx512_bf16"})
_functions: dict[str, Any] = {}


class DoesNotShrinkError(ValueError):
    """The weights have too many different exponents: coded they would be no smaller."""


def use_kernels(cache_dir: str) -> bool:
    """Load encoder and decoder, compiled and kept in `cache_dir`; whether this machine can use coded weights."""
    if not cpu_flags() >= _NEEDED:
        return False
    if not _functions:
        try:
            library = CODECS.load(cache_dir)
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("weights cannot be coded here: %s", error)
            return False
        pointer, number = ctypes.c_void_p, ctypes.c_long
        encoder, decoder = library.raytier_coded_encode, library.raytier_coded_decode
        encoder.argtypes, encoder.restype = (pointer, number, number, pointer, number), number
        decoder.argtypes, decoder.restype = (pointer, number, number, number, pointer), None
        _functions.update(encode=encoder, decode=decoder)
    return True


def encode(weights: Bytes, rows: int, columns: int) -> Bytes:
    """bf16 `[rows, columns]` coded; `columns` is a multiple of 64.

    Raises:
        DoesNotShrinkError: the result would not be smaller.
        RuntimeError: `use_kernels` was not called, or this machine has none.
    """
    room = np.empty(weights.size, np.uint8)
    source = np.ascontiguousarray(weights)
    taken = _function("encode")(source.ctypes.data, rows, columns, room.ctypes.data, room.size)
    if taken < 0:
        raise DoesNotShrinkError(f"{rows} x {columns} weights are no smaller with coded exponents")
    return room[:taken].copy()


def decode(data: Bytes, first: int, count: int, columns: int) -> Bytes:
    """Rows [first, first + count) of the bf16 weights that were coded, as bytes; raises RuntimeError as `encode`."""
    weights = np.empty(2 * count * columns, np.uint8)
    _function("decode")(np.ascontiguousarray(data).ctypes.data, first, count, columns, weights.ctypes.data)
    return weights


def _function(name: str) -> Any:
    if name not in _functions:
        raise RuntimeError("no kernels for coded weights: call use_kernels first, on a processor that has AVX512 VBMI2")
    return _functions[name]
