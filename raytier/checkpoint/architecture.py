"""A model's architecture from its config: which class runs it, whether raytier can, and a build without weights.

Imports torch and transformers, hence only in processes that build or describe models.
"""

from __future__ import annotations

import copy
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AttentionInterface, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, build_glob_alternation
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from raytier.checkpoint.safetensors_index import load_json
from raytier.errors import CheckpointError, RaytierError, UnsupportedModelError

#: Name of raytier's attention in transformers' registry; `raytier.execution.attention` registers it.
ATTENTION_NAME = "raytier"
#: Attention during the build and the probe: it only needs to exist, so that transformers accepts the name.
PROBE_NAME = "raytier_probe"


class ProbeHook(threading.local):
    """Where the probe attention of this thread hands its arguments; set by `probe_attention`."""

    record: Callable[..., tuple[torch.Tensor, None]] | None = None


probe_hook = ProbeHook()


def _probe(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    if probe_hook.record is None:
        raise RuntimeError(f"attention {PROBE_NAME} called outside of probe_attention")
    return probe_hook.record(*args, **kwargs)


AttentionInterface.register(PROBE_NAME, _probe)

COMPUTE_DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

FAMILIES = "llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, phi3, gpt2, gpt_neox, olmo2, granite"
_DENSE = f"a dense decoder-only model ({FAMILIES})"

#: RoPE types whose frequencies depend on the longest position of the batch, and what runs instead.
_BATCH_ROPE = {
    "dynamic": "the same model with rope_type linear, llama3 or yarn",
    "longrope": "the model's short-context variant (for phi3 the 4k one), or rope_type llama3 or yarn",
}
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def unsupported(what: str, reason: str, nearest: str = _DENSE) -> UnsupportedModelError:
    """The refusal in its standard form: what, why, and the nearest choice that would work."""
    return UnsupportedModelError(f"{what}: {reason}. Nearest supported: {nearest}")


def load_config(model_dir: str) -> PreTrainedConfig:
    """The model's config from `model_dir/config.json`; nothing is fetched and no code of the model is run.

    Raises:
        CheckpointError: config.json is missing, malformed, or does not validate.
        UnsupportedModelError: transformers has no class of its own for this model type.
    """
    path = os.path.join(os.path.abspath(model_dir), "config.json")
    if not os.path.exists(path):
        raise CheckpointError(f"{path}: missing; give the directory of a Hugging Face model")
    raw = load_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path}: model_type is {model_type!r}; it must name the architecture, e.g. llama")
    if model_type not in CONFIG_MAPPING:
        reason = f"model_type {model_type!r} is not part of transformers"
        if "auto_map" in raw:
            reason += " and its own code (auto_map) is not run"
        raise unsupported(path, reason)
    try:
        config = AutoConfig.from_pretrained(os.path.dirname(path), local_files_only=True, trust_remote_code=False)
    except RaytierError:
        raise
    except Exception as error:  # validators of 300 config classes raise what they like
        raise CheckpointError(f"{path}: not a valid {model_type} config: {one_line(error)}") from error
    return cast(PreTrainedConfig, config)


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The transformers class that runs `config` as a causal language model.

    Raises:
        UnsupportedModelError: there is none, or `config.architectures` names another kind of model.
    """
    model_type = config.model_type
    try:
        found = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError:
        raise unsupported(model_type, "transformers has no causal language model of this type") from None
    model_class = cast(type[PreTrainedModel], found[0] if isinstance(found, tuple) else found)
    name = model_class.__name__
    if model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES or model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        raise unsupported(model_type, "an encoder or encoder-decoder model, which raytier does not run")
    if not _is_causal_name(name) or config.get_text_config(decoder=True) is not config:
        raise unsupported(
            model_type, f"{name} does more than continue text (multimodal, or a decoder of another model)"
        )
    architectures = config.architectures or []
    if architectures and not any(_is_causal_name(a) for a in architectures):
        raise unsupported(
            model_type,
            f"the checkpoint holds {', '.join(architectures)}, not a causal language model",
            f"a checkpoint of {name}",
        )
    return model_class


def _is_causal_name(name: str) -> bool:
    return name.endswith(("ForCausalLM", "LMHeadModel"))


def check_supported(config: PreTrainedConfig, model_class: type[PreTrainedModel]) -> None:
    """Refuse what can be seen from the config and the class; `probe_attention` checks the built model.

    Raises:
        UnsupportedModelError: with the reason and the nearest supported choice.
    """
    what = model_class.__name__
    quantization = getattr(config, "quantization_config", None)
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise unsupported(what, f"quantised checkpoint ({method})", "the model's unquantised checkpoint")
    if getattr(model_class, "_is_stateful", False):
        raise unsupported(what, "it carries recurrent or convolution state, raytier pages attention's KV only")
    if not model_class._supports_attention_backend:
        raise unsupported(what, "its transformers class does not support the attention interface")
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if foreign:
        raise unsupported(what, f"layer types {', '.join(foreign)}; only full and sliding attention run")
    for rope_type in _rope_types(getattr(config, "rope_parameters", None)):
        if rope_type in _BATCH_ROPE:
            reason = f"rope_type {rope_type} depends on the longest sequence of a batch, which changes the others"
            raise unsupported(what, reason, _BATCH_ROPE[rope_type])
    if getattr(config, "use_bidirectional_attention", None):
        raise unsupported(what, "use_bidirectional_attention is on, raytier runs causal attention")
    if getattr(config, "num_kv_shared_layers", None):
        raise unsupported(what, f"{config.num_kv_shared_layers} layers share the KV cache of others")


def _rope_types(parameters: object) -> Iterator[str]:
    """RoPE types of a config, whose parameters may be given per layer type."""
    if isinstance(parameters, Mapping):
        rope_type = parameters.get("rope_type", parameters.get("type"))
        if isinstance(rope_type, str):
            yield rope_type
        for value in parameters.values():
            yield from _rope_types(value)


def build_meta(config: PreTrainedConfig, dtype: str) -> PreTrainedModel:
    """Build the model with parameters on `meta` and its non-persistent buffers (RoPE frequencies, ...) real on the CPU.

    In eval mode, without gradients, with raytier's attention selected by name. Tied parameters are one
    object. `config` is not changed.

    Args:
        dtype: a key of `COMPUTE_DTYPES`, the dtype of the parameters.

    Raises:
        UnsupportedModelError: see `check_supported`; also if the class cannot be built without weights.
    """
    model = construct(config, dtype)
    restore_buffers(model)
    return model


def construct(config: PreTrainedConfig, dtype: str) -> PreTrainedModel:
    """`build_meta` with the buffers still on `meta`, as `probe_attention` needs it."""
    model_class = causal_lm_class(config)
    check_supported(config, model_class)
    try:
        with torch.device("meta"), init.meta_device_safe_creation_ops():
            model = model_class._from_config(  # type: ignore[no-untyped-call]
                copy.deepcopy(config), dtype=COMPUTE_DTYPES[dtype], attn_implementation=PROBE_NAME
            )
    except RaytierError:
        raise
    except Exception as error:  # whatever a model class does with values it did not foresee
        raise unsupported(
            model_class.__name__, f"cannot be built from its config: {type(error).__name__}: {one_line(error)}"
        ) from error
    # transformers checks the name only while building, so raytier's own function may be registered later.
    model.config._attn_implementation = ATTENTION_NAME
    model.eval().requires_grad_(False)
    _check_built(model, COMPUTE_DTYPES[dtype])
    return cast(PreTrainedModel, model)


def _check_built(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Refuse what transformers would load in a way that a manifest of plain extents cannot express."""
    what = type(model).__name__
    if any(isinstance(rule, WeightConverter) for rule in get_model_conversion_mapping(model, add_legacy=False)):
        names = [name for name, _ in model.named_parameters()]
        fused = next((name for name, p in model.named_parameters() if p.ndim == 3), names[0])
        raise unsupported(
            what, f"mixture-of-experts and converted checkpoints come later ({fused} is assembled from several tensors)"
        )
    transient = {name for name, _ in model.named_non_persistent_buffers()}
    stored = [name for name, _ in model.named_buffers() if name not in transient]
    if stored:
        raise unsupported(what, f"buffers stored in the checkpoint ({stored[0]} and {len(stored) - 1} more)")
    plan = model._get_dtype_plan(dtype)
    pattern = build_glob_alternation(list(plan))[0] if plan else None
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtype or (pattern is not None and pattern.search(name)):
            raise unsupported(what, f"{name} keeps a dtype of its own; raytier computes in one dtype")


@torch.no_grad()
def restore_buffers(model: PreTrainedModel) -> None:
    """Give the non-persistent buffers their values by transformers' own initialisation, as `from_pretrained` does.

    Raises:
        UnsupportedModelError: a buffer or another tensor of the model is not reproduced by it.
    """
    what = type(model).__name__
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # keeps the initialisation off weights

    # From two different fills the same values must come: else the initialisation does not cover a buffer,
    # and its bytes would be arbitrary.
    first = {name: buffer.clone() for name, buffer in _initialised_from(model, 0)}
    for name, buffer in _initialised_from(model, 1):
        if not torch.equal(first[name], buffer):
            raise unsupported(what, f"the value of buffer {name} cannot be rebuilt without a full load")
    for module_name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise unsupported(what, f"tensor {module_name}.{attribute} is neither parameter nor buffer")


def _initialised_from(model: PreTrainedModel, fill: int) -> list[tuple[str, torch.Tensor]]:
    """Non-persistent buffers, filled with `fill`, after the model's initialisation ran over them."""
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, attribute = name.rpartition(".")
        value = torch.full_like(buffer, fill, device="cpu")
        model.get_submodule(owner).register_buffer(attribute, value, persistent=False)
    for module in model.modules():
        module._is_hf_initialized = False  # type: ignore[assignment]
    model.initialize_weights()  # type: ignore[no-untyped-call]
    return list(model.named_non_persistent_buffers())


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers, the units of streaming, in the order of execution."""
    return cast(nn.ModuleList, model.get_submodule(layer_prefix(model)))


def layer_prefix(model: PreTrainedModel) -> str:
    """Name of `decoder_layers(model)` in the model, for instance `model.layers`.

    Raises:
        UnsupportedModelError: no or no single list of `num_hidden_layers` layers.
    """
    count: int = model.config.num_hidden_layers
    inside = {id(module) for module in model.get_decoder().modules()}  # type: ignore[no-untyped-call]
    lists: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and id(module) in inside
    ]
    depth = min((name.count(".") for name in lists), default=0)
    lists = [name for name in lists if name.count(".") == depth]
    known = [name for name in lists if re.search(r"(^|\.)(layers|h|blocks)$", name)]
    if len(known or lists) != 1:
        raise unsupported(type(model).__name__, f"no single list of {count} decoder layers (found {lists})")
    return (known or lists)[0]


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
