"""D2, E8: parameters to extents, ties, defaults."""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Transpose, WeightConverter, WeightRenaming

from raytier.checkpoint import stored
from raytier.checkpoint.describe import describe_config, describe_model
from raytier.checkpoint.manifest import ModelManifest, Parameter, Role
from raytier.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from tests.checkpoint.families import FAMILIES, VOCAB
from tests.models import MakeModel


def read(manifest: ModelManifest, parameter: Parameter) -> torch.Tensor:
    data = bytearray()
    for extent in parameter.extents:
        with open(manifest.files[extent.file].path, "rb") as file:
            file.seek(extent.offset)
            data += file.read(extent.nbytes)
    return torch.frombuffer(data, dtype=getattr(torch, parameter.dtype)).reshape(parameter.shape)


def assert_holds_the_model(manifest: ModelManifest, path: Path) -> None:
    """The bytes at the extents, under all names, are exactly the state dict that from_pretrained loads."""
    expected = AutoModelForCausalLM.from_pretrained(path, dtype=manifest.compute_dtype).state_dict()
    found = {}
    for parameter in manifest.parameters:
        value = read(manifest, parameter).to(getattr(torch, manifest.compute_dtype))
        found.update(dict.fromkeys((parameter.name, *parameter.aliases), value))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", FAMILIES)
def test_extents_hold_the_parameters(name: str, make_model: MakeModel) -> None:
    path = make_model(name, dtype=torch.bfloat16)
    manifest = describe_model(str(path)).manifest
    assert_holds_the_model(manifest, path)
    assert manifest.compute_dtype == "bfloat16"
    assert (manifest.num_layers, manifest.hidden_size, manifest.vocab_size) == (4, 32, VOCAB)
    assert manifest.model_dir == str(path)
    assert manifest.model_type == FAMILIES[name][0]
    for index in range(4):
        names = [p.name for p in manifest.layer_parameters(index)]
        assert len(names) == len(manifest.layer_parameters(0)) > 0
        assert all(f".{index}." in n for n in names)
    others = [p.name for p in manifest.parameters if p.role is Role.OTHER]
    assert all("norm" in n or "ln_f" in n or "wpe" in n for n in others)
    assert others
    assert manifest.by_name[manifest.embedding].role is Role.EMBEDDING
    assert pickle.loads(pickle.dumps(manifest)) == manifest  # noqa: S301


def test_tied_is_one_parameter_and_untied_two(make_model: MakeModel) -> None:
    tied = describe_model(str(make_model("qwen2"))).manifest
    assert tied.tied
    assert tied.embedding == tied.head == "model.embed_tokens.weight"
    assert tied.by_name[tied.head].aliases == ("lm_head.weight",)
    untied = describe_model(str(make_model("llama"))).manifest
    assert not untied.tied
    assert untied.head == "lm_head.weight"
    assert untied.by_name[untied.head].role is Role.HEAD
    assert untied.by_name[untied.embedding].aliases == ()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_shards(name: str, make_model: MakeModel) -> None:
    path = make_model(name, max_shard_size="30KB")
    manifest = describe_model(str(path)).manifest
    assert len(manifest.files) > 2
    assert {e.file for p in manifest.parameters for e in p.extents} == set(range(len(manifest.files)))
    assert [f.size for f in manifest.files] == [Path(f.path).stat().st_size for f in manifest.files]
    assert_holds_the_model(manifest, path)


@pytest.mark.parametrize("name", FAMILIES)
def test_config_alone_gives_the_same_manifest_without_bytes(name: str, make_model: MakeModel, tmp_path: Path) -> None:
    path = make_model(name, dtype=torch.bfloat16)
    full = describe_model(str(path)).manifest
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_bytes((path / "config.json").read_bytes())
    bare = describe_config(str(tmp_path / "bare"))
    assert bare.files == ()
    assert [(p.name, p.shape, p.dtype, p.role, p.layer, p.aliases) for p in bare.parameters] == [
        (p.name, p.shape, p.dtype, p.role, p.layer, p.aliases) for p in full.parameters
    ]
    assert (bare.kv_layers, bare.head, bare.nbytes) == (full.kv_layers, full.head, full.nbytes)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(path: Path, **values: Any) -> None:
    raw = json.loads(path.read_text()) if path.exists() else {}
    raw |= values
    path.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def test_tied_config_with_two_equal_tensors_stays_tied(make_model: MakeModel) -> None:
    path = make_model("qwen2")
    rewrite(path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    manifest = describe_model(str(path)).manifest
    assert manifest.tied
    assert_holds_the_model(manifest, path)


def test_tied_config_with_two_different_tensors_comes_apart(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_model("qwen2")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][-1, -1] += 1  # seen only by comparing to the end

    rewrite(path, change)
    manifest = describe_model(str(path)).manifest
    assert not manifest.tied
    assert manifest.by_name["lm_head.weight"].role is Role.HEAD
    assert "not tied" in caplog.text
    assert_holds_the_model(manifest, path)


def test_tied_config_with_the_head_only(make_model: MakeModel) -> None:
    path = make_model("qwen2")
    rewrite(path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    manifest = describe_model(str(path)).manifest
    assert manifest.tied
    assert manifest.embedding == "model.embed_tokens.weight"
    assert_holds_the_model(manifest, path)


def test_names_without_the_base_prefix(make_model: MakeModel) -> None:
    """As in the original gpt2 checkpoint, which was saved from the base model."""
    path = make_model("gpt2")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)  # a buffer that old checkpoints stored
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)

    rewrite(path, change)
    manifest = describe_model(str(path)).manifest
    assert manifest.embedding == "transformer.wte.weight"
    assert_holds_the_model(manifest, path)


def test_rules_of_transformers_are_applied(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_model("llama")
    expected = AutoModelForCausalLM.from_pretrained(path).state_dict()

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "input_layernorm" in n]:
            tensors[name.replace("input_layernorm", "old_norm")] = tensors.pop(name)

    rewrite(path, change)
    rename = WeightRenaming("old_norm", "input_layernorm")
    monkeypatch.setattr(stored, "get_model_conversion_mapping", lambda model: [rename])
    manifest = describe_model(str(path)).manifest
    name = "model.layers.2.input_layernorm.weight"
    assert torch.equal(read(manifest, manifest.by_name[name]), expected[name])

    # A rule that would rename what the model has under the stored name does not apply.
    over = WeightRenaming("post_attention_layernorm", "elsewhere")
    monkeypatch.setattr(stored, "get_model_conversion_mapping", lambda model: [rename, over])
    assert describe_model(str(path)).manifest == manifest

    convert = WeightConverter("old_norm", "input_layernorm", operations=[Transpose()])
    monkeypatch.setattr(stored, "get_model_conversion_mapping", lambda model: [convert])
    with pytest.raises(
        UnsupportedModelError, match=r"input_layernorm\.weight is converted from the checkpoint by Transpose"
    ):
        describe_model(str(path))


def test_two_tensors_for_one_parameter_are_refused(make_model: MakeModel) -> None:
    path = make_model("gpt2")
    rewrite(path, lambda t: t.update({"ln_f.weight": torch.ones(32)}))
    with pytest.raises(CheckpointError, match=r"both 'ln_f\.weight' and 'transformer\.ln_f\.weight'"):
        describe_model(str(path))


def test_unused_tensors_warn_once_and_known_ones_do_not(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_model("llama")
    rewrite(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    with caplog.at_level(logging.WARNING, logger="raytier"):
        describe_model(str(path))
    assert not caplog.records
    rewrite(path, lambda t: t.update({"vision.weight": torch.ones(4), "vision.bias": torch.ones(4)}))
    with caplog.at_level(logging.WARNING, logger="raytier"):
        describe_model(str(path))
    assert len(caplog.records) == 1
    assert "2 tensors are not used by LlamaForCausalLM: vision.bias, vision.weight" in caplog.text


def test_missing_parameters_are_named(make_model: MakeModel) -> None:
    path = make_model("llama")
    gone = [f"model.layers.{i}.{n}.weight" for i in range(4) for n in ("mlp.up_proj", "input_layernorm")]
    rewrite(path, lambda t: [t.pop(name) for name in gone])
    with pytest.raises(CheckpointError, match=r"8 parameters of LlamaForCausalLM") as caught:
        describe_model(str(path))
    assert sum(name in caught.value.message for name in gone) == 5
    assert "looked in model.safetensors" in caught.value.message


def test_wrong_shape_names_both(make_model: MakeModel) -> None:
    path = make_model("llama")
    rewrite(path, lambda t: t.update({"model.norm.weight": torch.ones(33)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \[33\] .* asks for \[32\]"):
        describe_model(str(path))


def test_unreadable_dtype_is_refused_only_where_needed(make_model: MakeModel) -> None:
    path = make_model("llama")
    rewrite(path, lambda t: t.update({"unused": torch.ones(4).to(torch.float8_e4m3fn)}))
    describe_model(str(path))
    rewrite(path, lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.float8_e4m3fn)}))
    with pytest.raises(UnsupportedModelError, match=r"model\.norm\.weight is stored as F8_E4M3"):
        describe_model(str(path))


def test_damaged_files(make_model: MakeModel) -> None:
    path = make_model("llama", max_shard_size="30KB")
    shard = sorted(path.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"{shard.name}: truncated"):
        describe_model(str(path))
    shard.write_bytes(content[:8] + b"x" + content[9:])
    with pytest.raises(CheckpointError, match=f"{shard.name}: safetensors header: not valid JSON"):
        describe_model(str(path))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"shards missing: {shard.name}"):
        describe_model(str(path))


def test_compute_dtype(make_model: MakeModel) -> None:
    path = make_model("llama", dtype=torch.float16)
    assert describe_model(str(path)).manifest.compute_dtype == "float16"
    edit_json(path / "config.json", dtype="float32")
    manifest = describe_model(str(path)).manifest
    assert manifest.compute_dtype == "float32"
    assert {p.dtype for p in manifest.parameters} == {"float16"}
    assert_holds_the_model(manifest, path)
    edit_json(path / "config.json", dtype=...)
    rewrite(path, lambda t: t.update({"model.norm.weight": torch.ones(32)}))
    manifest = describe_model(str(path)).manifest
    assert manifest.compute_dtype == "float16"  # of most bytes
    assert manifest.by_name["model.norm.weight"].dtype == "float32"
    edit_json(path / "config.json", dtype="float64")
    with pytest.raises(UnsupportedModelError, match="float64"):
        describe_model(str(path))


def test_context(make_model: MakeModel) -> None:
    path = make_model("gpt2")
    assert describe_model(str(path)).manifest.max_context == 128
    for content, expected in (({"max_seq_len": 64}, 64), ({"max_sequence_length": 32, "max_seq_len": 64}, 32)):
        edit_json(path / "metadata.json", metadata={"llm": content})
        assert describe_model(str(path)).manifest.max_context == expected
    edit_json(path / "metadata.json", metadata={"llm": {"max_seq_len": 1000}})
    assert describe_model(str(path)).manifest.max_context == 128
    assert describe_model(str(make_model("qwen2-yarn-rope"))).manifest.max_context == 512


def test_metadata(make_model: MakeModel) -> None:
    path = make_model("llama")
    plain = describe_model(str(path))
    assert (plain.max_num_seqs, plain.kv_block_size, plain.kv_total_blocks) == (None, None, None)
    llm = {"scheduler": {"max_num_seqs": 7, "max_paddings": 3}, "kv_cache": {"block_size": 32, "total_blocks": 99}}
    for layout in ({"metadata": {"llm": llm}}, {"llm": llm}):
        (path / "metadata.json").write_text(json.dumps(layout))
        described = describe_model(str(path))
        assert (described.max_num_seqs, described.kv_block_size, described.kv_total_blocks) == (7, 32, 99)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "not valid JSON"),
        ("[]", "an object is needed"),
        ('{"metadata": 3}', "metadata: an object"),
        ('{"metadata": {"llm": []}}', r"metadata\.llm: an object"),
        ('{"metadata": {"llm": {"max_seq_len": "long"}}}', r"metadata\.llm\.max_seq_len: .*'long'"),
        ('{"metadata": {"llm": {"scheduler": {"max_num_seqs": 0}}}}', r"metadata\.llm\.scheduler\.max_num_seqs"),
        ('{"metadata": {"llm": {"kv_cache": {"block_size": true}}}}', r"metadata\.llm\.kv_cache\.block_size"),
    ],
)
def test_malformed_metadata(make_model: MakeModel, content: str, says: str) -> None:
    path = make_model("llama")
    (path / "metadata.json").write_text(content)
    with pytest.raises(ConfigurationError, match=says) as caught:
        describe_model(str(path))
    assert str(path / "metadata.json") in caught.value.message


def test_generation_defaults(make_model: MakeModel) -> None:
    path = make_model("llama")
    generation = path / "generation_config.json"
    generation.unlink()
    defaults = describe_model(str(path)).defaults
    assert (defaults.max_new_tokens, defaults.temperature, defaults.top_p, defaults.top_k) == (128, 0.7, 0.9, 0)
    assert defaults.stop_token_ids == (2,)

    edit_json(generation, do_sample=True, temperature=1, top_p=0.5, top_k=20, eos_token_id=[9, 2], max_new_tokens=None)
    defaults = describe_model(str(path)).defaults
    assert (defaults.max_new_tokens, defaults.temperature, defaults.top_p, defaults.top_k) == (128, 1.0, 0.5, 20)
    assert defaults.stop_token_ids == (9, 2)

    edit_json(generation, do_sample=False)
    assert describe_model(str(path)).defaults.temperature == 0
    edit_json(generation, temperature="hot")
    with pytest.raises(CheckpointError, match=r"generation_config\.json: temperature: 'hot'"):
        describe_model(str(path))


def test_end_of_sequence_of_the_config_class_counts_only_when_the_files_are_silent(make_model: MakeModel) -> None:
    path = make_model("llama")
    (path / "generation_config.json").unlink()
    edit_json(path / "config.json", eos_token_id=...)
    assert describe_model(str(path)).defaults.stop_token_ids == (2,)  # LlamaConfig's default, as transformers takes it
    edit_json(path / "generation_config.json", eos_token_id=[7, 8])
    assert describe_model(str(path)).defaults.stop_token_ids == (7, 8)
    edit_json(path / "config.json", eos_token_id=5)
    assert describe_model(str(path)).defaults.stop_token_ids == (7, 8, 5)
    edit_json(path / "config.json", eos_token_id="x")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        describe_model(str(path))
