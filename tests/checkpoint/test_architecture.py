"""E2, first version: what is built, what is refused and why."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from raytier.checkpoint.architecture import (
    build_meta,
    causal_lm_class,
    construct,
    decoder_layers,
    layer_prefix,
    load_config,
    restore_buffers,
)
from raytier.checkpoint.describe import describe_config
from raytier.checkpoint.manifest import ExpertBank
from raytier.checkpoint.probe import probe
from raytier.errors import CheckpointError, UnsupportedModelError
from tests.checkpoint.families import FAMILIES, family_config
from tests.models import MakeModel


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_buffers_equal_from_pretrained(name: str, dtype: str, make_model: MakeModel) -> None:
    path = make_model(name)
    built = build_meta(load_config(str(path)), dtype)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    expected = dict(reference.named_non_persistent_buffers())
    found = dict(built.named_non_persistent_buffers())
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].device.type == "cpu"
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key
    assert {p.device.type for p in built.parameters()} == {"meta"}
    assert {p.dtype for p in built.parameters()} == {getattr(torch, dtype)}
    assert {k: v.shape for k, v in built.state_dict().items()} == {
        k: v.shape for k, v in reference.state_dict().items()
    }
    assert not built.training
    assert not any(p.requires_grad for p in built.parameters())
    assert built.config._attn_implementation == "raytier"


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_bound_to_the_build_give_the_same_logits(name: str, make_model: MakeModel) -> None:
    """The build is complete: nothing that the forward pass reads is left on meta or has another value."""
    path = make_model(name)
    reference = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    built = build_meta(load_config(str(path)), "float32")
    built.load_state_dict(reference.state_dict(), assign=True)
    built.set_attn_implementation("eager")
    ids = torch.arange(3, 27)[None]
    with torch.no_grad():
        assert torch.equal(built(ids).logits, reference(ids).logits)


def test_config_is_not_changed_and_ties_are_kept() -> None:
    config = family_config("llama-llama3-rope")
    before = config.to_dict()
    model = build_meta(config, "bfloat16")
    assert config.to_dict() == before
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_uncovered_buffer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = construct(family_config("llama"), "float32")
    monkeypatch.setattr(PreTrainedModel, "_init_weights", lambda self, module: None)
    with pytest.raises(UnsupportedModelError, match="inv_freq cannot be rebuilt"):
        restore_buffers(model)


def test_a_70b_config_builds_without_memory(tmp_path: Path) -> None:
    LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    ).save_pretrained(tmp_path)
    process = psutil.Process()
    before, start = process.memory_info().rss, time.monotonic()
    manifest = describe_config(str(tmp_path))
    assert time.monotonic() - start < 15
    assert process.memory_info().rss - before < 500 * 2**20
    assert manifest.nbytes == 141_107_412_992
    assert manifest.compute_dtype == "bfloat16"
    assert manifest.files == ()
    assert not any(p.extents for p in manifest.parameters)


@pytest.mark.parametrize(
    ("name", "prefix"), [("llama", "model.layers"), ("gpt2", "transformer.h"), ("gpt_neox", "gpt_neox.layers")]
)
def test_decoder_layers(name: str, prefix: str) -> None:
    model = construct(family_config(name), "float32")
    assert layer_prefix(model) == prefix
    assert len(decoder_layers(model)) == 4


WINDOWS = {
    "mistral": [8] * 4,
    "gemma2": [8, None, 8, None],
    "gemma3_text": [8, None, 8, None],
    "phi3": [12] * 4,
    "qwen2": [None, None, None, 16],  # max_window_layers = 3
    "qwen2-yarn-rope": [None] * 4,  # use_sliding_window is off
}


@pytest.mark.parametrize("name", FAMILIES)
def test_kv_layers(name: str) -> None:
    layers = probe(construct(family_config(name), "float32")).kv_layers
    assert [layer.sliding_window for layer in layers] == WINDOWS.get(name, [None] * 4)
    heads = 4 if name in ("gpt2", "gpt_neox") else 2
    dim = 16 if name in ("qwen3", "gemma2", "gemma3_text") else 8
    assert {(layer.num_kv_heads, layer.key_dim, layer.value_dim) for layer in layers} == {(heads, dim, dim)}


def test_latent_attention_keeps_its_two_widths() -> None:
    config = CONFIG_MAPPING["minicpm3"](
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=6,
    )
    layers = probe(construct(config, "float32")).kv_layers
    assert [(layer.key_dim, layer.value_dim) for layer in layers] == [(12, 6)] * 2


LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 10000.0}
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 64}


@pytest.mark.parametrize(
    ("model_type", "values", "says"),
    [
        ("bert", {}, "encoder"),
        ("bert", {"is_decoder": True}, "encoder"),
        ("roberta", {}, "encoder"),
        ("bart", {}, "encoder"),
        ("bert-generation", {}, "decoder of another model"),
        ("mamba", {}, "recurrent or convolution state"),
        ("bloom", {}, "does not support the attention interface"),
        ("deepseek_v32", {}, "indexed_attention"),
        ("llama4_text", {}, "chunked_attention"),
        ("llama4", {}, "one part of it"),
        ("moshi", SMALL | {"sliding_window": 8}, "attends to all tokens while its config states a window of 8"),
        ("doge", SMALL, "builds its own attention mask"),
        ("gemma3_text", SMALL | {"use_bidirectional_attention": True}, "in both directions"),
        ("llama", SMALL | {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ("llama", SMALL | {"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantised checkpoint \(gptq"),
        ("llama", SMALL | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "dynamic"),
        (
            "phi3",
            SMALL | {"rope_parameters": LONG, "original_max_position_embeddings": 32, "max_position_embeddings": 64},
            "longrope",
        ),
        (
            "gemma3_text",
            SMALL
            | {
                "layer_types": ["sliding_attention", "full_attention"],
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                },
            },
            "dynamic",
        ),
    ],
)
def test_refusals_name_reason_and_nearest(model_type: str, values: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says) as caught:
        probe(construct(CONFIG_MAPPING[model_type](**values), "float32"))
    assert "Nearest supported: " in caught.value.message


def test_windows_that_only_the_mask_states_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """qwen2_moe and phimoe do so."""
    model = construct(family_config("mistral"), "float32")
    config = model.config
    for layer in decoder_layers(model):
        monkeypatch.setattr(layer.self_attn, "config", type(config)(**config.to_dict() | {"sliding_window": None}))
        layer.self_attn.config._attn_implementation = "raytier_probe"
    assert [layer.sliding_window for layer in probe(model).kv_layers] == [8] * 4


def test_several_attention_calls_of_a_layer_have_a_cache_each() -> None:
    """diffllama attends twice with the same keys and other values."""
    layers = probe(construct(CONFIG_MAPPING["diffllama"](**SMALL), "float32")).kv_layers
    assert [layer.layer for layer in layers] == [0, 0, 1, 1]


def test_experts_are_seen() -> None:
    config = CONFIG_MAPPING["mixtral"](**SMALL | {"num_local_experts": 6, "num_experts_per_tok": 3})
    banks = probe(construct(config, "float32")).experts
    assert banks == tuple(ExpertBank(f"model.layers.{n}.mlp.experts", n, 6, 3) for n in range(2))


def test_convolutions_are_refused() -> None:
    model = construct(family_config("llama"), "float32")
    mlp = model.model.layers[1].mlp
    mlp.conv = torch.nn.Conv1d(3, 3, 3, padding=1, device="meta")
    mlp.register_forward_pre_hook(lambda module, args: (module.conv(args[0]),))
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.conv"):
        probe(model)


def test_probe_leaves_the_model_ready_after_a_failure() -> None:
    model = construct(family_config("llama"), "float32")
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match="both directions"):
        probe(model)
    assert model.config._attn_implementation == "raytier"


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        (None, CheckpointError, "missing"),
        ("{", CheckpointError, "not valid JSON"),
        ("[]", CheckpointError, "object is needed"),
        ("{}", CheckpointError, "model_type"),
        (json.dumps({"model_type": "llama", "hidden_size": "many"}), CheckpointError, "not a valid llama config"),
        (json.dumps({"model_type": "nonesuch"}), UnsupportedModelError, "not part of transformers"),
        (
            json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config"}}),
            UnsupportedModelError,
            "own code .* is not run",
        ),
    ],
)
def test_bad_configs(tmp_path: Path, content: str | None, error: type[Exception], says: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(error, match=says) as caught:
        load_config(str(tmp_path))
    assert str(tmp_path / "config.json") in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_code_of_the_model_is_not_run_where_transformers_has_its_own(tmp_path: Path) -> None:
    raw = family_config("llama").to_dict() | {"auto_map": {"AutoConfig": "evil.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass")
    assert causal_lm_class(load_config(str(tmp_path))).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()


def test_parts_that_do_not_continue_text_are_left_out(tmp_path: Path) -> None:
    """E2: a model that takes images too runs on text alone, and its tower is not even read."""
    text = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    CONFIG_MAPPING["gemma3"](text_config=text, vision_config=vision).save_pretrained(tmp_path)
    names = [p.name for p in describe_config(str(tmp_path)).parameters]
    assert any(".language_model.layers.1." in name for name in names)
    assert not any("vision" in name or "projector" in name for name in names)
