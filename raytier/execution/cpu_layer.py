"""A whole decoder layer of the kind that Llama, Mistral and Qwen have, for a decode step in bf16 on the CPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from raytier.execution.cpu_kernels import (
    FLOAT,
    LONG,
    MOST_DIM,
    MOST_GROUP,
    POINTER,
    Spans,
    attend_order,
    is_plain,
    library,
    pool_of,
)
from raytier.execution.cpu_matmul import Matrix, by_tiles, computes_on
from raytier.execution.formed import Weight

_PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, Matrix) for name in _PROJECTIONS),
        *((name, POINTER) for name in ("before", "after", "q_norm", "k_norm")),
        *((name, FLOAT) for name in ("before_eps", "after_eps", "q_eps", "k_eps")),
        ("hidden", LONG),
    )


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """A decoder layer as `layer` computes it.

    Attributes:
        projections: weight `[out, in]` and bias of each of q, k, v, o, gate, up, down.
        norms: weight and epsilon of those before attention and after it `[hidden]`, and of the heads of queries and
            keys `[D]` where there are any.
    """

    projections: tuple[tuple[Weight, Tensor | None], ...]
    norms: tuple[tuple[Tensor, float] | None, ...]


def fits_layer(
    hidden: Tensor, weights: LayerWeights, pool: tuple[Tensor, Tensor], rotation: tuple[Tensor, Tensor]
) -> bool:
    """Whether `layer` is made for these."""
    kernels = library()
    if kernels is None or not is_plain(hidden) or not hidden.is_contiguous() or hidden.shape[0] != 1:
        return False
    keys, values = pool
    dim, tokens = keys.shape[-1], hidden.shape[1]
    (q, _), (k, _) = weights.projections[:2]
    return (
        0 < tokens <= kernels.most_rows
        and keys.dtype is torch.bfloat16
        and values.shape == keys.shape
        and dim % 32 == 0
        and dim <= MOST_DIM
        and q.shape[0] <= MOST_GROUP * k.shape[0]
        and all(is_plain(part) and part.is_contiguous() and part.shape == (1, tokens, dim) for part in rotation)
        and all(computes_on(weight) and weight.shape[0] % 32 == 0 for weight, _ in weights.projections)
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
    kernels = library()
    assert kernels is not None
    _, tokens, width = hidden.shape
    threads, tiles = torch.get_num_threads(), by_tiles(tokens, *(weight for weight, _ in weights.projections))
    order = _Layer()
    for name, (weight, bias) in zip(_PROJECTIONS, weights.projections, strict=True):
        setattr(order, name, Matrix.of(weight, bias))
    for name, norm in zip(("before", "after", "q_norm", "k_norm"), weights.norms, strict=True):
        if norm is not None:
            setattr(order, name, norm[0].data_ptr())
            setattr(order, f"{name.removesuffix('_norm')}_eps", norm[1])
    order.hidden = width
    dim = pool[0].shape[-1]
    heads, kv_heads = (weights.projections[i][0].shape[0] // dim for i in (0, 1))
    cos, sin = rotation
    work = torch.empty(kernels.work["layer"](ctypes.byref(order), tokens, threads, tiles), dtype=torch.uint8)
    result = torch.empty_like(hidden)
    kernels.functions["layer"](
        ctypes.byref(order),
        ctypes.byref(attend_order((tokens, heads, dim), kv_heads, slots, spans, scale, None)),
        ctypes.byref(pool_of(pool)),
        hidden.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        result.data_ptr(),
        work.data_ptr(),
        threads,
        tiles,
    )
    return result
