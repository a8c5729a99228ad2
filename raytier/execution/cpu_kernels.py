"""The kernels of `kernels/*.c` as functions on tensors: bf16, on the CPU, results in new memory.

`use` loads them; before, and where there are none, nothing fits. Whoever calls a kernel asks first whether it is made
for that (`fits_...`): `linears`, `fusion` and `attention`. Here are those that compute on activations alone;
`cpu_matmul` has linear layers, `cpu_layer` a whole decoder layer.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raytier.execution.native import Features, load_kernels

#: Rows that linear layers are made for: with dot products alone, and with tiles.
_DOT_ROWS, _TILE_ROWS = 8, 64
#: Of attention, see `decode_bf16.c`: query heads to a KV head, and numbers to a head.
MOST_GROUP, MOST_DIM = 32, 256

POINTER, LONG, INT, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "linear": (POINTER,) * 4 + (LONG,) + (INT,) * 2,
    "decode": (POINTER, LONG, LONG, POINTER, INT),
    "rms_norm": (POINTER,) * 3 + (LONG, LONG, FLOAT, INT),
    "silu_mul": (POINTER,) * 3 + (LONG, INT),
    "rotate": (POINTER,) * 6 + (LONG,) * 4 + (INT,),
    "attend": (POINTER,) * 6 + (INT,),
    "layer": (POINTER,) * 8 + (INT,) * 2,
}


class _Rows(ctypes.Structure):
    _fields_ = (("p", POINTER), ("token", LONG), ("head", LONG))


class Pool(ctypes.Structure):
    _fields_ = (("keys", POINTER), ("values", POINTER), ("head", LONG))


class Attend(ctypes.Structure):
    _fields_ = (
        ("slots", POINTER),
        ("tokens", LONG),
        ("heads", LONG),
        ("kv_heads", LONG),
        ("dim", LONG),
        ("spans", LONG),
        ("row", POINTER),
        ("runs_begin", POINTER),
        ("runs", POINTER),
        ("scale", FLOAT),
        ("sinks", POINTER),
        ("tiles", INT),
    )


class _Library:
    """Functions of the compiled library by their names without prefix and type."""

    def __init__(self, library: ctypes.CDLL, features: Features) -> None:
        self.tiles = Features.TILES_BF16 in features
        self.forms = Features.FORMS in features
        self.functions: dict[str, Any] = {}
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, f"raytier_{name}_bf16")
            function.argtypes, function.restype = arguments, None
            self.functions[name] = function
        self.work: dict[str, Any] = {}  # bytes of scratch that a kernel needs
        for name in ("linear", "layer"):
            function = getattr(library, f"raytier_{name}_work_bf16")
            function.argtypes, function.restype = (POINTER, LONG, INT, INT), LONG
            self.work[name] = function

    @property
    def most_rows(self) -> int:
        return _TILE_ROWS if self.tiles else _DOT_ROWS


_library: _Library | None = None


def use(cache_dir: str) -> bool:
    """Load the kernels, kept compiled in `cache_dir`; whether there are any here."""
    global _library
    if _library is None and (found := load_kernels(cache_dir)) is not None:
        _library = _Library(*found)
    return _library is not None


def available() -> bool:
    return _library is not None


def library() -> _Library | None:
    """What was loaded."""
    return _library


def _call(name: str, *arguments: object) -> None:
    assert _library is not None
    _library.functions[name](*arguments, torch.get_num_threads())


def is_plain(tensor: Tensor) -> bool:
    return tensor.dtype is torch.bfloat16 and tensor.device.type == "cpu"


def fits_rms_norm(hidden: Tensor, weight: Tensor) -> bool:
    return _library is not None and is_plain(hidden) and is_plain(weight) and hidden.shape[-1] % 16 == 0


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`weight * bf16(hidden / sqrt(mean(hidden^2) + eps))` of hidden `[..., dim]`, weight `[dim]`; in fp32 but for the
    two roundings."""
    hidden, dim = hidden.contiguous(), hidden.shape[-1]
    result = torch.empty_like(hidden)
    _call("rms_norm", hidden.data_ptr(), weight.data_ptr(), result.data_ptr(), hidden.numel() // dim, dim, eps)
    return result


def fits_silu_mul(gate: Tensor, up: Tensor) -> bool:
    return (
        _library is not None
        and is_plain(gate)
        and is_plain(up)
        and gate.numel() % 16 == 0
        and gate.is_contiguous()
        and up.is_contiguous()
    )


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """`bf16(silu(gate)) * up`, of one shape."""
    result = torch.empty_like(gate)
    _call("silu_mul", gate.data_ptr(), up.data_ptr(), result.data_ptr(), gate.numel())
    return result


def _rows(tensor: Tensor) -> _Rows:
    """`[1, heads, tokens, dim]` as the kernels take it."""
    _, head, token, _ = tensor.stride()
    return _Rows(tensor.data_ptr(), token, head)


def fits_rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
    dim = query.shape[-1]
    return (
        _library is not None
        and all(is_plain(t) and t.stride(-1) == 1 and t.shape[-1] == dim for t in (query, key, cos, sin))
        and query.shape[0] == key.shape[0] == 1
        and dim % 32 == 0
        and cos.shape == sin.shape == (1, query.shape[2], dim)
        and cos.is_contiguous()
        and sin.is_contiguous()
    )


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding, `x * cos + rotate_half(x) * sin` with every product rounded.

    query `[1, Hq, T, D]`, key `[1, Hkv, T, D]`, cos and sin `[1, T, D]`; results of the same shapes, in memory token by
    token.
    """
    _, heads, tokens, dim = query.shape
    kv_heads = key.shape[1]
    to_query, to_key = query.new_empty(1, tokens, heads, dim), key.new_empty(1, tokens, kv_heads, dim)
    _call(
        "rotate",
        ctypes.byref(_rows(query)),
        ctypes.byref(_rows(key)),
        cos.data_ptr(),
        sin.data_ptr(),
        to_query.data_ptr(),
        to_key.data_ptr(),
        tokens,
        heads,
        kv_heads,
        dim,
    )
    return to_query.transpose(1, 2), to_key.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Spans:
    """Single tokens that attend, and what each sees. All int64, on the CPU.

    Attributes:
        rows: `[n]` places in the packed batch.
        begin: `[n + 1]` where each one's runs begin in `runs`.
        runs: `[m, 2]` first slot and number of slots.
    """

    rows: Tensor
    begin: Tensor
    runs: Tensor

    @classmethod
    def of(cls, spans: Sequence[tuple[int, Sequence[tuple[int, int]]]]) -> Spans:
        """`spans` has for each token its place and its runs."""
        rows: list[int] = []
        begin = [0]
        runs: list[tuple[int, int]] = []
        for row, seen in spans:
            rows.append(row)
            runs.extend(seen)
            begin.append(len(runs))
        return cls(*(torch.tensor(numbers, dtype=torch.int64) for numbers in (rows, begin, runs)))


def fits_attend(query: Tensor, key: Tensor, value: Tensor, keys: Tensor) -> bool:
    """Whether `attend` is made for these; `keys` is a layer's pool."""
    heads, kv_heads, dim = query.shape[1], key.shape[1], query.shape[-1]
    return (
        _library is not None
        and all(is_plain(t) and t.stride(-1) == 1 for t in (query, key, value))
        and keys.dtype is torch.bfloat16
        and key.shape == value.shape
        and dim % 32 == 0
        and dim <= MOST_DIM
        and heads <= MOST_GROUP * kv_heads
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    pool: tuple[Tensor, Tensor],
    spans: Spans,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """Write new keys and values to their slots, then let single tokens attend: fp32 but for what comes in and goes out.

    Args:
        query: `[T, Hq, D]`, contiguous. key, value: `[1, Hkv, T, D]`.
        slots: `[T]` int64. pool: keys and values `[Hkv, slots, D]` of the layer.
        sinks: `[Hq]` in bf16, see `attention.attention_forward`.

    Returns:
        `[T, Hq, D]`; rows of tokens that are not in `spans` are not set.
    """
    result = torch.empty_like(query)
    order = attend_order(query.shape, key.shape[1], slots, spans, scale, sinks)
    _call(
        "attend",
        ctypes.byref(order),
        ctypes.byref(pool_of(pool)),
        query.data_ptr(),
        ctypes.byref(_rows(key)),
        ctypes.byref(_rows(value)),
        result.data_ptr(),
    )
    return result


def pool_of(pool: tuple[Tensor, Tensor]) -> Pool:
    keys, values = pool
    return Pool(keys.data_ptr(), values.data_ptr(), keys.stride(0))


def attend_order(
    shape: Sequence[int], kv_heads: int, slots: Tensor, spans: Spans, scale: float, sinks: Tensor | None
) -> Attend:
    assert _library is not None
    tokens, heads, dim = shape
    return Attend(
        slots.data_ptr(),
        tokens,
        heads,
        kv_heads,
        dim,
        len(spans.rows),
        spans.rows.data_ptr(),
        spans.begin.data_ptr(),
        spans.runs.data_ptr(),
        scale,
        sinks.data_ptr() if sinks is not None else None,
        _library.tiles,
    )
