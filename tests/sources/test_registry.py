"""E3: models.yaml is validated with file, entry and field, and written back with its comments."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raytier.config import parse_config
from raytier.errors import ConfigurationError, ModelNotFoundError
from raytier.model_entry import ModelEntry
from raytier.sources.registry import Registry, parse_entry, read_models

TEXT = """\
# Our models; ask Ada before you change this.
models:
# the small one
- model_id: small   # for tests
  source_type: local
  source_path: "/models/small"
  model_format: safetensors

- model_id: big
  source_type: huggingface
  source_path: org/big
  model_format: transformers_pt
  custom_loader_params:
    shard: 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text(TEXT)
    return path


def test_entries_are_read_in_order(file: Path) -> None:
    small, big = read_models(str(file))
    assert (small.model_id, small.source_path, small.revision, small.trust_remote_code) == (
        "small",
        "/models/small",
        "main",
        False,
    )
    assert (big.source_type, big.model_format, big.custom_loader_params) == (
        "huggingface",
        "transformers_pt",
        {"shard": 3},
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("model_format: safetensors", "model_format: pickle"), r"models\[0\] \(small\): model_format: .*'pickle'"),
        (
            ("model_format: safetensors", "model_format: gguf"),
            r"models\[0\] \(small\): model_format: gguf files are not",
        ),
        (("  model_format: safetensors\n", ""), r"models\[0\] \(small\): model_format: required, not given"),
        (
            ('"/models/small"', "models/small"),
            r"models\[0\] \(small\): .*source_path: 'models/small' must be an absolute",
        ),
        (("model_id: big", "model_id: small"), r"models\[1\] \(small\): model_id: models\[0\] has it already"),
        (("- model_id: big", "- model_id: [big]"), r"models\[1\]: model_id: .*string"),
        (("    shard: 3", "    shard: 3\n  quantization_bits: 5"), r"\(big\): quantization_bits: .*value 5"),
        (
            ("    shard: 3", "    shard: 3\n  qantization: 4"),
            r"\(big\): qantization: unknown key; known here: model_id",
        ),
        (("    shard: 3", "    shard: 3\n  required_ram_mb: -1"), r"\(big\): required_ram_mb: "),
        (("    shard: 3", "    shard: 3\n  model_id: big"), r"not valid YAML: .*duplicate key"),
        (("models:\n", "model:\n"), "unknown keys model"),
        (("# the small one\n- ", "# the small one\n- just a name\n- "), r"models\[0\]: a mapping of fields"),
        (("    shard: 3", "    shard: !!python/object/apply:os.system ['true']"), "custom_loader_params|shard"),
    ],
)
def test_what_is_wrong_names_file_entry_and_field(file: Path, change: tuple[str, str], message: str) -> None:
    assert change[0] in TEXT
    file.write_text(TEXT.replace(*change, 1))
    if "python" in change[1]:  # nothing is executed; the tag is data that a loader may refuse
        assert read_models(str(file))[1].custom_loader_params["shard"] is not None
        return
    with pytest.raises(ConfigurationError, match=message) as raised:
        read_models(str(file))
    assert str(file) in raised.value.message


def test_all_problems_are_told_at_once(file: Path) -> None:
    file.write_text(TEXT.replace("safetensors", "tar").replace("transformers_pt", "zip"))
    with pytest.raises(ConfigurationError) as raised:
        read_models(str(file))
    assert raised.value.message.count("model_format") == 2


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"none.yaml: .*cannot be read: No such file"):
        read_models(str(tmp_path / "none.yaml"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        read_models(str(tmp_path / "binary"))
    (tmp_path / "empty.yaml").write_text("# nothing yet\n")
    assert read_models(str(tmp_path / "empty.yaml")) == []


def test_registering_keeps_comments_order_and_what_others_wrote(file: Path) -> None:
    registry = Registry.of(parse_config({"registry": str(file)}))
    os.chmod(file, 0o640)
    file.write_text(TEXT.replace("shard: 3", "shard: 4  # of 8"))
    new = parse_entry({"model_id": "new", "source_path": "/models/new", "pinned": True})
    assert registry.put(new, persist=True)
    assert registry.put(parse_entry({**registry.get("small").public(), "revision": "v2"}), persist=True)
    assert not registry.put(registry.get("small"), persist=True), "it says so already"
    text = file.read_text()
    for kept in ("# Our models", "# the small one", "# for tests", '"/models/small"', "shard: 4  # of 8"):
        assert kept in text
    assert [entry.model_id for entry in read_models(str(file))] == ["small", "big", "new"] == registry.ids
    assert read_models(str(file))[0].revision == "v2"
    assert read_models(str(file))[2].pinned
    assert file.stat().st_mode & 0o777 == 0o640
    assert os.listdir(file.parent) == ["models.yaml"], "no temporary file is left"


def test_fields_that_are_not_given_any_more_go(file: Path) -> None:
    registry = Registry.of(parse_config({"registry": str(file)}))
    fields = registry.get("big").public()
    del fields["custom_loader_params"]
    registry.put(parse_entry(fields), persist=True)
    assert "shard" not in file.read_text()


def test_secrets_are_used_and_never_written(file: Path) -> None:
    registry = Registry.of(parse_config({"registry": str(file)}))
    params = {"bucket": "b", "secret_key": "s3cret", "auth": {"api_key": "k3y", "user": "u"}}
    entry = parse_entry({"model_id": "new", "source_path": "/models/new", "custom_loader_params": params})
    registry.put(entry, persist=True)
    assert registry.get("new").custom_loader_params["secret_key"] == "s3cret"
    text = file.read_text()
    assert "s3cret" not in text and "k3y" not in text
    assert read_models(str(file))[2].custom_loader_params == {"bucket": "b", "auth": {"user": "u"}}


def test_a_file_that_is_broken_meanwhile_is_left_alone(file: Path) -> None:
    registry = Registry.of(parse_config({"registry": str(file)}))
    file.write_text(TEXT.replace("safetensors", "tar"))
    before = file.read_text()
    with pytest.raises(ConfigurationError, match="tar"):
        registry.put(parse_entry({"model_id": "new", "source_path": "/models/new"}), persist=True)
    assert file.read_text() == before
    assert registry.ids == ["small", "big"]


def test_without_a_file_nothing_can_be_persisted() -> None:
    registry = Registry.of(parse_config({"models": [{"model_id": "a", "source_path": "/a"}]}))
    entry = ModelEntry(model_id="b", source_path="/b")
    with pytest.raises(ConfigurationError, match="name a file in `registry`"):
        registry.put(entry, persist=True)
    assert registry.put(entry, persist=False)
    assert not registry.put(entry, persist=False)
    assert registry.ids == ["a", "b"]


def test_names_mean_models(file: Path) -> None:
    registry = Registry.of(parse_config({"registry": str(file)}))
    assert registry.resolve(None) == registry.resolve("/models/small") == registry.startup == "small"
    assert registry.resolve("org/big") == registry.resolve("big") == "big"
    with pytest.raises(ModelNotFoundError, match="served are: small, big"):
        registry.resolve("other")
    none = Registry.of(parse_config({"registry": str(file), "startup_model": None}))
    with pytest.raises(ModelNotFoundError, match="say which"):
        none.resolve(None)
    with pytest.raises(ConfigurationError, match="'x' is not one of small, big"):
        Registry.of(parse_config({"registry": str(file), "startup_model": "x"}))


@pytest.mark.parametrize(
    "args", [{}, {"models": []}, {"models": [{"model_id": "a", "source_path": "/a"}], "registry": "m"}]
)
def test_models_are_in_the_configuration_or_in_a_file(args: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError, match="either models"):
        parse_config(args)
