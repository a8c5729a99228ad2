"""What the node knows, in the words of the runtime's API. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Literal

from raytier.actors.disk import DiskStatus
from raytier.actors.group import GroupStatus
from raytier.checkpoint.manifest import ModelManifest
from raytier.config import MIB
from raytier.engine.engine import Engine
from raytier.execution.parameters import ParameterStatus
from raytier.kv.ledger import KVStats
from raytier.kv.usage import SlotUse
from raytier.planner.plan import Tier, WeightPlan
from raytier.serve.runtime_schema import (
    KVAnswer,
    KVGroupUse,
    KVSequence,
    KVTierUse,
    Layer,
    LayerGroup,
    LoadProgress,
    PlacedParameter,
    PlanAnswer,
    PredictedStep,
    PrefixCacheCounts,
    TierHealth,
    TransferStatus,
)
from raytier.tiers.transfers import Transfer, TransferState

Device = Literal["gpu", "cpu", "ramdisk", "nvme"]


def progress(actors: GroupStatus, model_id: str, elapsed_s: float) -> LoadProgress | None:
    """How far a load is that has taken `elapsed_s` seconds: what is copied to tiers and what is read to memory.

    What is left is guessed from its pace so far; None before there is any work that could be counted.
    """
    parts = [status.storing for status in (actors.ramdisk, actors.disk) if status is not None and status.storing]
    if actors.device is not None and (model := actors.device.models.get(model_id)) is not None:
        parts.append((model.bytes_loaded, model.bytes_to_load))
    loaded, total = (sum(each) for each in zip((0, 0), *parts, strict=True))
    return progress_of(loaded, total, elapsed_s)


def progress_of(loaded: int, total: int, elapsed_s: float) -> LoadProgress | None:
    """`loaded` of `total` bytes after `elapsed_s` seconds; None before there is any work that could be counted."""
    if not total:
        return None
    left = elapsed_s * (total - loaded) / loaded if loaded else None
    return LoadProgress(bytes_loaded=loaded, bytes_total=total, seconds_left=left)


def layer(number: int, status: ParameterStatus, plan: WeightPlan) -> Layer:
    """One parameter; `number` is its place in the manifest."""
    share = plan.devices[0]
    device, gpu = _device_of(status.tier, share.kind), None
    if device == "gpu":
        gpu = share.index
    return Layer(
        id=number,
        name=status.name,
        layer_index=status.layer,
        original_size_mb=status.nbytes / MIB,
        current_size_mb=status.current_nbytes / MIB,
        current_device=device,
        gpu_id=gpu,
        quantization_type=status.precision,
        compression_type=status.codec,
        access_count=status.access_count,
        last_access_timestamp=status.last_access or None,
    )


def _device_of(tier: Tier, kind: str) -> Device:
    if tier is Tier.RAMDISK:
        return "ramdisk"
    if tier is Tier.NVME:
        return "nvme"
    return "gpu" if tier is Tier.DEVICE and kind == "cuda" else "cpu"


def groups(parameters: Sequence[ParameterStatus]) -> list[LayerGroup]:
    """Parameters summed by decoder layer; those outside of the layers come last."""
    members: dict[int | None, list[ParameterStatus]] = {}
    for parameter in parameters:
        members.setdefault(parameter.layer, []).append(parameter)
    order = sorted(members, key=lambda index: (index is None, index or 0))
    return [_group(index, members[index]) for index in order]


def _group(index: int | None, members: Sequence[ParameterStatus]) -> LayerGroup:
    by_tier = {tier: sum(p.current_nbytes for p in members if p.tier is tier) / MIB for tier in Tier}
    return LayerGroup(
        layer_index=index,
        name="outside of the layers" if index is None else f"layer {index}",
        num_parameters=len(members),
        original_size_mb=sum(p.nbytes for p in members) / MIB,
        current_size_mb=sum(p.current_nbytes for p in members) / MIB,
        size_mb_by_tier={tier: size for tier, size in by_tier.items() if size},
        access_count=max(p.access_count for p in members),
        last_access_timestamp=max(p.last_access for p in members) or None,
    )


def transfer_status(transfer: Transfer, manifest: ModelManifest, now: str) -> TransferStatus:
    """A transfer of a model of `manifest`; `now` says where its parameters are, for as long as it has moved nothing."""
    number, index = target_of(transfer, manifest)
    reason = transfer.reason
    if transfer.state is TransferState.COMPLETED and not transfer.sources:
        reason = f"{transfer.target} was in {transfer.destination} already"
    return TransferStatus(
        transfer_id=transfer.id,
        status=transfer.state.value,
        reason=reason,
        layer_id=number,
        layer_index=index,
        source=", ".join(sorted(set(transfer.sources.values()))) or now,
        destination=transfer.destination,
        priority=transfer.priority,
        nbytes=transfer.nbytes,
        seconds=transfer.seconds if transfer.state is TransferState.COMPLETED else None,
    )


def target_of(transfer: Transfer, manifest: ModelManifest) -> tuple[int | None, int | None]:
    """(id of the parameter, index of its decoder layer) of what a transfer moves; no id for a whole layer."""
    first = manifest.by_name[transfer.names[0]]
    if transfer.target == first.name:
        return manifest.parameters.index(first), first.layer
    return None, first.layer


def plan(model_id: str, planned: WeightPlan, manifest: ModelManifest, tier_of: Mapping[str, Tier]) -> PlanAnswer:
    """The plan of a model whose parameters are on `tier_of` now."""
    placements = [
        PlacedParameter(
            id=number,
            name=placement.name,
            nbytes=manifest.by_name[placement.name].nbytes,
            tier=tier_of[placement.name],
            planned_tier=placement.tier,
            reason=placement.reason,
        )
        for number, placement in enumerate(planned.placements)
    ]
    return PlanAnswer(
        model_name=model_id,
        model_path=planned.model_dir,
        devices=list(planned.devices),
        placements=placements,
        bytes_by_tier={tier: sum(p.nbytes for p in placements if p.tier is tier) for tier in Tier},
        streamed_bytes=planned.streamed_bytes,
        predictions=[
            PredictedStep(
                batch=p.batch,
                seconds=p.seconds,
                io_seconds=p.io_seconds,
                compute_seconds=p.compute_seconds,
                attention_seconds=p.attention_seconds,
                overhead_seconds=p.overhead_seconds,
                tokens_per_second=p.tokens_per_second,
            )
            for p in planned.predictions
        ],
        context=planned.context,
        first_token_seconds=planned.first_token_seconds,
        warnings=list(planned.warnings),
        notes=list(planned.notes),
    )


def kv(engine: Engine, manifest: ModelManifest, planned: WeightPlan, ledger: KVStats | None) -> KVAnswer:
    """The KV of a loaded model."""
    stats, policy, block_size = engine.stats(), engine.kv.policy, planned.devices[0].block_size
    groups = []
    for use in stats.kv_groups:
        layers = sum(layer.sliding_window == use.window for layer in manifest.kv_layers)
        groups.append(
            KVGroupUse(
                window=use.window,
                num_layers=layers,
                block_bytes=block_size * manifest.kv_group_token_bytes(use.window),
                total_blocks=use.num_blocks,
                used_blocks=use.used,
                cached_blocks=use.cached,
            )
        )
    device = KVTierUse(
        tier=Tier.DEVICE,
        total_blocks=stats.kv_blocks_total,
        used_blocks=stats.kv_blocks_used,
        cached_blocks=stats.kv_blocks_cached,
        free_blocks=stats.kv_blocks_free,
        total_bytes=sum(group.total_blocks * group.block_bytes for group in groups),
        used_bytes=sum(group.used_blocks * group.block_bytes for group in groups),
        cached_bytes=sum(group.cached_blocks * group.block_bytes for group in groups),
        evictions=stats.kv_evictions,
    )
    tiers, below = [device], stats.kv_below
    if below is not None:
        tiers += [_slots(tier, use) for tier, use in ((Tier.HOST, below.host), (Tier.NVME, below.disk)) if use.slots]
    counts = stats.kv
    return KVAnswer(
        model_name=engine.model_id,
        block_size=block_size,
        pressure=stats.kv_pressure.value,
        free_fraction=min((1 - g.used_blocks / max(1, g.total_blocks) for g in groups), default=1.0),
        high_free_fraction=policy.high_free_fraction,
        critical_free_fraction=policy.critical_free_fraction,
        tiers=tiers,
        dropped_blocks=0 if below is None else below.dropped,
        write_failures=0 if below is None else below.write_failures,
        lost_blocks=0 if below is None else below.lost,
        groups=groups,
        active_sequences=stats.running,
        allocations=counts.allocations,
        failures=counts.failures,
        copies=counts.copies,
        forks=counts.forks,
        preemptions=stats.preemptions,
        restarts=stats.kv_restarts,
        prefix_cache=PrefixCacheCounts(
            queries=counts.queries,
            hits=counts.hits,
            hit_rate=counts.hits / counts.queries if counts.queries else 0.0,
            hits_by_tier={
                Tier.DEVICE: counts.hits - counts.host_hits - counts.disk_hits,
                Tier.HOST: counts.host_hits,
                Tier.NVME: counts.disk_hits,
            },
        ),
        sequences=[KVSequence(**asdict(sequence)) for sequence in engine.kv_sequences()],
        ledger=ledger,
    )


def health(actors: GroupStatus, budget: int | None, in_place_bytes: int) -> list[TierHealth]:
    """Every tier whose actor answered; `budget` is the device's for all models, and `in_place_bytes` of parameters are
    read from the checkpoint's own files."""
    found: list[TierHealth] = []
    if (device := actors.device) is not None:
        used = device.resident_bytes + device.ring_bytes + device.kv_bytes
        free = None if budget is None else budget - used
        found.append(TierHealth(tier=Tier.DEVICE, used_bytes=used, capacity_bytes=budget, free_bytes=free))
    if (host := actors.host) is not None:
        used = host.capacity - host.free
        found.append(TierHealth(tier=Tier.HOST, used_bytes=used, capacity_bytes=host.capacity, free_bytes=host.free))
    for tier, status in ((Tier.RAMDISK, actors.ramdisk), (Tier.NVME, actors.disk)):
        if status is not None:
            found.append(_file_tier(tier, status, in_place_bytes))
    return found


def _file_tier(tier: Tier, status: DiskStatus, in_place_bytes: int) -> TierHealth:
    return TierHealth(
        tier=tier,
        used_bytes=in_place_bytes if status.in_place else status.stored_bytes,
        capacity_bytes=status.capacity_bytes,
        free_bytes=status.free_bytes,
        files=status.files,
        reads=status.reads,
        writes=status.writes,
        bytes_read=status.bytes_read,
        bytes_written=status.bytes_written,
        errors=status.errors,
        utilization=status.utilization,
    )


def _slots(tier: Tier, use: SlotUse) -> KVTierUse:
    """A tier below the device: no sequence uses its blocks, they are loaded first."""
    return KVTierUse(
        tier=tier,
        total_blocks=use.slots,
        used_blocks=0,
        cached_blocks=use.cached,
        free_blocks=use.slots,
        total_bytes=use.nbytes,
        used_bytes=0,
        cached_bytes=use.cached_bytes,
        evictions=use.evictions,
    )
