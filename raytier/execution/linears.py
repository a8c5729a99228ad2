"""Linear layers on a CPU: for few rows by kernels of our own or on weights that oneDNN has packed, else as torch does.

With few rows a linear layer takes as long as its weights take to come from memory. Where the processor computes in
bf16, `apply` reads plain weights, wherever they lie, at about the memory's rate (`cpu_matmul.linear`), and computes on
weights of other forms as they are. Elsewhere oneDNN's packed layout, which its kernels read instead of rows, is what
helps, and a weight of another form is made plain in parts.

A packed weight is a cache of the plain one: new memory, as large as the plain weight (up to padding), usable on
this machine in this process only, and never written to a file. Measured with the matrices of a 1.1 B Llama, bytes of
weights per second over those of `F.linear`:

- bf16 with AVX512 alone: 1.3x at 1 row, 1.4x at 8, 1.15x at 32, 1.07x at 64.
- fp32: 2x at 4 and 8 rows, 1.7x at 16, 1.1 to 1.3x from 32 on, 0.95x at 1. fp16: up to 1.2x below 8 rows, else no gain.

Huge pages (`THP_MEM_ALLOC_ENABLE=1` before torch is imported) take a tenth of the page faults and half of the
processor time off packing, and make the packed weights 1.05 to 1.2x as fast to read.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from raytier.execution import cpu_matmul
from raytier.execution.formed import FormedWeight, Weight

#: A shape for the probe with more than one of a kernel's blocks in each direction, and a remainder.
_PROBE_OUT, _PROBE_IN = 80, 48
#: Of plain rows that are made of another form.
_PART_BYTES = 2 << 20


def apply(hidden: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """`F.linear`, whose result this is up to the order of summation: hidden `[..., in]`, weight `[out, in]`."""
    if cpu_matmul.fits_linear(hidden, weight):
        return cpu_matmul.linear(hidden, weight, bias)
    if not isinstance(weight, FormedWeight):
        return linear(hidden, weight, bias)
    if weight.form.dynamic:
        return _apply_dynamic(hidden, weight, bias)
    return _apply_in_parts(hidden, weight, bias)


def _apply_dynamic(hidden: Tensor, weight: FormedWeight, bias: Tensor | None) -> Tensor:
    """Weights and activations in 8 bits, these with a scale for every row of them; sums are exact."""
    numbers, scales = weight.integers()
    rows = hidden.reshape(-1, hidden.shape[-1]).float()
    scale = rows.abs().amax(1, keepdim=True) / 127
    quantised = (rows * torch.where(scale > 0, 1 / scale, 0)).round().to(torch.int8)
    result = torch._int_mm(quantised, numbers.t()).float() * (scale * scales)
    if bias is not None:
        result += bias
    return result.to(hidden.dtype).view(*hidden.shape[:-1], -1)


def _apply_in_parts(hidden: Tensor, weight: FormedWeight, bias: Tensor | None) -> Tensor:
    """By way of plain rows, so many at a time that they stay in a core's cache."""
    outputs, inputs = weight.shape
    native = hidden.dtype is torch.bfloat16 and cpu_matmul.computes_on(weight)
    result = hidden.new_empty(*hidden.shape[:-1], outputs)
    step = max(16, _PART_BYTES // (hidden.element_size() * inputs) // 16 * 16)
    for start in range(0, outputs, step):
        count = min(step, outputs - start)
        rows = cpu_matmul.decode(weight, start, count) if native else weight.rows(start, count).to(hidden.dtype)
        result[..., start : start + count] = linear(hidden, rows)
    return result if bias is None else result.add_(bias)


class Linear(nn.Linear):
    """Computes by `apply`; a plain `nn.Linear` becomes one by `adopt`.

    Attributes:
        formed: the weight where it is not a plain tensor; its own is on `meta` then.
    """

    formed: FormedWeight | None

    def forward(self, hidden: Tensor) -> Tensor:
        return apply(hidden, self.bound, self._parameters["bias"])

    @property
    def bound(self) -> Weight:
        """What it computes with."""
        return self.formed or self._parameters["weight"]  # type: ignore[return-value]


def adopt(module: nn.Module) -> None:
    """Let `module` compute by `apply` if it is a linear layer of torch's: a subclass may compute something else."""
    if type(module) is nn.Linear:
        module.__class__ = Linear
        module.__dict__["formed"] = None


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
    if type(module) not in (nn.Linear, Linear) or "forward" in module.__dict__:
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


def packed_nbytes(packed: Tensor) -> int:
    """Bytes of a packed weight: those of the plain one, up to padding to the kernels' blocks of at most 64 x 64."""
    return int(torch.ops.mkldnn._nbytes.default(packed))


def bind(module: nn.Module, packed: Tensor) -> None:
    """Let `module` (see `can_pack`) compute with `packed`; its own weight is not looked at until `unbind`."""
    module.forward = _PackedForward(module, packed)


def unbind(module: nn.Module) -> None:
    """Give `module` its own forward back; the packed weight is freed unless somebody else holds it."""
    module.__dict__.pop("forward", None)
