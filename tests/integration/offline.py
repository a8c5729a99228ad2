"""What every `LLM` of these tests has to show: exact counters, an empty ledger, nothing left when it is closed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import ray

from raytier import LLM
from raytier.checkpoint.manifest import ModelManifest, Role
from raytier.config import MIB
from raytier.errors import EngineDeadError
from raytier.planner.plan import Tier, WeightPlan
from tests.integration.application import actors_of, eventually, is_alive, pid_of


@contextmanager
def closing(llm: LLM) -> Iterator[tuple[LLM, dict[str, Any]]]:
    """The LLM and its actors by role; closed afterwards, and nothing of it may be left."""
    actors = actors_of(llm.status().device.name.split(":")[1])
    pids = [pid_of(actor) for actor in actors.values()]
    try:
        yield llm, actors
    finally:
        llm.close()
    nothing_is_left(pids)
    with pytest.raises(EngineDeadError):
        llm.generate([[1, 2]], max_tokens=1)
    with pytest.raises(EngineDeadError, match="have ended"):
        llm.status()
    llm.close()


def nothing_is_left(pids: Sequence[int] = ()) -> None:
    """No actor and no placement group of an LLM, and none of these processes."""
    eventually(lambda: not any(is_alive(pid) for pid in pids))
    eventually(lambda: not [a for a in ray.util.list_named_actors(all_namespaces=True) if ":llm-" in a["name"]])
    eventually(lambda: not [g for g in ray.util.placement_group_table().values() if _of_an_llm(g)])


def _of_an_llm(group: dict[str, Any]) -> bool:
    return group["state"] != "REMOVED" and not group["name"].startswith("SERVE_REPLICA")


def greedy(llm: LLM, prompts: list[list[int]], count: int) -> list[list[int]]:
    """`count` tokens of each prompt."""
    return [list(c.token_ids) for c in llm.generate(prompts, temperature=0, ignore_eos=True, max_tokens=count)]


def quarter(manifest: ModelManifest) -> float:
    """A quarter of the weights in MB: what a device gets for weights, ring, KV and activations together."""
    return manifest.nbytes / 4 / MIB


def swept_bytes(manifest: ModelManifest, plan: WeightPlan) -> int:
    """Parameter bytes that every step streams from disk: all that is there but an embedding, of which rows are read."""
    on_disk = [p for p in manifest.parameters if plan.tier_of[p.name] is Tier.NVME]
    return sum(p.nbytes for p in on_disk if p.role is not Role.EMBEDDING or manifest.tied)


def check_streamed(llm: LLM, manifest: ModelManifest) -> None:
    """Every byte that steps streamed is in the counters, of the engine and of the actors."""
    stats, swept = llm.stats(), swept_bytes(manifest, llm.plan)
    embedding = manifest.by_name[manifest.embedding]
    row = embedding.nbytes // embedding.shape[0] if llm.plan.tier_of[embedding.name] is Tier.NVME else 0
    rows = stats.total.bytes_streamed - stats.steps * swept
    assert (rows % row == 0 and stats.steps <= rows // row <= stats.total.num_tokens) if row else rows == 0
    assert stats.total.bytes_read >= stats.total.bytes_streamed
    assert llm.status().device.steps == stats.steps, "one message per step"
    status = eventually(lambda: (s := llm.status()) and s.disk.bytes_read == stats.total.bytes_read and s)
    assert status.disk.reads == stats.total.reads
    assert status.disk.errors == 0
    assert status.device.bytes_read >= stats.total.bytes_read, "prefetches for the next step come on top"


def check_ledger(llm: LLM, prompts: list[list[int]], count: int) -> None:
    """After `count` tokens of each prompt the ledger has seen their blocks come and go, and holds none."""
    kv = eventually(lambda: (s := next(iter(llm.status().kv.values()))) and not s.used_blocks and s.allocations and s)
    assert kv.active_sequences == 0
    assert kv.failures == 0
    assert kv.allocations == sum(-(-(len(prompt) + count - 1) // kv.block_size) for prompt in prompts)
    (engine,) = kv.engines.values()
    assert engine.leased_blocks == kv.total_blocks == llm.plan.devices[0].kv_blocks - 1
    assert engine.last_step <= llm.stats().steps, "one report per step at most"
