"""E8: the tokenizer as a process without transformers gets it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from raytier.checkpoint.tokenizer import describe_tokenizer
from raytier.errors import CheckpointError, UnsupportedModelError

TEXTS = ["", "Hello world", "the quick  brown\n\tfox </s> jumps", "naïve 你好 😀", "x" * 500, "<s>Hello</s></s>"]


@pytest.fixture
def path(tokenizer_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tokenizer_dir, tmp_path / "model"))


def test_same_ids_as_transformers(path: Path) -> None:
    spec = describe_tokenizer(str(path))
    real = AutoTokenizer.from_pretrained(path)
    ours = Tokenizer.from_str(spec.tokenizer_json)
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=spec.add_special_tokens).ids
        assert ids == real(text).input_ids
        assert ids[0] == spec.bos_token_id == 1
        assert ours.decode(ids, skip_special_tokens=True) == real.decode(ids, skip_special_tokens=True)
        assert ours.encode(text, add_special_tokens=False).ids == real(text, add_special_tokens=False).input_ids


def test_spec(path: Path) -> None:
    spec = describe_tokenizer(str(path))
    assert spec.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert spec.eos_token_ids == (2,)
    assert spec.chat_template is not None
    assert "bos_token" in spec.chat_template


def test_ends_of_sequence_are_united(path: Path) -> None:
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 2]}))
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 6}))
    assert describe_tokenizer(str(path)).eos_token_ids == (2, 5, 6)


def test_several_templates_give_the_default(path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = {"default": "D", "tool_use": "T"}
    tokenizer.save_pretrained(path)
    assert describe_tokenizer(str(path)).chat_template == "D"


def test_no_template(path: Path) -> None:
    (path / "chat_template.jinja").unlink()
    assert describe_tokenizer(str(path)).chat_template is None


def test_no_tokenizer_says_which_files_are_wanted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json .* tokenizer\.model, or vocab\.json with merges\.txt"):
        describe_tokenizer(str(tmp_path))


def test_damaged_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        describe_tokenizer(str(path))


def test_what_the_serialised_form_cannot_say_is_refused(path: Path) -> None:
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"split_special_tokens": True}))
    assert AutoTokenizer.from_pretrained(path)("</s>").input_ids != [1, 2]
    with pytest.raises(UnsupportedModelError, match=r"encodes .* differently"):
        describe_tokenizer(str(path))
