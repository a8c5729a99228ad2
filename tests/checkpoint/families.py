"""Tiny configs of the families that raytier runs."""

from __future__ import annotations

from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

VOCAB = 320
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA = _COMMON | {"num_key_value_heads": 2}
_PATTERN = ["sliding_attention", "full_attention"] * 2

#: name -> (model type, config). The nine families of the first version, tied and untied, with their RoPE variants.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GQA | {"tie_word_embeddings": False}),
    "llama-llama3-rope": (
        "llama",
        _GQA
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
    ),
    "llama-linear-rope": (
        "llama",
        _GQA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "qwen2": (
        "qwen2",
        _GQA | {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3},
    ),
    "qwen2-yarn-rope": (
        "qwen2",
        _GQA
        | {
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "sliding_window": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "qwen3": ("qwen3", _GQA | {"head_dim": 16, "tie_word_embeddings": True}),
    "mistral": ("mistral", _GQA | {"sliding_window": 8}),
    "gemma2": ("gemma2", _GQA | {"head_dim": 16, "sliding_window": 8, "layer_types": _PATTERN}),
    "gemma3_text": ("gemma3_text", _GQA | {"head_dim": 16, "sliding_window": 8, "layer_types": _PATTERN}),
    "phi3": ("phi3", _GQA | {"sliding_window": 12, "tie_word_embeddings": False}),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128, "bos_token_id": 1}
        | {"eos_token_id": 2},
    ),
    "gpt_neox": ("gpt_neox", _COMMON | {"tie_word_embeddings": False}),
}

#: Mixtures of experts: few large ones, and many small ones beside layers without.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", _GQA | {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": (
        "qwen3_moe",
        _GQA
        | {"head_dim": 16, "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 24}
        | {"mlp_only_layers": [1], "tie_word_embeddings": False},
    ),
}


def family_config(name: str, **changes: Any) -> PreTrainedConfig:
    model_type, values = (FAMILIES | MIXTURES)[name]
    return CONFIG_MAPPING[model_type](**(values | changes))
