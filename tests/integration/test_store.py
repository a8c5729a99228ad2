"""B3, D2, G2: with a codec on the disk tier tokens stay the same, and what was made stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raytier import LLM
from raytier.checkpoint.describe import describe_model
from raytier.planner.plan import Tier
from tests.integration.offline import closing, greedy, quarter
from tests.models import random_prompts, transformers_greedy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PROMPTS = random_prompts(5, 33, 12)
COUNT = 10


def test_streamed_from_a_store_that_is_kept(
    ray_session: None, layered_dir: Path, tmp_path: Path, cache_dir: str
) -> None:
    manifest = describe_model(str(layered_dir)).manifest
    wanted = transformers_greedy(layered_dir, PROMPTS, COUNT)
    settings: dict[str, Any] = {
        "tiers": {
            "device": {"max_mb": quarter(manifest)},
            "host": {"max_mb": 0},
            # What a reading thread decodes with counts to the device.
            "nvme": {"min_free_gb": 0, "paths": [str(tmp_path)], "io_threads": 2},
        },
        "compression": {"nvme": "zstd-planes"},
        "kv": {"max_blocks": 17, "expected_sequences": 2, "expected_context": 64},
        "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": 64},
        "compute": {"threads": 1},
        "cache_dir": cache_dir,
    }
    with closing(LLM(str(layered_dir), **settings)) as (llm, _actors):
        assert greedy(llm, PROMPTS, COUNT) == wanted
        total, steps = llm.stats().total, llm.stats().steps
        coded = [p for p in llm.plan.placements if p.tier is Tier.NVME and p.codec == "zstd-planes"]
        assert total.bytes_decoded >= steps * sum(manifest.by_name[p.name].nbytes for p in coded) > 0
        disk = llm.status().disk
        assert disk.tier == "nvme" and disk.errors == 0 and disk.stored_bytes > 0
        assert len(stored_files(tmp_path)) == len(coded)
    assert len(stored_files(tmp_path)) == len(coded), "for the next time"


def stored_files(path: Path) -> list[Path]:
    return [file for file in (path / "raytier-store").iterdir() if len(file.name) == 40]
