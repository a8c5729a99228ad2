"""G2, D1, D6: greedy output is token-identical to transformers, wherever the weights live and however steps are cut."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raytier.engine.sampling_params import SamplingParams
from tests.checkpoint.families import FAMILIES, VOCAB
from tests.local_engine import PLACEMENTS, local_engine

LENGTHS = (1, 41, 7, 16, 23)  # below, at and above block borders, chunk borders and every window
NEW_TOKENS = 14
GREEDY = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=NEW_TOKENS, ignore_eos=True)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


def expected(model_dir: Path) -> list[list[int]]:
    """What transformers generates, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    outputs = []
    for prompt in prompts():
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
        )
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


@pytest.mark.parametrize("family", list(FAMILIES))
def test_family(family: str, make_model: Callable[..., Path]) -> None:
    model_dir = make_model(family)
    wanted = expected(model_dir)
    assert len({tuple(tokens) for tokens in wanted}) > 1, "all outputs alike: the test would see no mix-up"
    for placement, rules in PLACEMENTS.items():
        for chunk in (7, 64):
            with local_engine(
                model_dir,
                packed=chunk == 64,
                placement={"rules": rules},
                scheduler={"max_num_batched_tokens": chunk},
                tiers={"device": {"max_mb": 64}, "nvme": {"io_threads": 2, "io_mb": 0.0625}},
            ) as local:
                local.runner.wait_loaded()  # packed by then
                outputs = local.engine.generate(prompts(), GREEDY)
                assert [list(o.token_ids) for o in outputs] == wanted, f"{placement}, chunks of {chunk}"
                local.check_bytes()
                share = local.manifest.nbytes - local.plan.nvme_bytes
                if placement == "streamed":
                    assert share < 0.1 * local.manifest.nbytes, "only norms and biases may be resident"
                elif placement == "host":
                    assert 0.2 < local.plan.host_bytes / local.manifest.nbytes < 0.8
                    assert local.runner.memory()["host"] >= local.plan.host_bytes
                elif placement == "half":
                    assert 0.2 < local.plan.nvme_bytes / local.manifest.nbytes < 0.8
