"""C6: bundles, and clusters that cannot hold them."""

from __future__ import annotations

import pytest

from raytier.errors import ResourceNotAvailableError
from raytier.planner.placement import plan_weights
from raytier.planner.resources import check_cluster, plan_resources
from tests.planner.models import CPU_NODE, GPU_NODE, GPU_RATES, RATES, configuration, llama

CPU_PLAN = plan_resources(plan_weights(llama(), CPU_NODE, RATES, configuration()), CPU_NODE)
GPU_PLAN = plan_resources(plan_weights(llama(), GPU_NODE, GPU_RATES, configuration()), GPU_NODE)


def test_bundles_of_a_cpu_node() -> None:
    assert CPU_PLAN.roles == ("replica", "device", "host", "disk", "kv")
    assert CPU_PLAN.bundles == ({"CPU": 0.1}, {"CPU": 0.5}, {"CPU": 0.1}, {"CPU": 0.1}, {"CPU": 0.1})
    assert CPU_PLAN.strategy == "STRICT_PACK"
    check_cluster(CPU_PLAN, [{"CPU": 1.0, "memory": 1e9}])


def test_a_gpu_is_taken_whole() -> None:
    assert GPU_PLAN.bundles[1] == {"CPU": 0.5, "GPU": 1.0}


def test_the_host_pool_asks_for_memory() -> None:
    weights = plan_weights(llama(), CPU_NODE, RATES, configuration(device_mb=8, host_mb=100))
    assert weights.host_bytes > 0
    assert plan_resources(weights, CPU_NODE).bundles[2] == {"CPU": 0.1, "memory": float(weights.host_bytes)}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([], "no living node"),
        ([{"CPU": 4.0}], r"bundle 1 \(device\) needs 1 GPU, and node 1 of 1 has 0 left of 0"),
        # STRICT_PACK: what two nodes have together does not help.
        ([{"CPU": 0.2, "GPU": 1.0}, {"CPU": 8.0}], r"bundle 1 \(device\)"),
        ([{"CPU": 0.8, "GPU": 1.0}], r"bundle 4 \(kv\) needs 0.1 CPU, and node 1 of 1 has .* left of 0.8"),
    ],
)
def test_too_little_is_refused_with_the_missing_bundle(nodes: list[dict[str, float]], message: str) -> None:
    with pytest.raises(ResourceNotAvailableError, match=message):
        check_cluster(GPU_PLAN, nodes)


def test_one_fitting_node_is_enough() -> None:
    check_cluster(GPU_PLAN, [{"CPU": 0.1}, {"CPU": 0.9, "GPU": 1.0}])


def test_a_plan_for_another_machine_is_refused() -> None:
    weights = plan_weights(llama(), GPU_NODE, GPU_RATES, configuration())
    with pytest.raises(ResourceNotAvailableError, match="GPU 0"):
        plan_resources(weights, CPU_NODE)
