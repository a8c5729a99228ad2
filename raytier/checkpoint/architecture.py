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
from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    masking_utils,
)
from transformers import initialization as init
from transformers.core_model_loading import build_glob_alternation
from transformers.integrations.moe import ExpertsInterface
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from raytier.checkpoint.safetensors_index import load_json
from raytier.errors import CheckpointError, RaytierError, UnsupportedModelError

#: Name of raytier's attention in transformers' registry; `raytier.execution.attention` registers it.
ATTENTION_NAME = "raytier"
#: Name of raytier's experts in transformers' registry; `raytier.execution.experts` registers them.
EXPERTS_NAME = "raytier"
#: Both during the build and the probe: they only need to exist, so that transformers accepts the name.
PROBE_NAME = "raytier_probe"


class ProbeHook(threading.local):
    """Where the probes of this thread hand what they were called with; set by `probe`."""

    attention: Callable[..., tuple[torch.Tensor, None]] | None = None
    experts: Callable[..., torch.Tensor] | None = None
    mask: Callable[..., torch.Tensor] | None = None


probe_hook = ProbeHook()


def _probe_attention(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    if probe_hook.attention is None:
        raise RuntimeError(f"attention {PROBE_NAME} called outside of a probe")
    return probe_hook.attention(*args, **kwargs)


def _probe_experts(*args: Any, **kwargs: Any) -> torch.Tensor:
    if probe_hook.experts is None:
        raise RuntimeError(f"experts {PROBE_NAME} called outside of a probe")
    return probe_hook.experts(*args, **kwargs)


def _probe_mask(*args: Any, **kwargs: Any) -> torch.Tensor:
    if probe_hook.mask is None:
        raise RuntimeError(f"masks of {PROBE_NAME} called outside of a probe")
    return probe_hook.mask(*args, **kwargs)


def _packed_sequences(position_ids: torch.Tensor) -> torch.Tensor | None:
    """transformers' test for packed sequences looks at the values; positions without data are one sequence."""
    return None if position_ids.is_meta else _find_packed_sequences(position_ids)


_find_packed_sequences = masking_utils.find_packed_sequence_indices
masking_utils.find_packed_sequence_indices = _packed_sequences
AttentionMaskInterface.register(PROBE_NAME, _probe_mask)
AttentionInterface.register(PROBE_NAME, _probe_attention)
ExpertsInterface.register(PROBE_NAME, _probe_experts)

#: Tensors among the keyword arguments of attention that do not change its result in inference.
NEUTRAL = frozenset({"position_ids", "logits_to_keep"})

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
    if not _is_causal_name(name):
        raise unsupported(model_type, f"{name} is the decoder of another model")
    inner = text_config(config)
    if inner is not config and isinstance(inner, cast(type, model_class.config_class)):
        raise unsupported(model_type, f"{name} runs one part of it, of a config of its own")
    architectures = config.architectures or []
    if architectures and not any(_is_causal_name(a) for a in architectures):
        raise unsupported(
            model_type,
            f"the checkpoint holds {', '.join(architectures)}, not a causal language model",
            f"a checkpoint of {name}",
        )
    return model_class


def _is_causal_name(name: str) -> bool:
    # What can take images or sound beside text is run as far as it continues text.
    return name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the part that continues text: `config` itself, unless the model has other parts beside it."""
    return config.get_text_config(decoder=True)


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
    config = text_config(config)
    layer_types = set(getattr(config, "layer_types", None) or ())
    if getattr(model_class, "_is_stateful", False) and not (layer_types and layer_types <= _LAYER_TYPES):
        raise unsupported(what, "it carries recurrent or convolution state, raytier pages attention's KV only")
    if not model_class._supports_attention_backend:
        raise unsupported(what, "its transformers class does not support the attention interface")
    if foreign := sorted(layer_types - _LAYER_TYPES):
        raise unsupported(what, f"layer types {', '.join(foreign)}; only full and sliding attention run")
    for rope_type in _rope_types(getattr(config, "rope_parameters", None)):
        if rope_type in _BATCH_ROPE:
            reason = f"rope_type {rope_type} depends on the longest sequence of a batch, which changes the others"
            raise unsupported(what, reason, _BATCH_ROPE[rope_type])


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
    config = copy.deepcopy(config)
    if getattr(text_config(config), "use_bidirectional_attention", None) == "vision":
        # The tokens of an image see each other; of text none, and there is nothing else here.
        text_config(config).use_bidirectional_attention = None
    try:
        with torch.device("meta"), init.meta_device_safe_creation_ops():
            model = model_class._from_config(  # type: ignore[no-untyped-call]
                config,
                dtype=COMPUTE_DTYPES[dtype],
                attn_implementation=PROBE_NAME,
                experts_implementation=PROBE_NAME,
            )
    except RaytierError:
        raise
    except Exception as error:  # whatever a model class does with values it did not foresee
        raise unsupported(
            model_class.__name__, f"cannot be built from its config: {type(error).__name__}: {one_line(error)}"
        ) from error
    # transformers checks the names only while building, so raytier's own functions may be registered later.
    model.config._attn_implementation = ATTENTION_NAME
    model.config._experts_implementation = EXPERTS_NAME
    model.eval().requires_grad_(False)
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):  # it looks at the tokens, and there is no padding
            module.warn_if_padding_and_no_attention_mask = lambda *_: None
    return cast(PreTrainedModel, model)


def own_dtypes(model: PreTrainedModel, dtype: str) -> dict[str, str]:
    """Dtypes of the parameters and stored buffers that are not loaded in `dtype`, as `from_pretrained` loads them."""
    plan = model._get_dtype_plan(COMPUTE_DTYPES[dtype])
    pattern, groups, _ = build_glob_alternation(list(plan)) if plan else (None, {}, {})
    found: dict[str, str] = {}
    for name, tensor in stored_tensors(model):
        match = pattern.search(name) if pattern is not None else None
        wanted = plan[groups[str(match.lastgroup)]] if match is not None else tensor.dtype
        if wanted != COMPUTE_DTYPES[dtype]:
            found[name] = str(wanted).removeprefix("torch.")
    return found


def stored_tensors(model: PreTrainedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that a checkpoint holds: parameters, under all of their names, and persistent buffers."""
    yield from model.named_parameters(remove_duplicate=False)
    transient = {name for name, _ in model.named_non_persistent_buffers()}
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name not in transient)


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
    config = text_config(model.config)
    # Where a layer attends twice, `num_hidden_layers` counts its halves.
    count: int = getattr(config, "num_layers", None) or config.num_hidden_layers
    lists: list[str] = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    inside = {id(module) for module in model.get_decoder().modules()}  # type: ignore[no-untyped-call]
    lists = [name for name in lists if id(model.get_submodule(name)) in inside] or lists
    depth = min((name.count(".") for name in lists), default=0)
    lists = [name for name in lists if name.count(".") == depth]
    known = [name for name in lists if re.search(r"(^|\.)(layers|h|blocks)$", name)]
    if len(known or lists) != 1:
        raise unsupported(type(model).__name__, f"no single list of {count} decoder layers (found {lists})")
    return (known or lists)[0]


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
