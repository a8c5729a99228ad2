"""B1, B2, G2: a model in another precision gives the tokens of the model that its weights stand for, on every tier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from raytier.checkpoint.manifest import ModelManifest
from raytier.codecs.forms import FORMS
from raytier.engine.sampling_params import SamplingParams
from raytier.planner.plan import Tier
from tests.local_engine import LocalEngine, local_engine
from tests.models import MakeModel, random_prompts

GREEDY = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=12, ignore_eos=True)
PROMPTS = random_prompts(5, 17, 2)
#: A shape whose matrices are of whole blocks.
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
PRECISIONS = ["int8", "int4-32", "int4-64", "int4-128"]


def stood_for(model_dir: Path, to: Path, manifest: ModelManifest, forms: dict[str, str]) -> Path:
    """A copy of the model, its parameters as they are in `forms`."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    weights = dict(model.named_parameters())
    for name, form in forms.items():
        weight = weights[name].data
        shape = tuple(weight.shape)
        data = FORMS[form].encode(weight.contiguous().view(torch.uint8).numpy().reshape(-1), "float32", shape)
        weight.copy_(torch.from_numpy(np.ascontiguousarray(FORMS[form].decode(data, shape))))
    model.save_pretrained(to)
    for file in model_dir.iterdir():
        if "token" in file.name:
            (to / file.name).write_bytes(file.read_bytes())
    return to


def tokens(local: LocalEngine) -> list[list[int]]:
    return [list(output.token_ids) for output in local.engine.generate(PROMPTS, GREEDY)]


def greedy(model_dir: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    outputs = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        mask = torch.ones_like(ids)
        out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None)
        outputs.append(out[0, len(prompt) :].tolist())
    return outputs


def settings_for(tier: str, precision: str) -> dict[str, Any]:
    return {
        "placement": {"rules": [{"pattern": "layers", "tier": tier}]},
        "precision": {
            tier: "auto",
            "adaptive_rules": [
                {"pattern": "re:down|k_proj", "precision": "source"},
                {"pattern": "layers", "precision": precision},
            ],
        },
        "tiers": {"device": {"max_mb": 64}},
    }


@pytest.mark.parametrize("tier", ["device", "host", "nvme"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_tokens_of_the_model_that_the_weights_stand_for(
    tier: str, precision: str, make_model: MakeModel, tmp_path: Path
) -> None:
    model_dir = make_model("llama", **SHAPE)
    with local_engine(model_dir, store=tmp_path, **settings_for(tier, precision)) as local:
        local.runner.wait_loaded()
        found = tokens(local)
        formed = {s.name: s.precision for s in local.runner.parameters() if s.precision != "source"}
        matrices = {p.name for p in local.manifest.parameters if p.layer is not None and p.matrix}
        assert formed == {n: precision for n in matrices if "down" not in n and "k_proj" not in n} and formed
        for status in local.runner.parameters():
            if status.name in formed:
                shape = local.manifest.by_name[status.name].shape
                assert status.current_nbytes == FORMS[precision].nbytes(shape) < status.nbytes / 3
        if tier == "nvme":
            total, steps = local.engine.stats().total, local.engine.stats().steps
            swept = sum(s.current_nbytes for s in local.runner.parameters() if s.tier is Tier.NVME)
            assert total.bytes_streamed == steps * swept  # what is read is what the form has
        expected = greedy(stood_for(model_dir, tmp_path / "same", local.manifest, formed))
    assert found == expected


@pytest.mark.parametrize("precision", ["int8", "int4-64"])
def test_a_tied_table_is_looked_up_and_computed_with(precision: str, make_model: MakeModel, tmp_path: Path) -> None:
    model_dir = make_model("llama", tie_word_embeddings=True, **SHAPE)
    with local_engine(model_dir, precision={"device": precision}, tiers={"device": {"max_mb": 64}}) as local:
        local.runner.wait_loaded()
        found = tokens(local)
        formed = {s.name: s.precision for s in local.runner.parameters() if s.precision != "source"}
        assert local.manifest.tied and local.manifest.embedding in formed
        expected = greedy(stood_for(model_dir, tmp_path / "same", local.manifest, formed))
    assert found == expected


@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
@pytest.mark.parametrize("precision", ["int8", "int4-64"])
def test_a_streamed_head_is_stored_in_the_pieces_that_it_is_used_in(
    precision: str, tied: bool, make_model: MakeModel, tmp_path: Path
) -> None:
    model_dir = make_model("llama", tie_word_embeddings=tied, **SHAPE)
    settings: dict[str, Any] = {
        "placement": {"rules": [{"pattern": "embed_tokens" if tied else "lm_head", "tier": "nvme"}]},
        "precision": {"nvme": precision},
        "tiers": {"device": {"max_mb": 64}},
    }
    with local_engine(model_dir, store=tmp_path, **settings) as local:
        found = tokens(local)
        head = local.runner._weights.manifest.by_name[local.manifest.head]
        assert head.stored is not None and head.stored.form is not None and len(head.stored.frames.pieces) >= 8
        formed = {s.name: s.precision for s in local.runner.parameters() if s.precision != "source"}
        assert formed == {head.name: precision}
        names = {} if tied else formed  # the rows of a tied table come from the checkpoint
        total = local.engine.stats().total
        assert total.bytes_streamed >= local.engine.stats().steps * head.stored.nbytes and total.damaged == 0
        expected = None if tied else greedy(stood_for(model_dir, tmp_path / "same", local.manifest, names))
    assert expected is None or found == expected


def test_lossy_weights_never_become_the_source_again(make_model: MakeModel, tmp_path: Path) -> None:
    """D5: from int4 on disk to the device, whose precision is the source's, and back."""
    model_dir = make_model("llama", **SHAPE)
    with local_engine(model_dir, store=tmp_path, **settings_for("nvme", "int4-64")) as local:
        moved = [p.name for p in local.manifest.parameters if p.layer is not None and p.matrix]
        rounded = tokens(local)
        local.runner.move(moved, Tier.DEVICE, {}, {})
        assert local.engine.clear_prefix_cache() > 0, "KV of rounded weights"
        exact = tokens(local)
        assert {s.precision for s in local.runner.parameters()} == {"source"}
    assert exact == greedy(model_dir) != rounded


def test_other_plain_precisions_are_cast(make_model: MakeModel, tmp_path: Path) -> None:
    """bf16 on disk of a model that computes in fp32."""
    model_dir = make_model("llama", **SHAPE)
    settings = settings_for("nvme", "bf16")
    with local_engine(model_dir, store=tmp_path, **settings) as local:
        found = tokens(local)
        formed = {s.name: s.precision for s in local.runner.parameters() if s.precision != "source"}
        assert set(formed.values()) == {"bf16"}
        expected = greedy(stood_for(model_dir, tmp_path / "same", local.manifest, formed))
    assert found == expected
