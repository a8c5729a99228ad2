"""The same engine with a CUDA device: resident, streamed from disk, and over the bus from the host tier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.architectures.test_token_identity import GREEDY, expected, prompts
from tests.local_engine import PLACEMENTS, local_engine

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt2"])
@pytest.mark.parametrize("placement", list(PLACEMENTS))
def test_tokens_are_those_of_transformers(family: str, placement: str, make_model: Callable[..., Path]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    model_dir = make_model(family)
    with local_engine(
        model_dir, device="cuda:0", placement={"rules": PLACEMENTS[placement]}, tiers={"device": {"max_mb": 64}}
    ) as local:
        outputs = local.engine.generate(prompts(), GREEDY)
        assert [list(o.token_ids) for o in outputs] == expected(model_dir)
        local.check_bytes()


def test_memory_comes_back(make_model: Callable[..., Path]) -> None:
    model_dir = make_model("llama")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with local_engine(model_dir, device="cuda:0", tiers={"device": {"max_mb": 64}}) as local:
        local.engine.generate(prompts(), GREEDY)
        assert torch.cuda.memory_allocated() > before
    del local
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before
