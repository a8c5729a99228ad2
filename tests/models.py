"""Tiny random models, and a tokenizer trained on the spot: fixtures, imported by the conftest files that need them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.checkpoint.families import VOCAB, family_config


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that puts `<s>` in front, with a chat template."""
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


def save_tokenizer(path: Path) -> None:
    """The tokenizer of `tokenizer_dir` in `path`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog", "Hello world, hello you"] * 4, trainer
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.enable_truncation(8)  # as left behind by a training script; must not reach the serving side
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=128
    )
    fast.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    fast.save_pretrained(path)


def save_model(
    path: Path,
    name: str,
    tokenizer_dir: Path,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    fill: Callable[[torch.Tensor], object] = torch.Tensor.normal_,
    **changes: Any,
) -> Path:
    """Save a random model of a family in `path`, with a tokenizer; `changes` are keys of its config."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(family_config(name, **changes), dtype=dtype)
    for parameter in model.parameters():
        fill(parameter.data)  # norms and biases too: constant ones would hide a swap
    model.save_pretrained(path, max_shard_size=max_shard_size)
    for file in tokenizer_dir.iterdir():
        shutil.copy(file, path)
    return path


MakeModel = Callable[..., Path]


@pytest.fixture
def make_model(tmp_path: Path, tokenizer_dir: Path) -> MakeModel:
    """Save a random model of a family, with a tokenizer; returns its directory."""

    def make(name: str, **options: Any) -> Path:
        return save_model(tmp_path / name, name, tokenizer_dir, **options)

    return make


def transformers_greedy(model_dir: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """What transformers' `generate` continues `prompts` with, one at a time: `count` tokens, whatever they are."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def random_prompts(*lengths: int, vocab: int = VOCAB) -> list[list[int]]:
    """Prompts of these lengths, without special tokens; the same ones in every run."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocab, (length,), generator=generator).tolist() for length in lengths]
