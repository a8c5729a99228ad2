"""Every causal language model of the installed transformers that supports the attention interface, tiny and random.

The list is transformers' own, and one set of rules shrinks every config, so a new version of transformers brings its
architectures along.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from raytier.checkpoint.describe import describe_config, describe_model
from raytier.engine.sampling_params import SamplingParams
from raytier.errors import UnsupportedModelError
from tests.checkpoint.families import VOCAB
from tests.local_engine import local_engine

LAYERS, HEADS = 4, 4
#: A window shorter than most prompts, and a budget that cuts the longer ones into chunks beside other sequences.
WINDOW, CHUNK = 8, 13
LENGTHS = (1, 23, 7, 12)
NEW_TOKENS = 6
GREEDY = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=NEW_TOKENS, ignore_eos=True)
#: Every second layer streams, and the output head; the embedding is fetched by rows.
STREAMED = [{"pattern": r"re:\.[13]\.|head|embed", "tier": "nvme"}]

#: Sizes by name of the config's value; the first pattern that matches decides.
_SIZES: tuple[tuple[str, int], ...] = (
    (r"vocab_size.*", VOCAB),
    (r"(num_hidden_layers|num_layers|n_layers?)", LAYERS),
    (r"(num_attention_heads|n_heads?|attention_heads|index_n_heads|mamba_n_heads)", HEADS),
    (r"((original_)?max_position_embeddings|n_positions|max_seq_len)", 128),
    (r"(hidden_size|n_embd|d_model|word_embed_proj_dim|embedding_size|backbone_hidden_size)", 32),
    (r"(moe_intermediate_size|expert_ffn_hidden_size)", 24),
    (r"(.*intermediate_size.*|ffn_dim|dff|.*ffn_hidden_size|n_inner)", 48),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", 8),
    (r"(num_experts_per_tok|moe_topk|moe_top_k|moe_k|top_k_experts)", 2),
    (r"zero_expert_num", 4),
    (r"(n_group|topk_group)", 2),
    (r"(.*shared_experts|first_k_dense_replace|num_dense_layers|moe_layer_start_index)", 1),
    (r"moe_layer_end_index", LAYERS - 1),
    (r"(head_dim|kv_channels|global_head_dim)", 16),
    (r"qk_head_dim", 16),
    (r"(qk_rope_head_dim|qk_nope_head_dim|rotary_dim)", 8),
    (r"v_head_dim", 12),
    (r".*lora_rank|laurel_rank|gated_norm_rank", 16),
    (r"hidden_size_per_layer_input", 8),
    (r"(.*window(_size)?|local_attention)", WINDOW),
    (r"num_kv_shared_layers", 2),
)
#: Whatever else is larger than this becomes `_SMALL`.
_LARGE, _SMALL = 64, 16
#: Layers with a config of their own differ in this.
_WIDER = {"head_dim": 24}
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
#: What some classes leave to the checkpoint, though they cannot be built without.
_UNSET = ("head_dim", "n_routed_experts", "n_shared_experts", "n_group", "topk_group", "num_experts_per_tok")
#: What the checkpoints of a type state, without which its classes cannot be built.
_FULL_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
STATED: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _FULL_ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "granitemoehybrid": {"layer_types": ["full_attention"] * LAYERS, "mamba_d_head": "auto"},
    "lfm2_moe": {"layer_types": ["full_attention"] * LAYERS},
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@cache
def flagged() -> dict[str, type[PreTrainedModel]]:
    """Model type -> class, of all causal language models whose class supports the attention interface."""
    found = {}
    for config_class in MODEL_FOR_CAUSAL_LM_MAPPING:
        entry = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
        model_class = entry[0] if isinstance(entry, tuple) else entry
        if model_class._supports_attention_backend:
            found[config_class.model_type] = model_class
    return dict(sorted(found.items()))


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The default config of a model type with every size shrunk."""
    config_class = CONFIG_MAPPING[model_type]
    values = config_class().to_dict() | STATED.get(model_type, {})
    # Keys and values of multi-head latent attention are made for every head.
    return config_class(**_shrunk(values, kv_heads=HEADS if "qk_rope_head_dim" in values else 2))


def _shrunk(values: Mapping[str, Any], kv_heads: int) -> dict[str, Any]:
    layers = next((values[key] for key in _LAYER_COUNTS if values.get(key)), 0)
    per_layer = values.get("per_layer_config") or {}
    lists = {k: v for k, v in values.items() if isinstance(v, list) and len(v) == layers and layers > LAYERS}
    kept = _kept_layers([(*(v[i] for v in lists.values()), per_layer.get(f"{i:02}")) for i in range(layers)])
    small: dict[str, Any] = {}
    for key, value in values.items():
        if key in STATED.get(values.get("model_type", ""), {}):
            small[key] = value
        elif key in _TOKENS:
            small[key] = _TOKENS[key]
        elif key in _KV_HEADS:
            small[key] = kv_heads
        elif isinstance(value, Mapping) and "model_type" in value:
            small[key] = dict(value) | _shrunk(value, kv_heads)
        elif key in lists:
            small[key] = [value[i] for i in kept]
        elif key == "per_layer_config":
            found = {new: per_layer.get(f"{old:02}") for new, old in enumerate(kept)}
            small[key] = {f"{i:02}": _shrunk(one, kv_heads) | _WIDER for i, one in found.items() if one} or None
        elif value is None and key in _UNSET:
            small[key] = _shrunk_size(key, _LARGE)
        elif isinstance(value, int) and not isinstance(value, bool):
            small[key] = _shrunk_size(key, value)
    if "qk_rope_head_dim" in values:  # follows from it
        small["head_dim"] = small["qk_rope_head_dim"]
    elif (
        values.get("head_dim")
        and "hidden_size" in values
        and values["head_dim"] * values["num_attention_heads"] == values["hidden_size"]
    ):
        small["head_dim"] = small["hidden_size"] // small["num_attention_heads"]
    return small


def _shrunk_size(key: str, value: int) -> int:
    for pattern, size in _SIZES:
        if re.fullmatch(pattern, key):
            return min(size, value) if value > 0 else value
    if key.endswith(("_token_id", "_token_index")):
        return min(value, VOCAB - 1)
    return value if value <= _LARGE else _SMALL


def _kept_layers(kinds: list[Any]) -> list[int]:
    """Which layers remain: one of each kind in turn, so that every kind of layer comes before and after others."""
    first = [i for i, kind in enumerate(kinds) if kind not in kinds[:i]]
    return [first[i % len(first)] for i in range(LAYERS)] if first else []


def save_tiny(model_type: str, path: Path) -> None:
    """A random model of a type in `path`, in the form in which its checkpoints are saved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32)
    with torch.no_grad():
        for tensor in _stored(model):
            tensor.add_(torch.randn_like(tensor), alpha=0.2)  # norms and biases too: equal ones would hide a swap
    model.save_pretrained(path)


def _stored(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    transient = {name for name, _ in model.named_non_persistent_buffers()}
    yield from (b for name, b in model.named_buffers() if name not in transient and b.is_floating_point())


@dataclass(frozen=True)
class Verdict:
    """What raytier does with an architecture: token-identical with transformers, or refused and why."""

    model_type: str
    architecture: str
    refused: str | None = None


def judge(model_type: str, path: Path, tokenizer_dir: Path) -> Verdict:
    """Build a tiny model of the type in `path`, and compare. AssertionError where the tokens differ."""
    architecture = flagged()[model_type].__name__
    shutil.copytree(tokenizer_dir, path, dirs_exist_ok=True)
    not_tiny: Exception | None = None
    try:
        config = tiny_config(model_type)
    except Exception as error:  # a validator of the class: then the model must be refused for what it is
        not_tiny = error
        try:
            config = CONFIG_MAPPING[model_type]()
        except Exception:
            return Verdict(model_type, architecture, "its class has no default config that is valid")
    config.save_pretrained(path)
    try:
        describe_config(str(path))
    except UnsupportedModelError as error:
        return Verdict(model_type, architecture, str(error))
    if not_tiny is not None:
        raise AssertionError("no tiny config can be made") from not_tiny
    save_tiny(model_type, path)
    try:
        describe_model(str(path))
    except UnsupportedModelError as error:  # for how its checkpoints are saved
        return Verdict(model_type, architecture, str(error))
    wanted = reference(path)
    assert len({tuple(tokens) for tokens in wanted}) > 1, "all outputs alike: the test would see no mix-up"
    with local_engine(
        path,
        placement={"rules": STREAMED},
        scheduler={"max_num_batched_tokens": CHUNK},
        tiers={"device": {"max_mb": 64}, "nvme": {"io_threads": 2, "io_mb": 0.0625}},
    ) as local:
        outputs = local.engine.generate(prompts(), GREEDY)
        assert [list(o.token_ids) for o in outputs] == wanted
        local.check_bytes()
        assert local.plan.nvme_bytes > 0.2 * local.manifest.nbytes
    return Verdict(model_type, architecture)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def reference(model_dir: Path) -> list[list[int]]:
    """What transformers generates greedily, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    outputs = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs
