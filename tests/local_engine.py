"""A real engine over a real model runner in this process: everything but Ray."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raytier.checkpoint.describe import describe_model
from raytier.checkpoint.manifest import ModelManifest, Role
from raytier.config import parse_config
from raytier.engine.config import EngineConfig
from raytier.engine.engine import Engine
from raytier.engine.tokenizer import Tokenizer
from raytier.execution import sources
from raytier.execution.model_runner import ModelRunner
from raytier.hardware.inventory import take_inventory
from raytier.hardware.rates import DEFAULT_RATES
from raytier.kv.cache import KVCache
from raytier.planner.budgets import planned_paths
from raytier.planner.placement import plan_weights
from raytier.planner.plan import Tier, WeightPlan
from raytier.tiers.aligned import align_up
from raytier.tiers.arena import Arena, RangeAllocator
from raytier.tiers.copies import TierCopy
from raytier.tiers.store import TierStore

#: How much of the weights is streamed, as placement rules.
PLACEMENTS: dict[str, list[dict[str, str]]] = {
    "resident": [],
    "half": [{"pattern": "mlp", "tier": "nvme"}],
    "host": [{"pattern": "mlp", "tier": "host"}, {"pattern": "re:.", "tier": "nvme", "priority": 100}],
    "streamed": [{"pattern": "re:.", "tier": "nvme"}],
}


@dataclass(frozen=True)
class LocalEngine:
    engine: Engine
    runner: ModelRunner
    plan: WeightPlan
    manifest: ModelManifest
    kv: KVCache

    @property
    def swept_bytes(self) -> int:
        """Parameter bytes that every sweep must stream: all on disk but routed experts, and an embedding that is not
        also the head."""
        manifest, tier_of = self.manifest, self.plan.tier_of
        on_disk = [p for p in manifest.parameters if tier_of[p.name] is Tier.NVME and p.expert is None]
        return sum(p.nbytes for p in on_disk if p.role is not Role.EMBEDDING or manifest.tied)

    @property
    def fetched_bytes(self) -> int:
        """Parameter bytes that experts on disk must have cost so far: of each as often as the router chose it, unless
        it was still there."""
        used = {p.name: p.access_count for p in self.runner.parameters()}
        on_disk = [p for p in self.manifest.parameters if self.plan.tier_of[p.name] is Tier.NVME and p.expert]
        return sum(p.nbytes * used[p.name] for p in on_disk) - self.runner._weights._streamed.stats.bytes_found

    @property
    def row_bytes(self) -> int:
        """Bytes of one embedding row where rows are fetched from disk, else 0."""
        embedding = self.manifest.by_name[self.manifest.embedding]
        return embedding.nbytes // embedding.shape[0] if self.plan.tier_of[embedding.name] is Tier.NVME else 0

    def check_bytes(self) -> None:
        """What was streamed is what the plan says, to the byte; and it came from disk."""
        total, steps = self.engine.stats().total, self.engine.stats().steps
        assert steps > 0
        rows = total.bytes_streamed - steps * self.swept_bytes - self.fetched_bytes
        if self.row_bytes:
            assert rows % self.row_bytes == 0 and steps <= rows // self.row_bytes <= total.num_tokens
        else:
            assert rows == 0
        if self.runner._weights.manifest.parameters == self.manifest.parameters:  # nothing is coded
            assert total.bytes_read >= total.bytes_streamed
        assert (total.bytes_streamed > 0) == (self.plan.nvme_bytes > 0)


@contextmanager
def local_engine(
    model_dir: Path,
    device: str = "cpu",
    packed: bool | None = None,
    store: Path | None = None,
    model_format: str = "safetensors",
    **settings: Any,
) -> Iterator[LocalEngine]:
    """Plan and load `model_dir` under `settings` (sections of the configuration), and run an engine on it.

    `packed` overrides what the plan says about the layout of resident linear layers. `store`: directory for what the
    disk holds in another form or coded.
    """
    if store is not None:
        settings = {"cache_dir": str(store), **settings}
    config = parse_config({"models": [{"model_id": "test", "source_path": str(model_dir)}], **settings})
    description = describe_model(str(model_dir), model_format)
    config = description.configure(config)
    manifest = description.manifest
    plan = plan_weights(
        manifest,
        take_inventory(planned_paths(config, str(model_dir))),
        DEFAULT_RATES,
        config,
        kind=device.partition(":")[0],
    )
    share = plan.devices[0]
    if packed is not None:
        share = replace(share, packed=packed)
        plan = replace(plan, devices=(share,))
    nvme = config.tiers.nvme
    on_host = [p for p in manifest.parameters if plan.tier_of[p.name] is Tier.HOST]
    held = {p.name: plan.schemes.held_nbytes(p, Tier.HOST) for p in on_host}
    ranges = RangeAllocator(sum(map(align_up, held.values())))
    arena = Arena.create("raytier-test", ranges.capacity) if ranges.capacity else None
    places = {p.name: ranges.allocate(p.name, held[p.name]) for p in on_host}
    copies: dict[str, TierCopy] = {}
    if store is not None:
        schemes = plan.schemes.by_tier[Tier.NVME]
        on_disk = [p for p in manifest.parameters if plan.tier_of[p.name] is Tier.NVME and p.name in schemes]
        with closing(TierStore([str(store / "store")], 1 << 24, cache_dir=sources._cache_dir)) as files:
            copies = files.obtain(manifest.model_dir, manifest.files, on_disk, schemes)
    runner = ModelRunner.load(
        manifest,
        plan,
        device=device,
        host_views={p.name: arena.view[places[p.name] : places[p.name] + held[p.name]] for p in on_host if arena},
        copies=copies,
        io_threads=nvme.io_threads,
        io_bytes=int(nvme.io_mb * 2**20),
        tokenizer=description.tokenizer,
    )
    kv = KVCache.of(manifest, share.block_size, config.kv)
    for pool in kv.pools:
        pool.add_extent(1, share.kv_blocks - 1)
    engine = Engine(
        "test",
        runner,
        Tokenizer(description.tokenizer),
        kv,
        description.defaults,
        EngineConfig(
            config.scheduler,
            share.max_num_batched_tokens,
            share.max_mixed_tokens,
            manifest.max_context,
            manifest.vocab_size,
        ),
    )
    try:
        yield LocalEngine(engine, runner, plan, manifest, kv)
    finally:
        engine.close()
        runner.close()
        if arena is not None:
            arena.close()
