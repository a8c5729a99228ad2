"""Modules of transformers whose arithmetic the kernels for the CPU do at once.

transformers repeats the same few pieces in nearly every model: RMS norm, the gated feed-forward part, rotary embedding;
and in many (Llama, Mistral, Qwen2, Qwen3, ...) the whole decoder layer, which for a decode step is then one call.
`adopt` finds them by what they execute, not by their names: a function is another one's copy if its bytecode, names and
constants are the same. Where a call does not suit the kernels (of another dtype, say), transformers' own code runs.
"""

from __future__ import annotations

from functools import cache
from inspect import unwrap
from types import CodeType, FunctionType, MethodType
from typing import Any, TypeGuard

from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral.modeling_mistral import MistralAttention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from raytier.execution import cpu_kernels, cpu_layer, linears
from raytier.execution.attention import current_context

_ROTARY = "apply_rotary_pos_emb"


def adopt(model: nn.Module) -> None:
    """Let every module of `model` compute by kernels what they can do; once for a model, before it runs."""
    for module in model.modules():
        linears.adopt(module)
        if not cpu_kernels.available() or "forward" in module.__dict__:
            continue
        forward = type(module).forward
        if _is_decoder_layer(module):
            module.forward = MethodType(_decoder_layer, module)
        elif _is_rms_norm(module):
            module.forward = MethodType(_rms_norm, module)
        elif _is_gated(module):
            module.forward = MethodType(_gated, module)
        elif _rotates(forward):
            module.forward = MethodType(_with_rotation(forward), module)


def _is_rms_norm(module: nn.Module) -> bool:
    return _copies(type(module).forward, llama.LlamaRMSNorm.forward)


def _is_gated(module: nn.Module) -> bool:
    return _copies(type(module).forward, llama.LlamaMLP.forward) and isinstance(module.act_fn, SiLUActivation | nn.SiLU)


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


#: Attention of decoder layers that are computed at once. All rotate as Llama does.
_ATTENTION: tuple[type[nn.Module], ...] = (llama.LlamaAttention, MistralAttention, Qwen2Attention, Qwen3Attention)


@cache
def _is_known(attention: type[nn.Module]) -> bool:
    return any(_copies(attention.forward, known.forward) for known in _ATTENTION)


def _is_decoder_layer(layer: Any) -> bool:
    """Whether `layer` is one as Llama has them, of parts that the kernels know."""
    # What transformers wraps it in concerns training.
    if not _copies(unwrap(type(layer).forward), unwrap(llama.LlamaDecoderLayer.forward)):
        return False
    attention = layer.self_attn
    return (
        _is_rms_norm(layer.input_layernorm)
        and _is_rms_norm(layer.post_attention_layernorm)
        and _is_gated(layer.mlp)
        and _is_known(attention.__class__)
        and _rotates(type(attention).forward)
        and all(_is_rms_norm(getattr(attention, name)) for name in ("q_norm", "k_norm") if hasattr(attention, name))
        and all(type(part) in (nn.Linear, linears.Linear) for part in _projections(layer))
    )


def _projections(layer: Any) -> tuple[linears.Linear, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    heads = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return (*heads, mlp.gate_proj, mlp.up_proj, mlp.down_proj)


def _weights(layer: Any) -> cpu_layer.LayerWeights:
    """What is bound to `layer` now."""
    attention = layer.self_attn
    heads = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
    norms = (layer.input_layernorm, layer.post_attention_layernorm, *heads)
    return cpu_layer.LayerWeights(
        tuple((part.bound, part._parameters["bias"]) for part in _projections(layer)),
        tuple(norm and (norm._parameters["weight"], norm.variance_epsilon) for norm in norms),
    )


def _decoder_layer(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: object = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    context, attention = current_context(), self.self_attn
    if context is not None and attention_mask is None and position_embeddings is not None:
        group = context.store.group_of[context.layer]
        singles, longer = context.singles(context.window, group)
        pool = context.store.keys[context.layer], context.store.values[context.layer]
        if not longer and cpu_layer.fits_layer(hidden_states, weights := _weights(self), pool, position_embeddings):
            context.next_layer()
            return cpu_layer.layer(
                hidden_states, weights, position_embeddings, context.slots[group], pool, singles, attention.scaling
            )
    return type(self).forward(  # type: ignore[no-any-return]
        self,
        hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )


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
