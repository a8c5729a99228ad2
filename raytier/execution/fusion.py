"""Modules of transformers whose arithmetic the kernels for the CPU do at once.

transformers repeats the same few pieces in nearly every model: RMS norm, the gated feed-forward part, rotary embedding.
`adopt` finds them by what they execute, not by their names: a function is another one's copy if its bytecode, names and
constants are the same. Where a call does not suit the kernels (of another dtype, say), transformers' own code runs.
"""

from __future__ import annotations

from types import CodeType, FunctionType, MethodType
from typing import Any, TypeGuard

from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama

from raytier.execution import cpu_kernels, linears

_ROTARY = "apply_rotary_pos_emb"


def adopt(model: nn.Module) -> None:
    """Let every module of `model` compute by kernels what they can do; once for a model, before it runs."""
    for module in model.modules():
        linears.adopt(module)
        if not cpu_kernels.available() or "forward" in module.__dict__:
            continue
        forward = type(module).forward
        if _copies(forward, llama.LlamaRMSNorm.forward):
            module.forward = MethodType(_rms_norm, module)
        elif _copies(forward, llama.LlamaMLP.forward) and isinstance(module.act_fn, SiLUActivation | nn.SiLU):
            module.forward = MethodType(_gated, module)
        elif _rotates(forward):
            module.forward = MethodType(_with_rotation(forward), module)


def _rms_norm(self: Any, hidden: Tensor) -> Tensor:
    weight = self._parameters["weight"]
    if cpu_kernels.fits_rms_norm(hidden, weight):
        return cpu_kernels.rms_norm(hidden, weight, self.variance_epsilon)
    return type(self).forward(self, hidden)  # type: ignore[no-any-return]


def _gated(self: Any, hidden: Tensor) -> Tensor:
    gate, up = self.gate_proj(hidden), self.up_proj(hidden)
    if cpu_kernels.fits_silu_mul(gate, up):
        return self.down_proj(cpu_kernels.silu_mul(gate, up))  # type: ignore[no-any-return]
    return self.down_proj(self.act_fn(gate) * up)  # type: ignore[no-any-return]


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    if unsqueeze_dim == 1 and cpu_kernels.fits_rotate(q, k, cos, sin):
        return cpu_kernels.rotate(q, k, cos, sin)
    return llama.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim)  # type: ignore[no-any-return]


def _rotates(forward: object) -> TypeGuard[FunctionType]:
    """Whether `forward` applies the rotary embedding that Llama has."""
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return False
    rotary = forward.__globals__.get(_ROTARY)
    half = getattr(rotary, "__globals__", {}).get("rotate_half")
    return _copies(rotary, llama.apply_rotary_pos_emb) and _copies(half, llama.rotate_half)


def _with_rotation(forward: FunctionType) -> FunctionType:
    """`forward`, but for the rotary embedding, which is ours. The module that defines it stays as it is."""
    own = FunctionType(
        forward.__code__,
        {**forward.__globals__, _ROTARY: _rotate},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    own.__kwdefaults__ = forward.__kwdefaults__
    return own


def _copies(function: object, original: object) -> bool:
    """Whether `function` does what `original` does, each with the globals of its own module."""
    if not isinstance(function, FunctionType) or function.__closure__ is not None:
        return False
    assert isinstance(original, FunctionType)
    return _meaning(function.__code__) == _meaning(original.__code__)


def _meaning(code: CodeType) -> tuple[object, ...]:
    """What a code object executes: all but its places in a file, and what it says about itself."""
    # The first constant is what a function says about itself, or None.
    return (code.co_code, code.co_names, code.co_varnames, code.co_consts[1:], code.co_argcount)
