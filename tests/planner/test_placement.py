"""A3, C1, C2, C3, C4: where parameters go, the split with KV, what does not pay, and refusals with numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise

import pytest

from raytier.checkpoint.manifest import ModelManifest, Role
from raytier.config import MIB
from raytier.errors import BudgetError
from raytier.hardware.inventory import GPU, Disk
from raytier.hardware.rates import Rates
from raytier.planner.cost import sweep_of
from raytier.planner.placement import plan_weights
from raytier.planner.plan import Tier, WeightPlan
from raytier.planner.sizing import kv_demand, resident_nbytes
from raytier.planner.solver import DEEPEST, MEASURED_DEPTH, useful_depth
from tests.planner.models import (
    CPU_NODE,
    FULL_RATES,
    GIB,
    GPU_NODE,
    GPU_RATES,
    RAMDISK_RATES,
    RATES,
    configuration,
    llama,
)

MODEL = llama()  # 16.8 MB: embedding and head 2 MB each, layers 1.6 MB each


def streamed_per_layer(manifest: ModelManifest, plan: WeightPlan) -> list[int]:
    return [
        sum(p.nbytes for p in manifest.layer_parameters(i) if plan.tier_of[p.name] is Tier.NVME)
        for i in range(manifest.num_layers)
    ]


def test_a_model_that_fits_is_never_offloaded() -> None:
    plan = plan_weights(MODEL, CPU_NODE, RATES, configuration(host_mb=None))
    (device,) = plan.devices
    assert set(plan.tier_of.values()) == {Tier.DEVICE}
    assert device.resident_bytes == MODEL.nbytes
    assert (device.ring_bytes, device.window, device.head_chunk_rows) == (0, 0, 0)
    assert (plan.nvme_bytes, plan.host_bytes, plan.streamed_bytes, plan.warnings) == (0, 0, 0, ())
    assert (device.layer_start, device.layer_stop) == (0, MODEL.num_layers)
    assert device.kv_blocks == 4 * 1024 // 16 + 1  # every sequence at full context, and the null block


def test_kv_takes_its_share_of_what_a_resident_model_leaves() -> None:
    manifest = llama(context=1 << 20)
    plan = plan_weights(manifest, CPU_NODE, RATES, configuration(device_mb=100))
    (device,) = plan.devices
    rest = device.budget_bytes - device.resident_bytes - device.activation_bytes
    assert set(plan.tier_of.values()) == {Tier.DEVICE}
    assert 0.55 * rest < device.kv_bytes < 0.65 * rest


def test_the_model_stays_resident_down_to_the_last_byte() -> None:
    plan = plan_weights(MODEL, CPU_NODE, RATES, configuration())
    demand = kv_demand(MODEL, configuration())
    needed = MODEL.nbytes + plan.devices[0].activation_bytes + demand.expected * demand.block_bytes
    tight = plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=needed / MIB))
    assert set(tight.tier_of.values()) == {Tier.DEVICE}
    assert tight.devices[0].kv_blocks == demand.expected
    less = plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=needed / MIB - 0.1))
    assert less.tier_of[MODEL.embedding] is Tier.NVME
    assert less.nvme_bytes == MODEL.by_name[MODEL.embedding].nbytes
    assert (less.streamed_bytes, less.devices[0].ring_bytes) == (0, 0)  # rows only, nothing streams


def test_the_disk_part_is_spread_evenly_and_gets_a_ring() -> None:
    plan = plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=12))
    (device,) = plan.devices
    per_layer = streamed_per_layer(MODEL, plan)
    largest = max(p.nbytes for p in MODEL.layer_parameters(0))
    assert min(per_layer) > 0
    assert all(abs(n - sum(per_layer) / len(per_layer)) < largest for n in per_layer)
    assert device.ring_bytes >= 2 * max(per_layer)
    assert device.window >= 1
    free = device.budget_bytes - device.resident_bytes - device.ring_bytes - device.kv_bytes - device.activation_bytes
    assert 0 <= free < 2 * largest
    assert plan.tier_of[MODEL.embedding] is Tier.NVME  # the cheapest to leave on disk
    assert plan.nvme_bytes + device.resident_bytes == MODEL.nbytes


def test_everything_streams_when_next_to_nothing_fits() -> None:
    plan = plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=6.5))
    (device,) = plan.devices
    assert plan.tier_of[MODEL.head] is Tier.NVME
    assert 1 <= device.head_chunk_rows < MODEL.vocab_size
    norms = {p.name for p in MODEL.parameters if len(p.shape) == 1}
    assert all(plan.tier_of[name] is Tier.DEVICE for name in norms)
    assert [p.name for p in plan.placements] == [p.name for p in MODEL.parameters]


def test_a_smaller_budget_never_predicts_a_faster_step() -> None:
    steps = [
        plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=mb)).predictions[0].seconds
        for mb in (7, 9, 11, 13, 15, 17, 19, 25)
    ]
    assert all(slow >= fast * 0.999 for slow, fast in pairwise(steps))


def test_a_tied_pair_is_one_copy() -> None:
    manifest = llama(tied=True)
    plan = plan_weights(manifest, CPU_NODE, RATES, configuration(device_mb=6.5))
    assert len(plan.placements) == len(manifest.parameters)
    assert plan.tier_of[manifest.embedding] is Tier.NVME
    assert plan.devices[0].head_chunk_rows > 0
    assert plan.streamed_bytes == plan.nvme_bytes  # as the head all of it streams


def test_host_memory_on_a_cpu_is_used_in_place() -> None:
    plan = plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=12, host_mb=100))
    assert plan.nvme_bytes == 0
    assert plan.host_bytes + plan.devices[0].resident_bytes == MODEL.nbytes
    assert plan.devices[0].ring_bytes == 0
    assert plan.predictions[0].io_seconds == 0


def test_what_the_host_cannot_hold_goes_to_disk() -> None:
    plan = plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=8, host_mb=4))
    assert 0 < plan.host_bytes <= 4 * MIB
    assert plan.nvme_bytes > 0
    without = plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=8))
    assert plan.streamed_bytes < without.streamed_bytes


def test_tiers_are_filled_fastest_first() -> None:
    config = configuration(device_mb=8, host_mb=3, ramdisk={"enabled": True, "size_mb": 4, "usable_percent": 100})
    plan = plan_weights(MODEL, CPU_NODE, RAMDISK_RATES, config)
    assert 2.5 * MIB < plan.host_bytes <= 3 * MIB
    assert 3.5 * MIB < plan.ramdisk_bytes <= 4 * MIB
    assert plan.nvme_bytes > 0
    assert plan.host_bytes + plan.ramdisk_bytes + plan.nvme_bytes + plan.devices[0].resident_bytes == MODEL.nbytes
    without = plan_weights(MODEL, CPU_NODE, RAMDISK_RATES, configuration(device_mb=8, host_mb=3))
    assert plan.predictions[0].seconds < 0.9 * without.predictions[0].seconds
    assert any(f"{plan.ramdisk_bytes / MIB:.1f} MB are copied to the ramdisk" in note for note in plan.notes)
    # What is on the ramdisk streams, and is spread as evenly as what is on disk.
    assert plan.streamed_bytes > plan.nvme_bytes - MODEL.by_name[MODEL.embedding].nbytes
    per_layer = [
        sum(p.nbytes for p in MODEL.layer_parameters(i) if plan.tier_of[p.name] is Tier.RAMDISK) for i in range(8)
    ]
    largest = max(p.nbytes for p in MODEL.layer_parameters(0))
    assert max(per_layer) - min(per_layer) <= 2 * largest


def test_a_tier_that_does_not_pay_is_left_out_and_the_plan_says_why() -> None:
    config = configuration(device_mb=8, ramdisk={"enabled": True, "size_mb": 100})
    slow = replace(RATES, ramdisk_read_bytes_per_s=0.5e9)
    plan = plan_weights(MODEL, CPU_NODE, slow, config)
    assert plan.ramdisk_bytes == 0 < plan.nvme_bytes
    (note,) = [note for note in plan.notes if "left out" in note]
    assert "the ramdisk tier" in note
    with_it, without = (float(n) for n in re.findall(r"([\d.]+) ms", note))
    assert with_it > without == pytest.approx(plan.predictions[0].seconds * 1e3, abs=0.06)
    # Equally fast is not worth the memory and the copies; a fast one is.
    assert plan_weights(MODEL, CPU_NODE, replace(slow, ramdisk_read_bytes_per_s=1e9), config).ramdisk_bytes == 0
    fast = plan_weights(MODEL, CPU_NODE, RAMDISK_RATES, config)
    assert fast.ramdisk_bytes > 0
    assert not any("left out" in note for note in fast.notes)
    # There is nothing else to put it on.
    only = configuration(device_mb=8, ramdisk={"enabled": True, "size_mb": 100}, nvme={"enabled": False})
    assert plan_weights(MODEL, CPU_NODE, slow, only).ramdisk_bytes > 0


def test_reading_that_hides_behind_compute_needs_no_host_memory() -> None:
    def host_bytes(disk: float) -> int:
        rates = replace(RATES, disk_read_bytes_per_s=disk)
        return plan_weights(MODEL, CPU_NODE, rates, configuration(device_mb=12, host_mb=100)).host_bytes

    assert host_bytes(100e9) == 0
    assert host_bytes(1e9) > 0
    # They are read in exactly the time of everything else: too close to rely on.
    plan = plan_weights(MODEL, CPU_NODE, replace(RATES, disk_read_bytes_per_s=100e9), configuration(device_mb=12))
    assert host_bytes(plan.streamed_bytes / plan.predictions[0].seconds) > 0


def test_copies_of_the_disk_tier_are_announced_with_their_size_and_time() -> None:
    node = replace(CPU_NODE, disks=(Disk("/fast", "xfs", 50 * GIB, 100 * GIB),))
    plan = plan_weights(MODEL, node, FULL_RATES, configuration(device_mb=8, nvme={"paths": ["/fast"]}))
    (note,) = [note for note in plan.notes if "tiers.nvme.paths" in note]
    assert f"{plan.nvme_bytes / MIB:.1f} MB are copied to the 1 directories" in note
    assert "about 0 s" in note
    tight = replace(CPU_NODE, disks=(Disk("/fast", "xfs", 5 * GIB + 3 * MIB, 100 * GIB),))
    with pytest.raises(BudgetError, match="nvme 3.0 MB"):
        plan_weights(MODEL, tight, FULL_RATES, configuration(device_mb=8, nvme={"paths": ["/fast"]}))


def test_packing_follows_the_rates() -> None:
    plan = plan_weights(MODEL, CPU_NODE, FULL_RATES, configuration())
    assert plan.devices[0].packed
    assert any("1.50x as fast at one row" in note for note in plan.notes)
    same = replace(FULL_RATES, packed_matrix_bytes_per_s=FULL_RATES.matrix_bytes_per_s)
    assert not plan_weights(MODEL, CPU_NODE, same, configuration()).devices[0].packed
    assert not plan_weights(MODEL, CPU_NODE, RATES, configuration()).devices[0].packed
    gpu = replace(GPU_RATES, packed_matrix_bytes_per_s=((1, 1e15),))
    assert not plan_weights(MODEL, GPU_NODE, gpu, configuration()).devices[0].packed


def test_on_a_gpu_host_parameters_go_through_the_ring() -> None:
    node = replace(GPU_NODE, gpus=(GPU(0, "small", GIB, GIB), GPU(1, "other", GIB, GIB)))
    plan = plan_weights(MODEL, node, GPU_RATES, configuration(device_mb=12, host_mb=None))
    assert plan.devices[0].kind == "cuda"
    assert plan.nvme_bytes == 0 < plan.host_bytes
    assert plan.devices[0].ring_bytes > 0
    assert plan.predictions[0].io_seconds > 0
    assert any("1 of 2 GPUs" in warning for warning in plan.warnings)


def test_parameters_that_are_cast_stay_resident() -> None:
    manifest = llama(dtype="float32")
    plan = plan_weights(manifest, CPU_NODE, RATES, configuration(device_mb=30))
    assert set(plan.tier_of.values()) == {Tier.DEVICE}
    assert plan.devices[0].resident_bytes == manifest.nbytes // 2
    assert any("cast" in warning for warning in plan.warnings)
    with pytest.raises(BudgetError, match="a checkpoint saved in bfloat16"):
        plan_weights(manifest, CPU_NODE, RATES, configuration(device_mb=12))


# --- rules -----------------------------------------------------------------------------------------------------------


def rules(*items: tuple[str, str, int]) -> dict[str, object]:
    return {"rules": [{"pattern": pattern, "tier": tier, "priority": priority} for pattern, tier, priority in items]}


def test_a_rule_offloads_a_model_that_fits_and_says_what_it_costs() -> None:
    plan = plan_weights(MODEL, CPU_NODE, RATES, configuration(placement=rules(("MLP", "nvme", 1))))
    for p in plan.placements:
        assert p.tier is (Tier.NVME if ".mlp." in p.name else Tier.DEVICE)
        assert p.reason == "rule 'MLP'" or p.tier is Tier.DEVICE
    assert plan.devices[0].ring_bytes > 0
    costs = [warning for warning in plan.warnings if "the model fits" in warning]
    assert len(costs) == 1
    numbers = [float(n) for n in re.findall(r"([\d.]+) ms", costs[0])]
    assert numbers[0] > numbers[1]


def test_a_rule_that_costs_time_is_obeyed_and_priced_where_the_model_does_not_fit_either() -> None:
    attention_off = rules(("self_attn", "nvme", 1), ("embed", "device", 1))
    plan = plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=14, placement=attention_off))
    assert all(p.tier is Tier.NVME for p in plan.placements if "self_attn" in p.name)
    (cost,) = [warning for warning in plan.warnings if "instead of" in warning]
    actual, ideal = (float(n) for n in re.findall(r"([\d.]+) ms", cost))
    assert actual == pytest.approx(plan.predictions[0].seconds * 1e3, abs=0.06)
    bare = plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=14))
    assert ideal == pytest.approx(bare.predictions[0].seconds * 1e3, abs=0.06)
    harmless = rules(("embed", "nvme", 1))
    plan = plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=12, placement=harmless))
    assert not any("instead of" in warning for warning in plan.warnings)


def test_a_rule_for_the_ramdisk() -> None:
    placement = rules(("mlp", "ramdisk", 1))
    config = configuration(ramdisk={"enabled": True, "size_mb": 100}, placement=placement)
    plan = plan_weights(MODEL, CPU_NODE, RAMDISK_RATES, config)
    assert all(p.tier is (Tier.RAMDISK if ".mlp." in p.name else Tier.DEVICE) for p in plan.placements)
    assert plan.streamed_bytes == plan.ramdisk_bytes > 0
    assert plan.devices[0].ring_bytes > 0
    assert any("the model fits" in warning for warning in plan.warnings)
    off = plan_weights(MODEL, CPU_NODE, RAMDISK_RATES, configuration(placement=placement))
    assert set(off.tier_of.values()) == {Tier.DEVICE}
    assert all("ramdisk has no room" in p.reason for p in off.placements if ".mlp." in p.name)


def test_the_lowest_priority_wins_and_regular_expressions_work() -> None:
    placement = rules(("mlp", "nvme", 50), (r"re:layers\.[0-3]\..*down_proj", "device", 1))
    plan = plan_weights(MODEL, CPU_NODE, RATES, configuration(placement=placement))
    for layer in range(8):
        down = plan.tier_of[f"model.layers.{layer}.mlp.down_proj.weight"]
        assert down is (Tier.DEVICE if layer < 4 else Tier.NVME)
        assert plan.tier_of[f"model.layers.{layer}.mlp.up_proj.weight"] is Tier.NVME


def test_a_rule_whose_tier_is_full_falls_through_with_the_reason() -> None:
    placement = rules(("mlp", "host", 1), ("mlp", "nvme", 2))
    plan = plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=40, host_mb=3, placement=placement))
    tiers = [plan.tier_of[f"model.layers.{i}.mlp.{m}_proj.weight"] for i in range(8) for m in ("gate", "up", "down")]
    assert tiers.count(Tier.HOST) == 8  # 3 MB of 0.375 MB each
    assert tiers.count(Tier.NVME) == 16
    fell = [p.reason for p in plan.placements if "after" in p.reason]
    assert len(fell) == 16
    assert fell[0] == "rule 'mlp' after rule 'mlp': host is full"
    assert any("16 parameters (6 MB) fell through" in warning for warning in plan.warnings)


def test_a_rule_for_the_device_is_obeyed_before_the_default() -> None:
    placement = rules(("self_attn", "device", 1))
    plan = plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=12, placement=placement))
    assert all(p.tier is Tier.DEVICE for p in plan.placements if "self_attn" in p.name)
    assert plan.nvme_bytes > 0


def test_more_than_fits_on_the_device_by_rule() -> None:
    plan = plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=12, placement=rules(("layers", "device", 1))))
    assert plan.nvme_bytes > 0
    assert any("fell through" in warning for warning in plan.warnings)


def test_rules_do_not_move_norms_and_unused_rules_are_reported() -> None:
    placement = rules(("layers.2.", "nvme", 1), ("experts", "nvme", 2))
    plan = plan_weights(MODEL, CPU_NODE, RATES, configuration(placement=placement))
    norm = next(p for p in plan.placements if p.name == "model.layers.2.input_layernorm.weight")
    assert norm.tier is Tier.DEVICE
    assert "does not apply" in norm.reason
    assert any("'experts' matches no parameter" in warning for warning in plan.warnings)


def test_a_rule_finds_a_tied_head_by_its_other_name() -> None:
    manifest = llama(tied=True)
    plan = plan_weights(manifest, CPU_NODE, RATES, configuration(placement=rules(("lm_head", "nvme", 1))))
    assert plan.tier_of[manifest.embedding] is Tier.NVME
    assert plan.devices[0].head_chunk_rows > 0


# --- KV --------------------------------------------------------------------------------------------------------------


def test_kv_is_reduced_to_its_floor_before_the_model_is_refused() -> None:
    config = configuration(
        device_mb=10,
        kv={"expected_sequences": 64, "expected_context": 512},
        scheduler={"max_num_seqs": 64, "max_num_batched_tokens": 64},
    )
    plan = plan_weights(MODEL, CPU_NODE, RATES, config)
    (device,) = plan.devices
    assert 512 // 16 + 1 <= device.kv_blocks < 64 * 512 // 16
    assert any("KV holds" in warning for warning in plan.warnings)


def test_a_model_that_just_fits_is_not_streamed_for_kv_that_does_not_fit_anyway() -> None:
    config = configuration(
        device_mb=24,
        kv={"expected_sequences": 64, "expected_context": 512},
        scheduler={"max_num_seqs": 64, "max_num_batched_tokens": 64},
    )
    plan = plan_weights(MODEL, CPU_NODE, replace(RATES, disk_read_bytes_per_s=1e8), config)
    assert plan.streamed_bytes == 0
    assert any("KV holds" in warning for warning in plan.warnings)


def test_block_cap() -> None:
    plan = plan_weights(MODEL, CPU_NODE, RATES, configuration(kv={"max_blocks": 10}))
    assert plan.devices[0].kv_blocks == 10


def test_the_ring_is_as_deep_as_its_units_are_small() -> None:
    """Enough is ahead for several reads in flight, and for what arrives while a layer is computed on."""

    def ring(manifest: ModelManifest, rates: Rates = RATES) -> tuple[int, int]:
        (device,) = plan_weights(
            manifest, CPU_NODE, rates, configuration(device_mb=0.45 * manifest.nbytes / MIB)
        ).devices
        return device.window, device.ring_bytes

    large = llama(layers=16, hidden=2048, intermediate=6144, vocab=1024)
    window, nbytes = ring(large)
    assert window == 2
    assert nbytes > 100 * MIB
    medium = llama(layers=40, hidden=1024, intermediate=2048, vocab=1024)
    window, nbytes = ring(medium)
    assert window >= 2
    assert nbytes * window / (window + 1) >= 16 * MIB
    small = llama(layers=60, hidden=512, intermediate=1024, vocab=1024)
    window, nbytes = ring(small)
    assert window > 4
    # A disk that is as fast as the layers fills more while one of them is computed on.
    sweep = sweep_of(large, plan_weights(large, CPU_NODE, RATES, configuration(device_mb=400)))
    assert useful_depth(sweep, replace(RATES, disk_read_bytes_per_s=100e9), 50 * MIB) > (
        useful_depth(sweep, RATES, 50 * MIB)
    )
    assert useful_depth(sweep, RATES, 2**40) == MEASURED_DEPTH
    assert useful_depth(sweep, RATES, 4096) == DEEPEST


def test_the_window_can_be_chosen() -> None:
    chosen = plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=13, prefetch={"window": 5}))
    assert chosen.devices[0].window == 5
    reduced = plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=7, prefetch={"window": 5}))
    assert reduced.devices[0].window < 5
    assert any("prefetch.window is 5" in warning for warning in reduced.warnings)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_refusal_names_a_device_budget_that_works() -> None:
    with pytest.raises(BudgetError, match=r"raise tiers\.device\.max_mb to (\d+)") as refusal:
        plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=3))
    assert "device 3.0 MB" in str(refusal.value)
    match = re.search(r"max_mb to (\d+)", str(refusal.value))
    assert match is not None
    needed = int(match[1])
    plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=needed))
    with pytest.raises(BudgetError):
        plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=needed - 1))


def test_a_refusal_names_a_context_that_works() -> None:
    long = {"expected_sequences": 1, "expected_context": 1024}
    with pytest.raises(BudgetError, match=r"lower kv\.expected_context to (\d+)") as refusal:
        plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=7, kv=long))
    match = re.search(r"expected_context to (\d+)", str(refusal.value))
    assert match is not None
    plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=7, kv={**long, "expected_context": int(match[1])}))


def test_a_refusal_without_disk_asks_for_it() -> None:
    with pytest.raises(BudgetError, match=r"tiers\.nvme\.enabled to true"):
        plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=12, nvme={"enabled": False}))


def test_a_refusal_with_too_little_disk_names_how_much() -> None:
    with pytest.raises(BudgetError, match=r"raise tiers\.nvme\.max_gb to") as refusal:
        plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=8, nvme={"max_gb": 0.001}))
    match = re.search(r"max_gb to ([\d.]+)", str(refusal.value))
    assert match is not None
    plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=8, nvme={"max_gb": float(match[1].rstrip("."))}))


def test_a_machine_without_memory_is_told_to_free_some() -> None:
    with pytest.raises(BudgetError, match="free .* more memory"):
        plan_weights(MODEL, replace(CPU_NODE, ram_available=GIB), RATES, configuration())


def test_seventy_billion_parameters_on_one_gpu() -> None:
    manifest = llama(layers=80, hidden=8192, intermediate=28672, vocab=128256, heads=64, kv_heads=8, context=131072)
    plan = plan_weights(manifest, GPU_NODE, GPU_RATES, configuration(host_mb=None))
    (device,) = plan.devices
    assert 60 * GIB < device.resident_bytes < 72 * GIB
    assert plan.nvme_bytes == 0
    assert device.resident_bytes + plan.host_bytes == manifest.nbytes
    # The bus is the bottleneck, and it is used all the time.
    layers_off = sum(
        p.nbytes for p in manifest.parameters if p.role is not Role.EMBEDDING and plan.tier_of[p.name] is Tier.HOST
    )
    assert plan.predictions[0].seconds == pytest.approx(layers_off / 24e9, rel=0.01)
    assert sum(resident_nbytes(p, manifest) for p in manifest.parameters) == manifest.nbytes
