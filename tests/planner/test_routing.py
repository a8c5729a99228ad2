"""C1, E2: what a mixture of experts costs, which of its parameters leave the device, and how fast that is planned."""

from __future__ import annotations

import random
import time
from dataclasses import replace

import pytest

from raytier.checkpoint.manifest import ModelManifest
from raytier.config import MIB
from raytier.planner.cost import describe_sweep, predict_step, sweep_of
from raytier.planner.placement import plan_weights
from raytier.planner.plan import Tier
from raytier.planner.routing import IN_FLIGHT_BYTES, expected_experts, plan_slots
from raytier.planner.sizing import Ring
from tests.planner.models import CPU_NODE, GIB, GPU_NODE, GPU_RATES, RATES, configuration, mixture

MODEL = mixture(layers=6, experts=16, per_token=2, hidden=256, intermediate=256, dense_layers=1)
EXPERT = 3 * 2 * 256 * 256


def routed(manifest: ModelManifest) -> list[str]:
    return [p.name for p in manifest.parameters if p.expert]


@pytest.mark.parametrize(("experts", "per_token"), [(8, 2), (128, 8), (256, 8), (4, 4)])
@pytest.mark.parametrize("tokens", [1, 3, 32])
def test_expected_experts_are_those_of_random_routers(experts: int, per_token: int, tokens: int) -> None:
    rng = random.Random(7)
    tries = 3000
    hits = sum(len({e for _ in range(tokens) for e in rng.sample(range(experts), per_token)}) for _ in range(tries))
    assert expected_experts(experts, per_token, tokens) == pytest.approx(hits / tries, rel=0.02)
    assert expected_experts(experts, per_token, 1) == pytest.approx(per_token)


def test_bytes_and_compute_follow_the_expected_experts() -> None:
    on_disk = dict.fromkeys(MODEL.by_name, Tier.DEVICE) | dict.fromkeys(routed(MODEL), Tier.NVME)
    sweep = describe_sweep(MODEL, on_disk, "cpu", Ring(slots=16, slot_bytes=EXPERT))
    assert sweep.streamed_bytes == 5 * 2 * EXPERT
    assert all(not unit.disk_bytes for unit in sweep.units)
    resident = describe_sweep(MODEL, dict.fromkeys(MODEL.by_name, Tier.DEVICE), "cpu", Ring())
    for batch in (1, 8, 32):
        fetched = 5 * expected_experts(16, 2, batch) * EXPERT
        with_disk, without = predict_step(sweep, RATES, batch, 1), predict_step(resident, RATES, batch, 1)
        assert with_disk.io_seconds == pytest.approx(fetched / RATES.disk_read_bytes_per_s)
        assert with_disk.seconds == pytest.approx(without.seconds + with_disk.io_seconds), "nothing hides it"
        assert with_disk.compute_seconds == pytest.approx(without.compute_seconds)
    dense = MODEL.nbytes - len(routed(MODEL)) // 3 * EXPERT - MODEL.by_name[MODEL.embedding].nbytes
    once = predict_step(resident, RATES, 1, 1).compute_seconds
    assert once == pytest.approx((dense + 5 * 2 * EXPERT) / RATES.matrix_rate(1), rel=0.001)
    on_host = dict.fromkeys(MODEL.by_name, Tier.DEVICE) | dict.fromkeys(routed(MODEL), Tier.HOST)
    over_bus = predict_step(describe_sweep(MODEL, on_host, "cuda", Ring()), GPU_RATES, 1, 1)
    assert over_bus.io_seconds == pytest.approx(5 * 2 * EXPERT / GPU_RATES.host_to_device_bytes_per_s)


def test_experts_leave_first_whole_and_spread_over_the_layers() -> None:
    everything = plan_weights(MODEL, CPU_NODE, RATES, configuration()).devices[0].budget_bytes
    assert everything > MODEL.nbytes
    device_mb = (MODEL.nbytes * 0.8) / MIB + 4
    plan = plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=device_mb))
    left = {p.name for p in MODEL.parameters if plan.tier_of[p.name] is Tier.NVME and p.layer is not None}
    assert left and left <= set(routed(MODEL))
    by_expert: dict[tuple[str, int], set[Tier]] = {}
    for p in MODEL.parameters:
        if p.expert:
            by_expert.setdefault((p.expert.bank, p.expert.expert), set()).add(plan.tier_of[p.name])
    assert all(len(tiers) == 1 for tiers in by_expert.values()), "an expert stays together"
    counts = [sum(p.name in left for p in MODEL.layer_parameters(layer)) // 3 for layer in range(1, 6)]
    assert max(counts) - min(counts) <= 1
    (device,) = plan.devices
    assert device.ring_bytes == 0 < device.expert_bytes
    assert plan.streamed_bytes == pytest.approx(2 / 16 * sum(counts) * EXPERT, abs=8)
    assert sweep_of(MODEL, plan).streamed_bytes == plan.streamed_bytes
    # With less room dense parameters follow, and the host takes those before the experts.
    less = plan_weights(MODEL, CPU_NODE, RATES, configuration(device_mb=11, host_mb=6))
    dense = {p.name for p in MODEL.parameters if p.layer is not None and not p.expert}
    assert all(less.tier_of[name] in (Tier.DEVICE, Tier.HOST) for name in dense)
    assert {less.tier_of[name] for name in routed(MODEL)} >= {Tier.NVME}


def test_slots_hold_the_experts_of_a_token_or_keep_the_disk_busy() -> None:
    assert plan_slots(0, 8, 0, sparing=False) == 0
    assert plan_slots(128, 8, 4096, sparing=False) == 128
    assert plan_slots(128, 8, 4 * MIB, sparing=False) == IN_FLIGHT_BYTES // (4 * MIB)
    assert plan_slots(256, 8, 88 * MIB, sparing=False) == 8
    assert plan_slots(5, 8, 88 * MIB, sparing=False) == 5
    assert plan_slots(256, 8, 88 * MIB, sparing=True) == 1


def test_experts_by_rule_have_slots_as_well() -> None:
    rules = {"rules": [{"pattern": "layers.2.mlp.experts.3.down", "tier": "nvme"}]}
    plan = plan_weights(MODEL, CPU_NODE, RATES, configuration(placement=rules))
    (device,) = plan.devices
    assert plan.nvme_bytes == EXPERT // 3 <= device.expert_bytes < EXPERT + 64 * 1024
    assert plan.streamed_bytes == round(2 / 16 * EXPERT / 3)


#: DeepSeek-V3 and Qwen3-235B-A22B by their configs, every projection of an expert a parameter of its own.
DEEPSEEK = {"layers": 61, "experts": 256, "hidden": 7168, "intermediate": 2048, "dense_layers": 3, "heads": 128}
QWEN = {"layers": 94, "experts": 128, "hidden": 4096, "intermediate": 1536, "vocab": 151936, "heads": 64}


@pytest.mark.parametrize(("sizes", "gpu"), [(DEEPSEEK, False), (QWEN, True)], ids=["deepseek_v3", "qwen3_moe"])
def test_tens_of_thousands_of_experts_are_planned_in_seconds(sizes: dict[str, int], gpu: bool) -> None:
    """About 3 s on two cores; the limit is for machines that others use."""
    manifest = mixture(per_token=8, **sizes)
    assert len(manifest.parameters) > 30_000
    node = replace(GPU_NODE if gpu else CPU_NODE, ram_total=400 * GIB, ram_available=390 * GIB)
    limits = configuration(host_mb=None) if gpu else configuration(device_mb=60 * 1024, host_mb=150 * 1024)
    began = time.process_time()
    plan = plan_weights(manifest, node, GPU_RATES if gpu else RATES, limits)
    assert time.process_time() - began < 15
    experts = routed(manifest)
    assert sum(plan.tier_of[name] is not Tier.DEVICE for name in experts) > len(experts) / 2
    dense = [p for p in manifest.parameters if p.layer is not None and not p.expert]
    assert sum(plan.tier_of[p.name] is Tier.DEVICE for p in dense) > 0.9 * len(dense)
