"""The kernels of `kernels/*.c` as functions on tensors: bf16, on the CPU, results in new memory.

`use` loads them; before, and where there are none, nothing fits. Whoever calls a kernel asks first whether it is made
for that (`fits_...`): `linears`, `fusion` and `attention`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raytier.execution.native import Features, load_kernels

#: Rows that linear layers are made for: with dot products alone, and with tiles; up to so many dot products are faster.
_DOT_ROWS, _TILE_ROWS, _DOT_BEST = 8, 64, 4
#: Of attention, see `decode_bf16.c`: query heads to a KV head, and numbers to a head.
_MOST_GROUP, _MOST_DIM = 32, 256

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
_ARGUMENTS = {
    "linear": (_POINTER,) * 5 + (_LONG,) * 3 + (_INT,) * 2,
    "rms_norm": (_POINTER,) * 3 + (_LONG, _LONG, _FLOAT, _INT),
    "silu_mul": (_POINTER,) * 3 + (_LONG, _INT),
    "rotate": (_POINTER,) * 6 + (_LONG,) * 4 + (_INT,),
    "attend": (_POINTER,) * 6 + (_INT,),
    "layer": (_POINTER,) * 8 + (_INT,) * 2,
}


class _Rows(ctypes.Structure):
    _fields_ = (("p", _POINTER), ("token", _LONG), ("head", _LONG))


class _Pool(ctypes.Structure):
    _fields_ = (("keys", _POINTER), ("values", _POINTER), ("head", _LONG))


class _Attend(ctypes.Structure):
    _fields_ = (
        ("slots", _POINTER),
        ("tokens", _LONG),
        ("heads", _LONG),
        ("kv_heads", _LONG),
        ("dim", _LONG),
        ("spans", _LONG),
        ("row", _POINTER),
        ("runs_begin", _POINTER),
        ("runs", _POINTER),
        ("scale", _FLOAT),
        ("sinks", _POINTER),
        ("tiles", _INT),
    )


class _Projection(ctypes.Structure):
    _fields_ = (("weight", _POINTER), ("bias", _POINTER), ("outputs", _LONG))


_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Projection) for name in _PROJECTIONS),
        *((name, _POINTER) for name in ("before", "after", "q_norm", "k_norm")),
        *((name, _FLOAT) for name in ("before_eps", "after_eps", "q_eps", "k_eps")),
        ("hidden", _LONG),
    )


class _Library:
    """Functions of the compiled library by their names without prefix and type."""

    def __init__(self, library: ctypes.CDLL, features: Features) -> None:
        self.tiles = Features.TILES_BF16 in features
        self.functions: dict[str, Any] = {}
        for name, arguments in _ARGUMENTS.items():
            function = getattr(library, f"raytier_{name}_bf16")
            function.argtypes, function.restype = arguments, None
            self.functions[name] = function
        self.layer_work = library.raytier_layer_work_bf16
        self.layer_work.argtypes, self.layer_work.restype = (_POINTER, _LONG, _INT), _LONG

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


def _call(name: str, *arguments: object) -> None:
    assert _library is not None
    _library.functions[name](*arguments, torch.get_num_threads())


def _plain(tensor: Tensor) -> bool:
    return tensor.dtype is torch.bfloat16 and tensor.device.type == "cpu"


def fits_linear(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `linear` is made for `F.linear(hidden, weight)`."""
    if _library is None or weight.dtype is not torch.bfloat16 or not _plain(hidden):
        return False
    outputs, inputs = weight.shape
    return (
        0 < hidden.numel() // inputs <= _library.most_rows
        and inputs % 32 == outputs % 16 == 0
        and weight.device.type == "cpu"
        and weight.is_contiguous()
    )


def linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear` of hidden `[..., in]`, weight `[out, in]`, bias `[out]`, up to the order of summation."""
    assert _library is not None
    hidden = hidden.contiguous()
    outputs, inputs = weight.shape
    rows = hidden.numel() // inputs
    result = hidden.new_empty(*hidden.shape[:-1], outputs)
    tiles = _library.tiles and rows > _DOT_BEST
    threads = torch.get_num_threads()
    arranged = 16 if rows <= 16 else 32 if rows <= 32 else 64
    scratch = hidden.new_empty(threads * arranged * inputs) if tiles else hidden
    _library.functions["linear"](
        hidden.data_ptr(),
        weight.data_ptr(),
        bias.data_ptr() if bias is not None else None,
        result.data_ptr(),
        scratch.data_ptr(),
        rows,
        outputs,
        inputs,
        threads,
        tiles,
    )
    return result


def fits_rms_norm(hidden: Tensor, weight: Tensor) -> bool:
    return _library is not None and _plain(hidden) and _plain(weight) and hidden.shape[-1] % 16 == 0


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
        and _plain(gate)
        and _plain(up)
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
        and all(_plain(t) and t.stride(-1) == 1 and t.shape[-1] == dim for t in (query, key, cos, sin))
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
        and all(_plain(t) and t.stride(-1) == 1 for t in (query, key, value))
        and keys.dtype is torch.bfloat16
        and key.shape == value.shape
        and dim % 32 == 0
        and dim <= _MOST_DIM
        and heads <= _MOST_GROUP * kv_heads
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
    order = _attend_order(query.shape, key.shape[1], slots, spans, scale, sinks)
    _call(
        "attend",
        ctypes.byref(order),
        ctypes.byref(_pool(pool)),
        query.data_ptr(),
        ctypes.byref(_rows(key)),
        ctypes.byref(_rows(value)),
        result.data_ptr(),
    )
    return result


def _pool(pool: tuple[Tensor, Tensor]) -> _Pool:
    keys, values = pool
    return _Pool(keys.data_ptr(), values.data_ptr(), keys.stride(0))


def _attend_order(
    shape: Sequence[int], kv_heads: int, slots: Tensor, spans: Spans, scale: float, sinks: Tensor | None
) -> _Attend:
    assert _library is not None
    tokens, heads, dim = shape
    return _Attend(
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


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A decoder layer as `layer` computes it.

    Attributes:
        projections: weight `[out, in]` and bias of each of q, k, v, o, gate, up, down.
        norms: weight and epsilon of those before attention and after it `[hidden]`, and of the heads of queries and
            keys `[D]` where there are any.
    """

    projections: tuple[tuple[Tensor, Tensor | None], ...]
    norms: tuple[tuple[Tensor, float] | None, ...]


def fits_layer(
    hidden: Tensor, weights: LayerWeights, pool: tuple[Tensor, Tensor], rotation: tuple[Tensor, Tensor]
) -> bool:
    """Whether `layer` is made for these."""
    if _library is None or not _plain(hidden) or not hidden.is_contiguous() or hidden.shape[0] != 1:
        return False
    keys, values = pool
    dim, tokens = keys.shape[-1], hidden.shape[1]
    (q, _), (k, _) = weights.projections[:2]
    return (
        0 < tokens <= _library.most_rows
        and keys.dtype is torch.bfloat16
        and values.shape == keys.shape
        and dim % 32 == 0
        and dim <= _MOST_DIM
        and q.shape[0] <= _MOST_GROUP * k.shape[0]
        and all(_plain(part) and part.is_contiguous() and part.shape == (1, tokens, dim) for part in rotation)
        and all(
            _plain(weight) and weight.is_contiguous() and weight.shape[1] % 32 == weight.shape[0] % 32 == 0
            for weight, _ in weights.projections
        )
    )


def layer(
    hidden: Tensor,
    weights: LayerWeights,
    rotation: tuple[Tensor, Tensor],
    slots: Tensor,
    pool: tuple[Tensor, Tensor],
    spans: Spans,
    scale: float,
) -> Tensor:
    """A decoder layer for a step of single tokens: hidden `[1, T, hidden]`, of that shape again.

    Args:
        rotation: cos and sin `[1, T, D]`. The others as for `attend`; every token is in `spans`.
    """
    assert _library is not None
    _, tokens, width = hidden.shape
    threads = torch.get_num_threads()
    order = _Layer()
    for name, (weight, bias) in zip(_PROJECTIONS, weights.projections, strict=True):
        bias_at = bias.data_ptr() if bias is not None else None
        setattr(order, name, _Projection(weight.data_ptr(), bias_at, weight.shape[0]))
    for name, norm in zip(("before", "after", "q_norm", "k_norm"), weights.norms, strict=True):
        if norm is not None:
            setattr(order, name, norm[0].data_ptr())
            setattr(order, f"{name.removesuffix('_norm')}_eps", norm[1])
    order.hidden = width
    dim = pool[0].shape[-1]
    heads, kv_heads = (weights.projections[i][0].shape[0] // dim for i in (0, 1))
    cos, sin = rotation
    work = hidden.new_empty(_library.layer_work(ctypes.byref(order), tokens, threads))
    result = torch.empty_like(hidden)
    _library.functions["layer"](
        ctypes.byref(order),
        ctypes.byref(_attend_order((tokens, heads, dim), kv_heads, slots, spans, scale, None)),
        ctypes.byref(_pool(pool)),
        hidden.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        result.data_ptr(),
        work.data_ptr(),
        threads,
        _library.tiles and tokens > _DOT_BEST,
    )
    return result
