"""E3, E4, E6: `raytier.ModelManager`, the models of a file in Python."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import ray

from raytier import ModelManager
from raytier.errors import CheckpointError, ConfigurationError, ConflictError, ModelNotFoundError
from raytier.sources.registry import read_models
from tests.integration.application import eventually
from tests.models import random_prompts, transformers_greedy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PROMPTS = random_prompts(5, 9)
COUNT = 6
SETTINGS: dict[str, Any] = {
    "tiers": {"device": {"max_mb": 64}, "host": {"max_mb": 64}},
    "kv": {"max_blocks": 33, "expected_sequences": 2, "expected_context": 64},
    "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 64},
    "compute": {"threads": 1},
}
GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": COUNT}


def write(path: Path, **models: str) -> str:
    lines = ["# ours", "models:"]
    for model_id, source in models.items():
        lines += [f"- model_id: {model_id}", "  source_type: local", f"  source_path: {source}"]
        lines += ["  model_format: safetensors"]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def first_line(file: str) -> str:
    return Path(file).read_text().partition("\n")[0]


async def test_the_whole_life(ray_session: None, tiny_dir: Path, cache_dir: str, tmp_path: Path) -> None:
    wanted = transformers_greedy(tiny_dir, PROMPTS, COUNT)
    file = write(tmp_path / "models.yaml", tiny=str(tiny_dir), broken="/nothing/there")
    async with ModelManager(config_path=file, cache_dir=cache_dir, **SETTINGS) as manager:
        assert manager.list_available_models() == [
            {"model_id": name, "source_type": "local", "status": "no_model_loaded", "device": "auto"}
            for name in ("tiny", "broken")
        ]
        assert not await manager.unload_model("tiny")
        with pytest.raises(ModelNotFoundError, match="served are: tiny, broken"):
            await manager.load_model("other")

        first, second = await asyncio.gather(manager.load_model("tiny"), manager.get_model_instance("tiny"))
        assert first.tokenizer_object is second.tokenizer_object, "one load"
        assert (first.config.model_id, first.device) == ("tiny", "cpu")
        assert first.tokenizer_object.encode("one two")
        answers = await asyncio.gather(*(first.model_object.generate(prompt, **GREEDY) for prompt in PROMPTS))
        assert [list(answer.token_ids) for [answer] in answers] == wanted
        samples = await first.model_object.generate("Hello you", n=2, temperature=1.0, seed=1, max_tokens=3)
        assert [sample.index for sample in samples] == [0, 1]

        assert manager.register_model({"model_id": "demo", "source_path": "builtin:demo"}, persist=True)
        assert not manager.register_model(manager.get_model_configuration("demo"))
        assert [entry.model_id for entry in read_models(file)] == ["tiny", "broken", "demo"]
        assert first_line(file) == "# ours"
        with pytest.raises(ConfigurationError, match="no_such_field"):
            manager.register_model({"model_id": "x", "source_path": "/x", "no_such_field": 1})
        demo = await manager.get_model_instance("demo")
        [said] = await demo.model_object.generate("What is", temperature=0, max_tokens=4)
        assert said.completion_tokens == 4

        assert await manager.sleep_model("tiny")
        status = {each["model_id"]: each["status"] for each in manager.list_available_models()}
        assert status["tiny"] == "sleeping" and status["demo"] in ("loading", "loaded")
        [answer] = await first.model_object.generate(PROMPTS[1], **GREEDY)  # which wakes it
        assert list(answer.token_ids) == wanted[1]
        async with aclosing(second.model_object.generate_stream(PROMPTS[0], **GREEDY | {"max_tokens": 400})) as deltas:
            assert (await anext(deltas)).token_ids[0] == wanted[0][0]
        assert await manager.unload_model("tiny"), "whoever goes away ends the request, so it is not waited for"

        with pytest.raises(ConflictError, match="not loaded"):
            await first.model_object.generate(PROMPTS[0], **GREEDY)
        with pytest.raises(CheckpointError, match="/nothing/there"):
            await manager.load_model("broken")
        assert manager.list_available_models()[1]["status"] == "error"
        reloaded = await manager.load_model("tiny", force_reload=True)
        [answer] = await reloaded.model_object.generate(PROMPTS[0], **GREEDY)
        assert list(answer.token_ids) == wanted[0]
    with pytest.raises(ConflictError, match="closed"):
        await manager.load_model("tiny")
    await manager.close()
    eventually(lambda: not [a for a in ray.util.list_named_actors(all_namespaces=True) if ":manager-" in a["name"]])


def test_a_file_that_is_wrong_is_refused_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        ModelManager(config_path=str(tmp_path / "none.yaml"))
    with pytest.raises(ConfigurationError, match=r"models\[0\] \(m\): .*absolute"):
        ModelManager(config_path=write(tmp_path / "models.yaml", m="relative"))
    with pytest.raises(ConfigurationError, match="tiers.moon"):
        ModelManager(config_path=write(tmp_path / "models.yaml", m="/x"), tiers={"moon": {}})
