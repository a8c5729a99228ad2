"""E8: what a model wishes for itself fills in what the configuration leaves open, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from raytier.checkpoint.manifest import KVLayerSpec, ModelDescription, ModelManifest, Parameter, Role, TokenizerSpec
from raytier.config import parse_config

MANIFEST = ModelManifest(
    model_dir="/m",
    architecture="LlamaForCausalLM",
    model_type="llama",
    files=(),
    parameters=(Parameter("embed", (8, 4), "float32", Role.EMBEDDING),),
    num_layers=1,
    hidden_size=4,
    vocab_size=8,
    max_context=64,
    compute_dtype="float32",
    kv_layers=(KVLayerSpec(2, 4, 4),),
    embedding="embed",
    head="embed",
)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, (5, 8, 20)),
        ({"scheduler": {"max_num_seqs": 32}}, (32, 8, 20)),
        ({"scheduler": {"max_queue": 9}, "kv": {"block_size": 16}}, (5, 16, 20)),
        ({"kv": {"max_blocks": 7, "expected_sequences": 2}}, (5, 8, 7)),
    ],
)
def test_wishes_fill_what_is_not_given(given: dict[str, Any], expected: tuple[int, int, int]) -> None:
    config = parse_config({"models": [{"model_id": "m", "source_path": "/m"}], **given})
    tokenizer = TokenizerSpec("{}", None, {}, None, ())
    description = ModelDescription(MANIFEST, tokenizer, max_num_seqs=5, kv_block_size=8, kv_total_blocks=20)
    wished = description.configure(config)
    assert (wished.scheduler.max_num_seqs, wished.kv.block_size, wished.kv.max_blocks) == expected
    assert wished.scheduler.max_queue == config.scheduler.max_queue
    assert description.configure(wished) == wished
    assert ModelDescription(MANIFEST, tokenizer).configure(config) == config


def test_bytes_and_invariants() -> None:
    assert MANIFEST.tied and MANIFEST.nbytes == 128 and MANIFEST.kv_token_bytes == 64
    with pytest.raises(ValueError, match="role layer"):
        Parameter("p", (1,), "float32", Role.LAYER)
