"""A model's tokenizer in a form that processes without transformers can run (the `tokenizers` library alone)."""

from __future__ import annotations

import json
import os
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from raytier.checkpoint.defaults import end_of_sequence_ids
from raytier.checkpoint.manifest import TokenizerSpec
from raytier.errors import CheckpointError, UnsupportedModelError

#: Any one of these makes a tokenizer (vocab.json goes with merges.txt).
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")

#: Texts that tell apart whether special tokens, spaces, newlines, accents and unknown signs are treated alike.
_SAMPLES = (
    "",
    "Hello world",
    " two  spaces\n\n\ttab",
    "na\u00efve caf\u00e9, 12345 \u4f60\u597d \U0001f600",
    "def f(x):\n    return x",
)


def describe_tokenizer(model_dir: str, class_eos: object = None) -> TokenizerSpec:
    """The tokenizer of a local model directory.

    `tokenizers.Tokenizer.from_str(spec.tokenizer_json).encode(text).ids` equals `AutoTokenizer(...)(text).input_ids`,
    special tokens included; this is checked on samples.

    Args:
        class_eos: `eos_token_id` of the config object, see `end_of_sequence_ids`.

    Raises:
        CheckpointError: no tokenizer, or its files cannot be read.
        UnsupportedModelError: the tokenizer has no serialisable form.
    """
    root = os.path.abspath(model_dir)
    if not any(os.path.exists(os.path.join(root, name)) for name in _TOKENIZER_FILES):
        raise CheckpointError(
            f"{root}: no tokenizer: tokenizer.json (best), tokenizer.model, or vocab.json with merges.txt is needed, "
            "with tokenizer_config.json; copy them from the model's repository"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # parsers of a dozen formats raise what they like, down to bare Exception
        raise CheckpointError(f"{root}: the tokenizer cannot be read: {' '.join(str(error).split())[:300]}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise UnsupportedModelError(
            f"{root}: {type(tokenizer).__name__} has no `tokenizers` form; nearest supported: add a tokenizer.json"
        )
    serialised = json.loads(backend.to_str())
    # A call without arguments neither truncates nor pads, whatever the file was saved with.
    serialised["truncation"] = serialised["padding"] = None
    text = json.dumps(serialised, ensure_ascii=False)
    _check_same(root, tokenizer, Tokenizer.from_str(text))

    special = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if not isinstance(value, list)}
    own_eos = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return TokenizerSpec(
        tokenizer_json=text,
        chat_template=_chat_template(tokenizer.chat_template),
        special_tokens=special,
        bos_token_id=None if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id),
        eos_token_ids=tuple(dict.fromkeys([*own_eos, *end_of_sequence_ids(root, class_eos)])),
    )


def _chat_template(template: object) -> str | None:
    """The template for plain chat; a model may have further ones (tool use, retrieval)."""
    if isinstance(template, dict):
        template = template.get("default")
    return template if isinstance(template, str) else None


def _check_same(root: str, tokenizer: Any, backend: Tokenizer) -> None:
    special = [str(t) for t in tokenizer.all_special_tokens]
    for sample in (*_SAMPLES, *(f"a{t} b{t}{t}" for t in special)):
        if backend.encode(sample).ids != tokenizer(sample).input_ids:
            raise UnsupportedModelError(
                f"{root}: {type(tokenizer).__name__} encodes {sample!r} differently from its serialised form; "
                "nearest supported: a checkpoint with a plain tokenizer.json"
            )
