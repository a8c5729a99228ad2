"""F4, F5, G2: KV that went to the host's memory and to disk and came back never changes a token: transformers is the
judge. What cannot be written or read again is computed, and counted (G6: nothing is lost)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from raytier.engine.sampling_params import SamplingParams
from raytier.kv.costs import KVCosts
from raytier.tiers.kv_files import KVFile
from tests.execution.test_prefix_cache import FAMILIES, tree
from tests.local_engine import LocalEngine, local_engine
from tests.models import MakeModel, random_prompts, transformers_greedy

COUNT = 8
GREEDY = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=COUNT, ignore_eos=True)
SCHEDULER = {"max_num_seqs": 3, "max_num_batched_tokens": 16}
#: Four prompts fill the device.
DEVICE = {"block_size": 4, "max_blocks": 40}
#: The host's pool gets nothing on a CPU node where the device may have everything.
TIERS = {"device": {"max_mb": 512}, "nvme": {"min_free_gb": 0}}
BELOW: dict[str, dict[str, Any]] = {
    "host": {"host_mb": 64},
    "disk": {"host_mb": 0, "disk_gb": 0.25, "disk_once": True},
    "both": {"host_mb": 64, "disk_gb": 0.25},
}


def run(local: LocalEngine, prompts: list[list[int]]) -> list[list[int]]:
    outputs = local.engine.generate(prompts, GREEDY)
    return [list(output.token_ids) for output in outputs]


def shrink_host(local: LocalEngine, slots: int) -> None:
    """Let the host hold fewer blocks than it could, so that the disk is needed."""
    assert local.kv.lower is not None
    for index in local.kv.lower.host:
        assert not len(index)
        index.num_slots = slots


@pytest.mark.parametrize("below", BELOW)
@pytest.mark.parametrize("family", FAMILIES)
def test_replays_find_what_was_given_up(family: str, below: str, make_model: MakeModel, tmp_path: Path) -> None:
    """A working set of several times the device's KV, three times: what was given up is found again, on every tier."""
    model_dir = make_model(family)
    prompts = tree(20, seed=5)
    wanted = transformers_greedy(model_dir, prompts, COUNT)
    with local_engine(
        model_dir, kv=DEVICE | BELOW[below], scheduler=SCHEDULER, tiers=TIERS, cache_dir=str(tmp_path)
    ) as local:
        assert local.kv.lower is not None
        if below == "disk":
            shrink_host(local, 24)
        for round_ in range(3):
            before = local.engine.stats().kv
            assert run(local, prompts) == wanted, f"round {round_}"
        local.kv.check_integrity([])
        counts, now = local.kv.lower.counts, local.engine.stats().kv
        whole = sum((len(prompt) - 1) // 4 * 4 for prompt in prompts)
        assert now.hits - before.hits >= 0.99 * whole
        if below == "disk":
            assert counts.written > 0 and counts.disk_loaded > 0 and counts.disk_load.nbytes > 0
        else:
            assert counts.loaded > 0 and counts.load.blocks == counts.loaded
        if below == "both":
            assert counts.written > 0, "what was seen twice"
        assert (now.host_hits > 0) or below == "disk"
        assert counts.lost == counts.write_failures == 0
        assert local.kv.num_used == 0
    assert not list(tmp_path.rglob("*.kv")), "what is not to be kept is gone"


def test_preempted_sequences_come_back_from_the_host(make_model: MakeModel) -> None:
    """F4: long outputs that do not fit at once: who is preempted goes on with what the host has of it, token by token
    as if nothing had happened; no two prompts begin alike."""
    model_dir = make_model("llama")
    prompts = random_prompts(30, 25, 20, 15)
    wanted = transformers_greedy(model_dir, prompts, 40)
    params = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=40, ignore_eos=True)
    kv = {"block_size": 4, "max_blocks": 26, "host_mb": 64}
    with local_engine(model_dir, kv=kv, scheduler=SCHEDULER, tiers=TIERS) as local:
        outputs = local.engine.generate(prompts, params)
        assert [list(output.token_ids) for output in outputs] == wanted
        stats = local.engine.stats()
        assert stats.preemptions > 0 and stats.kv.host_hits > 0
        local.kv.check_integrity([])


@pytest.fixture
def llama(make_model: MakeModel) -> Path:
    return make_model("llama")


def kept(tmp_path: Path) -> dict[str, Any]:
    kv = DEVICE | {"host_mb": 0, "disk_gb": 0.25, "disk_once": True, "persist": True}
    return {"kv": kv, "scheduler": SCHEDULER, "tiers": TIERS, "cache_dir": str(tmp_path)}


def test_a_restart_finds_what_was_kept(llama: Path, tmp_path: Path, make_model: MakeModel) -> None:
    prompts = tree(12, seed=6)
    wanted = transformers_greedy(llama, prompts, COUNT)
    whole = sum((len(prompt) - 1) // 4 * 4 for prompt in prompts)
    with local_engine(llama, **kept(tmp_path)) as local:
        assert run(local, prompts) == wanted
    with local_engine(llama, **kept(tmp_path)) as local:
        assert run(local, prompts) == wanted
        counts = local.engine.stats().kv
        assert counts.hits == whole and counts.disk_hits > 0
    with open(llama / "config.json", "a", encoding="utf-8") as config:
        config.write(" ")
    with local_engine(llama, **kept(tmp_path)) as local:
        assert run(local, prompts) == wanted
        assert local.engine.stats().kv.disk_hits == 0, "another model's: a change of the configuration is enough"


def test_damaged_files_are_computed_again(llama: Path, tmp_path: Path) -> None:
    """Every block of the kept file is damaged: the sequences that were to begin with them begin again."""
    prompts = tree(12, seed=7)
    wanted = transformers_greedy(llama, prompts, COUNT)
    with local_engine(llama, **kept(tmp_path)) as local:
        assert run(local, prompts) == wanted
    [path] = tmp_path.rglob("*.kv")
    size = os.path.getsize(path)
    path.write_bytes(b"\x41" * size)
    with local_engine(llama, **kept(tmp_path)) as local:
        assert run(local, prompts) == wanted
        assert local.kv.lower is not None and local.kv.lower.counts.lost > 0
        assert local.engine.stats().preemptions == 0
        assert run(local, prompts) == wanted
        local.kv.check_integrity([])


def test_a_full_disk_loses_no_request(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write fails, as on a full disk: what the host has no room for is computed again, and failures counted."""
    prompts = tree(16, seed=8)
    wanted = transformers_greedy(llama, prompts, COUNT)

    def full(self: KVFile, views: object, offset: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(KVFile, "_write_all", full)
    with local_engine(llama, **kept(tmp_path)) as local:
        shrink_host(local, 8)
        for _ in range(2):
            assert run(local, prompts) == wanted
        assert local.kv.lower is not None
        counts = local.kv.lower.counts
        assert counts.write_failures > 0 and counts.written == 0 and counts.lost == 0
        local.kv.check_integrity([])


@pytest.mark.parametrize("slow", ["loads", "steps"])
def test_what_is_faster_is_done(slow: str, llama: Path) -> None:
    """F5: where loads are said to be slow, everything is computed again; where steps are, everything is loaded."""
    prompts = tree(16, seed=9)
    wanted = transformers_greedy(llama, prompts, COUNT)
    kv = DEVICE | {"host_mb": 64}
    with local_engine(llama, kv=kv, scheduler=SCHEDULER, tiers=TIERS) as local:
        assert local.kv.lower is not None
        rate = 1.0 if slow == "loads" else 1e12
        local.kv.attach(local.kv.lower, KVCosts(0.001, 1.0 if slow == "steps" else 0.0, 16, rate, rate))
        for _ in range(2):
            assert run(local, prompts) == wanted
        counts = local.kv.lower.counts
        assert counts.stored > 0
        assert (counts.loaded > 0, counts.refused > 0) == (slow == "steps", slow == "loads")
