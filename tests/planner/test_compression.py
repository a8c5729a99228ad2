"""B3, A2: what is compressed on which tier, by the measured rates where that is left to the planner."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raytier.hardware.inventory import Disk
from raytier.hardware.rates import DEFAULT_RATES, Rates
from raytier.planner.cost import DECODE_BESIDE
from raytier.planner.placement import plan_weights
from raytier.planner.plan import Tier, WeightPlan
from tests.planner.models import CPU_NODE, GIB, configuration, llama

PLAIN = llama()
MODEL = replace(PLAIN, parameters=tuple(replace(p, matrix=len(p.shape) == 2) for p in PLAIN.parameters))
NODE = replace(CPU_NODE, disks=(Disk("/cache/store", "xfs", 100 * GIB, 200 * GIB, "1"),))
SLOW_DISK = replace(DEFAULT_RATES, source="measured", disk_read_bytes_per_s=0.5e9, decode_bytes_per_s=3e9)


def planned(rates: Rates, instructions: tuple[str, ...] = (), **sections: Any) -> WeightPlan:
    """Everything of the layers streamed from disk."""
    sections = {"placement": {"rules": [{"pattern": "layers", "tier": "nvme"}]}} | sections
    node = replace(NODE, instruction_sets=instructions)
    return plan_weights(
        MODEL, node, rates, configuration(cache_dir="/cache", device_mb=512, host_mb=1024, **sections), kind="cpu"
    )


def codecs(plan: WeightPlan) -> set[str]:
    return {p.codec for p in plan.placements if p.tier is Tier.NVME}


@pytest.mark.parametrize(
    ("rates", "coded"),
    [
        (SLOW_DISK, True),
        (replace(SLOW_DISK, disk_read_bytes_per_s=8e9), False),  # the disk is faster than decoding
        (replace(SLOW_DISK, decode_bytes_per_s=0.4e9), False),
        (replace(SLOW_DISK, decode_bytes_per_s=None), False),  # nobody knows
    ],
)
def test_auto_compresses_where_it_pays(rates: Rates, coded: bool) -> None:
    plain = planned(rates)
    plan = planned(rates, compression={"nvme": "auto"})
    assert codecs(plan) == ({"zstd-planes"} if coded else {"none"})
    assert any("compression that is auto" in note for note in plan.notes)
    step, without = plan.predictions[0].seconds, plain.predictions[0].seconds
    assert step < 0.95 * without if coded else step == pytest.approx(without)
    assert (plan.streamed_bytes < 0.7 * plain.streamed_bytes) == coded


#: As two cores were measured to be; without the calls, which would be most of so small a model's step.
TWO_CORES = replace(SLOW_DISK, disk_read_bytes_per_s=2.1e9, decode_bytes_per_s=3.3e9, layer_seconds=0, step_seconds=0)


@pytest.mark.parametrize(("disk", "coded"), [(1.0e9, True), (2.1e9, False)])
def test_auto_on_a_throttled_disk_and_on_a_fast_one(disk: float, coded: bool) -> None:
    """T4.throttled: a slow disk leaves the cores time to decode; a fast one does not."""
    plan = planned(replace(TWO_CORES, disk_read_bytes_per_s=disk), compression={"nvme": "auto"})
    assert codecs(plan) == ({"zstd-planes"} if coded else {"none"})


def test_decoding_is_taken_from_computing_once() -> None:
    """Where reading takes longer than both, decoding costs nothing; where it does not, what it takes by itself."""
    rates = replace(TWO_CORES, disk_read_bytes_per_s=0.2e9)
    sections = {"compression": {"nvme": "zstd-planes"}}
    hidden, free = (planned(replace(rates, decode_bytes_per_s=d), **sections).predictions[0] for d in (2.1e9, 1e15))
    assert hidden.seconds == pytest.approx(free.seconds, rel=0.02)
    fast = replace(rates, disk_read_bytes_per_s=50e9)
    hidden, free = (planned(replace(fast, decode_bytes_per_s=d), **sections).predictions[0] for d in (2.1e9, 1e15))
    decoded = sum(MODEL.by_name[p.name].nbytes for p in planned(fast, **sections).placements if p.codec != "none")
    assert hidden.seconds - free.seconds == pytest.approx(decoded / 2.1e9 / DECODE_BESIDE, rel=0.02)


def test_a_sample_of_the_weights_counts_more_than_what_is_typical() -> None:
    noise = replace(MODEL, ratios={"zstd-planes": {"bfloat16": 1.0}})
    config = configuration(
        cache_dir="/cache", placement={"rules": [{"pattern": "layers", "tier": "nvme"}]}, compression={"nvme": "auto"}
    )
    assert codecs(plan_weights(noise, NODE, SLOW_DISK, config, kind="cpu")) == {"none"}


def test_decoding_takes_its_time() -> None:
    fast = planned(SLOW_DISK, compression={"nvme": "zstd-planes"})
    slow = planned(replace(SLOW_DISK, decode_bytes_per_s=0.2e9), compression={"nvme": "zstd-planes"})
    assert slow.predictions[0].seconds > 1.5 * fast.predictions[0].seconds
    assert fast.devices[0].activation_bytes > planned(SLOW_DISK).devices[0].activation_bytes, "readers' memory"


@pytest.mark.parametrize("tier", ["device", "host", "nvme"])
def test_coded_exponents_on_every_tier(tier: str) -> None:
    rules = {"placement": {"rules": [{"pattern": "layers", "tier": tier}]}, "compression": {tier: "coded-exponents"}}
    elsewhere = planned(SLOW_DISK, ("avx512_vbmi2",), **rules)  # kernels compute on them in bf16
    plan = planned(SLOW_DISK, ("avx512_vbmi2", "avx512_bf16"), **rules)
    assert {p.precision for p in elsewhere.placements} == {"source"}
    assert any(f"compression of {tier} is coded-exponents" in text for text in elsewhere.warnings)
    assert not any("coded-exponents" in text for text in plan.warnings)
    coded = {p.name for p in plan.placements if p.precision == "bf16-coded"}
    assert coded and all(MODEL.by_name[name].matrix for name in coded)
    held = {
        "device": lambda plan: plan.devices[0].resident_bytes,
        "host": lambda plan: plan.host_bytes,
        "nvme": lambda plan: plan.nvme_bytes,
    }[tier]
    saved = sum(MODEL.by_name[name].nbytes for name in coded)
    assert held(plan) < held(elsewhere) - 0.25 * saved


def test_what_is_for_files_means_nothing_in_memory() -> None:
    plan = planned(SLOW_DISK, compression={"default": "zstd-planes"})
    assert all(p.codec == "none" for p in plan.placements if p.tier in (Tier.DEVICE, Tier.HOST))
    assert codecs(plan) == {"zstd-planes"}
