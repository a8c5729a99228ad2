"""B3, D2, D6, G2: what is coded on disk is decoded into the ring, and the tokens stay the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raytier.codecs import codec as codecs
from raytier.engine.sampling_params import SamplingParams
from raytier.execution import layout
from raytier.planner.plan import Tier
from tests.local_engine import PLACEMENTS, LocalEngine, local_engine
from tests.models import MakeModel, random_prompts, transformers_greedy

GREEDY = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=12, ignore_eos=True)
PROMPTS = random_prompts(5, 17, 2)
#: A ring that holds no more than it must.
TIERS = {"device": {"max_mb": 64}}


@pytest.fixture(params=["one frame", "many frames"])
def frames(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tiny models have parameters of one frame; with small ones, of many in several requests."""
    if request.param == "many frames":
        monkeypatch.setattr(codecs, "FRAME_BYTES", 1000)
        monkeypatch.setattr(layout, "CODED_REQUEST", 2500)
    return str(request.param)


def tokens(local: LocalEngine) -> list[list[int]]:
    return [list(output.token_ids) for output in local.engine.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("codec", ["zstd", "zstd-planes"])
@pytest.mark.usefixtures("frames")
def test_streamed_tokens_are_those_of_transformers(
    family: str, codec: str, make_model: MakeModel, tmp_path: Path
) -> None:
    model_dir = make_model(family)
    settings: dict[str, Any] = {
        "placement": {"rules": PLACEMENTS["streamed"]},
        "compression": {"nvme": codec},
        "tiers": TIERS,
    }
    with local_engine(model_dir, store=tmp_path, **settings) as local:
        assert tokens(local) == transformers_greedy(model_dir, PROMPTS, 12)
        local.check_bytes()
        total, steps = local.engine.stats().total, local.engine.stats().steps
        coded = [p for p in local.runner._weights.manifest.parameters if p.stored is not None]
        assert {p.name for p in coded} == {
            p.name
            for p in local.manifest.parameters
            if local.plan.tier_of[p.name] is Tier.NVME and (p.name != local.manifest.embedding or local.manifest.tied)
        }
        assert total.bytes_decoded >= steps * sum(p.nbytes for p in coded) > 0


def test_what_is_coded_moves_to_memory_and_back(make_model: MakeModel, tmp_path: Path) -> None:
    """D5: from coded files to the device and to the checkpoint's own files, and to coded ones again."""
    model_dir = make_model("llama")
    settings: dict[str, Any] = {
        "placement": {"rules": PLACEMENTS["streamed"]},
        "compression": {"nvme": "zstd-planes"},
        "tiers": TIERS,
    }
    with local_engine(model_dir, store=tmp_path, **settings) as local:
        expected, weights = tokens(local), local.runner._weights
        names = [p.name for p in local.manifest.layer_parameters(1) if weights.fixed(p.name) is None]
        copies = {name: weights.manifest.by_name[name].stored for name in names}
        files = weights.manifest.files
        assert all(copies.values())
        assert weights.move(names, Tier.DEVICE, {}, {}).keys() == set(names)
        assert tokens(local) == expected
        weights.move(names, Tier.NVME, {}, {})
        assert not any(weights.manifest.by_name[name].stored for name in names)
        assert tokens(local) == expected
    assert len(files) > len(local.manifest.files)


def test_bf16_too(make_model: MakeModel, tmp_path: Path) -> None:
    """The dtype that planes are for: files are smaller by what the exponents leave."""
    model_dir = make_model("llama", dtype=torch.bfloat16, intermediate_size=512, hidden_size=256)
    settings: dict[str, Any] = {"placement": {"rules": PLACEMENTS["streamed"]}, "tiers": TIERS}
    with local_engine(model_dir, **settings) as local:
        expected, plain = tokens(local), local.engine.stats()
    with local_engine(model_dir, store=tmp_path, compression={"default": "zstd-planes"}, **settings) as local:
        assert tokens(local) == expected
        coded = local.engine.stats()
        # Beside what is swept there are rows of the embedding, and chunks of this small head have frames in common.
        assert coded.total.bytes_read / coded.steps < 0.85 * plain.total.bytes_read / plain.steps
        assert plain.total.bytes_decoded == 0
