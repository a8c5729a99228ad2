"""Random models, machines, caps and rules: a plan within its budgets, or a refusal."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from raytier.checkpoint.manifest import Extent, ModelManifest, SourceFile
from raytier.errors import BudgetError
from raytier.hardware.inventory import GPU, NodeInventory
from raytier.planner.placement import plan_weights
from raytier.planner.plan import FILE_TIERS, Tier, WeightPlan
from raytier.planner.sizing import activation_bytes, always_resident, kv_demand, resident_nbytes
from tests.planner.models import CPU_NODE, GIB, GPU_RATES, RAMDISK_RATES, configuration, llama

GPU_NODE = replace(CPU_NODE, gpus=(GPU(0, "GPU", GIB, GIB),))


@st.composite
def manifests(draw: st.DrawFn) -> ModelManifest:
    heads = draw(st.sampled_from([2, 4, 8]))
    return llama(
        layers=draw(st.integers(1, 12)),
        hidden=heads * draw(st.sampled_from([8, 16, 32])),
        intermediate=draw(st.integers(16, 700)),
        vocab=draw(st.integers(10, 6000)),
        heads=heads,
        kv_heads=draw(st.sampled_from([1, heads // 2, heads])),
        tied=draw(st.booleans()),
        context=draw(st.integers(1, 4096)),
        dtype=draw(st.sampled_from(["bfloat16", "bfloat16", "bfloat16", "float32"])),
    )


placement = st.lists(
    st.fixed_dictionaries(
        {
            "pattern": st.sampled_from(["mlp", "layers.1.", "embed", "lm_head", "re:[qk]_proj", "weight", "none"]),
            "tier": st.sampled_from(["device", "host", "ramdisk", "nvme"]),
            "priority": st.integers(1, 3),
        }
    ),
    max_size=3,
)


@st.composite
def configurations(draw: st.DrawFn, with_rules: bool = True) -> Any:
    return configuration(
        device_mb=draw(st.sampled_from([None, *range(2, 16)])),
        host_mb=draw(st.one_of(st.just(0.0), st.floats(0, 10))),
        nvme={"enabled": draw(st.booleans()), "max_gb": draw(st.sampled_from([None, None, 0.003]))},
        ramdisk={"enabled": draw(st.booleans()), "size_mb": draw(st.sampled_from([1, 5, 100])), "mount": False},
        prefetch={"window": draw(st.sampled_from(["auto", "auto", 1, 4, 20]))},
        placement={"rules": draw(placement) if with_rules else []},
        scheduler={"max_num_seqs": 4, "max_num_batched_tokens": draw(st.sampled_from([64, "auto"]))},
        kv={
            "block_size": draw(st.sampled_from([1, 16, 64])),
            "expected_sequences": draw(st.sampled_from(["auto", 1, 5])),
            "expected_context": draw(st.sampled_from(["auto", 1, 500])),
            "max_blocks": draw(st.sampled_from([None, 2, 50])),
        },
    )


def check(manifest: ModelManifest, config: Any, node: NodeInventory, plan: WeightPlan) -> None:
    (device,) = plan.devices
    parameters, tier_of = manifest.by_name, plan.tier_of
    sums = dict.fromkeys(Tier, 0)
    for p in manifest.parameters:
        tier = tier_of[p.name]
        sums[tier] += resident_nbytes(p, manifest) if tier is Tier.DEVICE else p.nbytes
        if always_resident(p, manifest):
            assert tier is Tier.DEVICE

    # Every parameter exactly once, in order; sums as stated; budgets kept.
    assert [p.name for p in plan.placements] == list(parameters)
    held = (device.resident_bytes, plan.host_bytes, plan.ramdisk_bytes, plan.nvme_bytes)
    assert held == tuple(sums[tier] for tier in Tier)
    used = device.resident_bytes + device.ring_bytes + device.kv_bytes + device.activation_bytes
    assert used <= device.budget_bytes
    if config.tiers.device.max_mb is not None:
        assert device.budget_bytes <= config.tiers.device.max_mb * 2**20
    if config.tiers.host.max_mb is not None:
        assert plan.host_bytes <= config.tiers.host.max_mb * 2**20
    assert plan.ramdisk_bytes <= (config.tiers.ramdisk.size_mb * 2**20 if config.tiers.ramdisk.enabled else 0)
    if not config.tiers.nvme.enabled:
        assert plan.nvme_bytes == 0
    elif config.tiers.nvme.max_gb is not None:
        assert plan.nvme_bytes <= config.tiers.nvme.max_gb * GIB

    # KV between its floor and its cap.
    demand = kv_demand(manifest, config)
    assert demand.floor <= device.kv_blocks <= demand.most
    assert device.kv_bytes == device.kv_blocks * demand.block_bytes

    # The ring holds two units of whatever streams; nothing streams without one.
    streaming = FILE_TIERS if device.kind == "cpu" else (Tier.HOST, *FILE_TIERS)
    units = [
        sum(p.nbytes for p in manifest.layer_parameters(i) if tier_of[p.name] in streaming)
        for i in range(manifest.num_layers)
    ]
    head = parameters[manifest.head]
    if tier_of[head.name] in streaming:
        assert 1 <= device.head_chunk_rows <= manifest.vocab_size
        units.append(device.head_chunk_rows * head.nbytes // manifest.vocab_size)
    else:
        assert device.head_chunk_rows == 0
    assert device.ring_bytes >= 2 * max(units)
    assert (device.ring_bytes == 0) == (max(units) == 0)
    assert (device.window > 0) == (device.ring_bytes > 0)

    # Predictions are of this world.
    assert [p.batch for p in plan.predictions] == [1, 8, 32]
    for p in plan.predictions:
        assert 0 < p.compute_seconds <= p.seconds * 1.000001
        assert p.seconds <= p.compute_seconds + p.io_seconds + p.attention_seconds + p.overhead_seconds + 1e-9
    assert plan.first_token_seconds > 0
    scheduler = config.scheduler
    if scheduler.max_num_batched_tokens == "auto":
        assert max(16, scheduler.max_num_seqs) <= device.max_mixed_tokens <= device.max_num_batched_tokens <= 2048
    else:
        assert device.max_mixed_tokens == device.max_num_batched_tokens == scheduler.max_num_batched_tokens
    assert device.activation_bytes == activation_bytes(manifest, device.max_num_batched_tokens, scheduler.max_num_seqs)


@settings(deadline=None, max_examples=150)
@given(manifests(), configurations(), st.sampled_from([CPU_NODE, GPU_NODE]))
def test_a_plan_within_its_budgets_or_a_refusal(manifest: ModelManifest, config: Any, node: NodeInventory) -> None:
    rates = GPU_RATES if node.gpus else RAMDISK_RATES
    try:
        plan = plan_weights(manifest, node, rates, config)
    except BudgetError as error:
        refusal = error.message
    else:
        check(manifest, config, node, plan)
        return
    assert "Needed on the device" in refusal
    assert "makes it fit: " in refusal


@settings(deadline=None, max_examples=80)
@given(manifests(), configurations(with_rules=False))
def test_a_model_that_fits_is_never_offloaded(manifest: ModelManifest, config: Any) -> None:
    demand = kv_demand(manifest, config)
    needed = (
        sum(resident_nbytes(p, manifest) for p in manifest.parameters)
        + activation_bytes(manifest, 512, 4)
        + demand.expected * demand.block_bytes
    )
    try:
        plan = plan_weights(manifest, CPU_NODE, RAMDISK_RATES, config)
    except BudgetError:
        assert config.tiers.device.max_mb is not None
        assert config.tiers.device.max_mb * 2**20 < needed
        return
    if plan.devices[0].budget_bytes >= needed:
        assert set(plan.tier_of.values()) == {Tier.DEVICE}
        assert plan.devices[0].kv_blocks >= demand.expected


@settings(deadline=None, max_examples=80)
@given(manifests(), st.floats(1.5, 20))
def test_the_disk_part_is_even_within_one_parameter(manifest: ModelManifest, device_mb: float) -> None:
    try:
        plan = plan_weights(manifest, CPU_NODE, RAMDISK_RATES, configuration(device_mb=device_mb))
    except BudgetError:
        return
    per_layer = [
        sum(p.nbytes for p in manifest.layer_parameters(i) if plan.tier_of[p.name] is Tier.NVME)
        for i in range(manifest.num_layers)
    ]
    largest = max(p.nbytes for p in manifest.layer_parameters(0))
    average = sum(per_layer) / len(per_layer)
    assert all(abs(n - average) <= 2 * largest for n in per_layer)
    for prefix in range(len(per_layer)):  # less than one parameter ahead of the average anywhere in the sweep
        assert abs(sum(per_layer[:prefix]) - prefix * average) <= largest


@settings(deadline=None, max_examples=40)
@given(manifests(), st.integers(0, 5000), st.floats(2, 8))
def test_the_ring_holds_two_units_as_execution_lays_them_out(
    manifest: ModelManifest, start: int, device_mb: float
) -> None:
    """`sizing` may not import `execution`, so its bound is held against the real layout here."""
    from raytier.execution.layout import sweep_units

    offset, parameters = start, []
    for p in manifest.parameters:
        parameters.append(replace(p, extents=(Extent(0, offset, p.nbytes),)))
        offset += p.nbytes
    stored = replace(manifest, parameters=tuple(parameters), files=(SourceFile("/f", offset),))
    try:
        plan = plan_weights(stored, CPU_NODE, RAMDISK_RATES, configuration(device_mb=device_mb))
    except BudgetError:
        return
    units = sweep_units(stored, plan.tier_of, plan.devices[0].head_chunk_rows)
    assert plan.devices[0].ring_bytes >= 2 * max((unit.nbytes for unit in units), default=0)
