"""B1, D2, C1: the planner weighs precision where that is permitted, and says what it costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raytier.config import parse_config
from raytier.errors import BudgetError, ConfigurationError
from raytier.hardware.inventory import Disk
from raytier.planner.placement import plan_weights
from raytier.planner.plan import Tier, WeightPlan
from tests.planner.models import CPU_NODE, FULL_RATES, GIB, GPU_NODE, GPU_RATES, configuration, llama

PLAIN = llama()
MODEL = replace(PLAIN, parameters=tuple(replace(p, matrix=len(p.shape) == 2) for p in PLAIN.parameters))
NODE = replace(CPU_NODE, disks=(Disk("/cache/store", "xfs", 100 * GIB, 200 * GIB, "1"),))
EVERY = ["int4-128", "source", "int8", "int4-64"]


def planned(device_mb: float = 512, tiers: dict[str, Any] | None = None, **precision: Any) -> WeightPlan:
    config = configuration(cache_dir="/cache", device_mb=device_mb, precision=precision)
    return plan_weights(MODEL, NODE, FULL_RATES, config, kind="cpu")


def forms(plan: WeightPlan, *tiers: Tier) -> set[str]:
    """Forms of matrices that may have one."""
    return {
        p.precision
        for p in plan.placements
        if MODEL.by_name[p.name].matrix and p.name != MODEL.embedding and (not tiers or p.tier in tiers)
    }


def seconds(plan: WeightPlan) -> float:
    return plan.predictions[0].seconds


@pytest.mark.parametrize("device_mb", [8, 12, 512])
def test_what_is_permitted_is_never_slower_than_any_of_it_alone(device_mb: float) -> None:
    found = planned(device_mb, permitted=EVERY)
    alone = [planned(device_mb, default=name) for name in EVERY]
    assert seconds(found) <= min(map(seconds, alone)) / 0.97
    assert seconds(found) < 0.9 * seconds(planned(device_mb))


def test_nobody_gets_a_lossy_model_unasked() -> None:
    plan = planned(8)
    assert forms(plan) == {"source"} and not any("relative error" in note for note in plan.notes)
    assert forms(planned(8, permitted=["source"])) == {"source"}
    assert forms(planned(8, permitted=EVERY, enabled=False)) == {"source"}


def test_a_less_exact_form_has_to_be_clearly_faster() -> None:
    """Groups of 64 and of 128 columns differ by 3 % in bytes: hardly in time."""
    assert forms(planned(permitted=["int4-128", "int4-64"])) == {"int4-64"}
    assert forms(planned(permitted=["int4-64", "int8"])) == {"int4-64"}


def test_files_and_memory_have_a_precision_each_and_a_tier_may_have_its_own() -> None:
    plan = planned(8, permitted=["source", "int8", "int4-64"], device="int8")
    assert forms(plan, Tier.DEVICE) <= {"int8"} and forms(plan, Tier.NVME) <= {"int4-64", "int8"}
    assert seconds(plan) < seconds(planned(8, device="int8"))


def test_the_plan_says_how_inexact_it_is() -> None:
    (note,) = (note for note in planned(default="int4-64").notes if "relative error" in note)
    assert "int4-64" in note and "8.5%" in note
    assert any("int8: relative error 0.9%" in note for note in planned(default="int8").notes)


def test_fewer_bytes_are_read_from_memory() -> None:
    """At one row a step takes what reading takes; at many its arithmetic, which is as much in every form."""
    source, int8, int4 = (planned(default=name).predictions for name in ("source", "int8", "int4-64"))
    # The small matrices leave some bytes to norms and scales.
    assert int8[0].compute_seconds == pytest.approx(0.5 * source[0].compute_seconds, rel=0.03)
    assert int4[0].compute_seconds == pytest.approx(0.281 * source[0].compute_seconds, rel=0.03)
    saved = [a.compute_seconds - b.compute_seconds for a, b in zip(source, int8, strict=True)]
    assert saved == pytest.approx([saved[0]] * 3)


def test_a_model_that_fits_nowhere_else_is_planned_in_fewer_bytes() -> None:
    config = configuration(device_mb=9, nvme={"enabled": False})
    with pytest.raises(BudgetError):
        plan_weights(MODEL, NODE, FULL_RATES, config, kind="cpu")
    smaller = configuration(device_mb=9, nvme={"enabled": False}, precision={"permitted": ["source", "int4-64"]})
    assert forms(plan_weights(MODEL, NODE, FULL_RATES, smaller, kind="cpu")) == {"int4-64"}


def test_a_gpu_has_what_it_computes_on() -> None:
    config = configuration(device_mb=512, precision={"permitted": ["int8", "source"]})
    assert forms(plan_weights(MODEL, GPU_NODE, GPU_RATES, config, kind="cuda")) == {"source"}
    config = configuration(device_mb=512, precision={"permitted": ["int8"]})
    with pytest.raises(ConfigurationError, match=r"precision\.permitted: int8 are computed on by CPUs only"):
        plan_weights(MODEL, GPU_NODE, GPU_RATES, config, kind="cuda")


def test_a_default_and_a_choice_contradict_each_other() -> None:
    with pytest.raises(ConfigurationError, match="either default"):
        configuration(precision={"default": "int8", "permitted": ["int4"]})
    models = [{"model_id": "m", "source_path": "/m"}]
    assert parse_config({"models": models, "precision": {"permitted": ["int8"]}}).converts("nvme")
    own = {"permitted": ["int8"], "nvme": "source"}
    assert not parse_config({"models": models, "precision": own}).converts("nvme")
