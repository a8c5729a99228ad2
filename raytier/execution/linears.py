"""Linear layers on a CPU whose weights oneDNN has packed: the layout its kernels read, instead of rows.

A packed weight is a cache of the plain one: new memory, as large as the plain weight (up to padding), usable on
this machine in this process only, and never written to a file. Measured on two cores with 2048 x 5632 and the
reverse in bf16, packed over plain: 1.7x at 1 row on AVX512-bf16; with AMX 1.12x at 1 to 16 rows, 1.1x at 32,
1.25x from 64 rows up. fp32: 2x from 4 to 8 rows, 1.1 to 1.3x above, equal or slightly slower (0.95x) at 1 row.
fp16 gains up to 1.2x below 8 rows. No loss was seen at any other number of rows between 1 and 512.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

#: Bytes that padding can add to a row or a column of a packed weight: kernels work on blocks of up to 64 outputs
#: by 32 inputs.
_BLOCK_OUT, _BLOCK_IN = 64, 32
#: Blocks of the probe: more than one in each direction, with a remainder.
_PROBE_OUT, _PROBE_IN = _BLOCK_OUT + 16, _BLOCK_IN + 16


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


def pack(weight: Tensor) -> Tensor:
    """`weight` `[out, in]`, dense on the CPU, in oneDNN's layout: an opaque tensor in new memory."""
    return torch.ops.mkldnn._reorder_linear_weight.default(weight, None)  # type: ignore[no-any-return]


def packed_nbytes(shape: tuple[int, ...], itemsize: int) -> int:
    """Bytes that a packed weight of `shape` `[out, in]` takes at most: both rounded up to the kernels' blocks."""
    rows, columns = shape
    return -(-rows // _BLOCK_OUT) * _BLOCK_OUT * (-(-columns // _BLOCK_IN) * _BLOCK_IN) * itemsize


def bind(module: nn.Module, packed: Tensor) -> None:
    """Let `module` (see `can_pack`) compute with `packed`; its own weight is not looked at until `unbind`."""
    module.forward = _PackedForward(module, packed)


def unbind(module: nn.Module) -> None:
    """Give `module` its own forward back; the packed weight is freed unless somebody else holds it."""
    module.__dict__.pop("forward", None)
