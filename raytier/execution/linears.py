"""Linear layers on a CPU whose weights oneDNN has packed: the layout its kernels read, instead of rows.

A packed weight is a cache of the plain one: new memory, as large as the plain weight (up to padding), usable on
this machine in this process only, and never written to a file.

Measured with the matrices of a 1.1 B Llama, bytes of weights per second over those of `F.linear`:

- bf16 with AMX, packed for few rows: 1.25x at 1 to 16 rows, 0.97x at 32, 1.1x at 64, 0.95x from 256 on; packed for
  many rows: 1.1x at 1, 1.15x at 8 and 16, 1.06x at 32, 1.2x from 64 on. At 16 rows and below, the first is the memory's
  own rate.
- bf16 with AVX512 alone has one layout: 1.3x at 1 row, 1.4x at 8, 1.15x at 32, 1.07x at 64.
- fp32: 2x at 4 and 8 rows, 1.7x at 16, 1.1 to 1.3x from 32 on, 0.95x at 1. fp16: up to 1.2x below 8 rows, else no gain.

Huge pages (`THP_MEM_ALLOC_ENABLE=1` before torch is imported) take a tenth of the page faults and half of the
processor time off packing, and make the packed weights 1.05 to 1.2x as fast to read.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

#: Up to so many rows the layout for one row is the better one, above the one for many.
_FEW_ROWS = 16
#: A shape for the probe with more than one of a kernel's blocks in each direction, and a remainder.
_PROBE_OUT, _PROBE_IN = 80, 48


class _PackedForward:
    """The forward of a bound module. The bias is looked up when called: it may be bound later, or brought anew."""

    __slots__ = ("_packed", "_parameters")

    def __init__(self, module: nn.Module, packed: Tensor) -> None:
        self._parameters = module._parameters  # not the module: a cycle would keep the memory until a collection
        self._packed = packed

    def __call__(self, hidden: Tensor) -> Tensor:
        return _linear(hidden, self._packed, self._parameters.get("bias"))


def _linear(hidden: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(hidden, packed, bias, "none", [], "")  # type: ignore[no-any-return]


def can_pack(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `module` can compute with a packed weight of `dtype`; never an exception.

    True for a plain `nn.Linear` (a subclass may compute something else, and so may a replaced `forward`) whose
    weight is on the CPU or still on `meta`, where this machine's oneDNN computes such weights rightly.
    """
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    return module.weight.device.type in ("cpu", "meta") and _packs(dtype)


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Whether packing works for `dtype` here, found by doing it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False  # it would work, by way of fp32 and slower than without
        if dtype is torch.float16 and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
            return False
        with torch.inference_mode():
            weight = torch.linspace(-1, 1, _PROBE_OUT * _PROBE_IN).view(_PROBE_OUT, _PROBE_IN).to(dtype)
            hidden = torch.linspace(1, -2, 3 * _PROBE_IN).view(3, _PROBE_IN).to(dtype)
            expected = linear(hidden.float(), weight.float())
            result = _linear(hidden, pack(weight), None)
            tolerance = 2 * torch.finfo(dtype).eps * float(expected.abs().max())
            return result.dtype is dtype and bool((result.float() - expected).abs().max() <= tolerance)
    except Exception:  # whatever a build without the operators, or a kernel on a strange processor, comes up with
        return False


def pack(weight: Tensor, rows: int | None = None) -> Tensor:
    """`weight` `[out, in]`, dense on the CPU, in oneDNN's layout: an opaque tensor in new memory.

    Args:
        rows: how many rows of hidden states it will mostly be multiplied with; None = many. It decides between two
            layouts of which each works with any number: the result is the same up to rounding.
    """
    few = rows is not None and rows <= _FEW_ROWS and weight.dtype is torch.bfloat16
    return torch.ops.mkldnn._reorder_linear_weight.default(weight, 1 if few else None)  # type: ignore[no-any-return]


def packed_nbytes(packed: Tensor) -> int:
    """Bytes of a packed weight: those of the plain one, up to padding to the kernels' blocks of at most 64 x 64."""
    return int(torch.ops.mkldnn._nbytes.default(packed))


def bind(module: nn.Module, packed: Tensor) -> None:
    """Let `module` (see `can_pack`) compute with `packed`; its own weight is not looked at until `unbind`."""
    module.forward = _PackedForward(module, packed)


def unbind(module: nn.Module) -> None:
    """Give `module` its own forward back; the packed weight is freed unless somebody else holds it."""
    module.__dict__.pop("forward", None)
