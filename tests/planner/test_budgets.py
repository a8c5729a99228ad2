"""A4: budgets per tier, absolute caps, one RAM on a CPU node."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raytier.config import MIB
from raytier.errors import ResourceNotAvailableError
from raytier.hardware.inventory import GPU, NodeInventory
from raytier.planner.budgets import (
    COMPUTE_PROCESS_BYTES,
    CUDA_CONTEXT_BYTES,
    GIB,
    OTHER_PROCESSES_BYTES,
    UNLIMITED,
    node_budgets,
    resolve_kind,
)
from tests.planner.models import CPU_NODE, GPU_NODE, configuration

FOOTPRINT = COMPUTE_PROCESS_BYTES + OTHER_PROCESSES_BYTES
#: Where Ray's memory monitor starts to kill.
RAY_THRESHOLD = 0.95


def test_on_a_cpu_node_device_and_host_are_one_ram() -> None:
    config = configuration(device_mb=4096, host_mb=None)
    budgets = node_budgets(CPU_NODE, config, "cpu")
    ram = CPU_NODE.ram_available - int(0.07 * CPU_NODE.ram_total) - FOOTPRINT
    assert budgets.device_bytes == 4096 * MIB
    assert budgets.host_bytes == pytest.approx(ram * 0.8 - 1024 * MIB - 4096 * MIB, abs=2)
    assert budgets.device_capacity == pytest.approx(ram * 0.9 - 256 * MIB, abs=2)
    assert budgets.nvme_bytes == UNLIMITED
    assert len(budgets.explanation) == 4


@pytest.mark.parametrize("device_mb", [None, 100, 4096])
@pytest.mark.parametrize("limit_gib", [None, 2, 4, 20])
def test_everything_together_stays_below_rays_threshold(device_mb: float | None, limit_gib: int | None) -> None:
    limit = None if limit_gib is None else limit_gib * GIB
    used = GIB // 2
    node = NodeInventory("n", 2, 24 * GIB, (limit or 24 * GIB) - used, limit)
    config = configuration(device_mb=device_mb, host_mb=None)
    budgets = node_budgets(node, config, "cpu")
    assert used + FOOTPRINT + budgets.device_bytes + budgets.host_bytes <= RAY_THRESHOLD * node.memory_limit


def test_a_full_machine_has_no_budget_but_no_negative_one_either() -> None:
    budgets = node_budgets(replace(CPU_NODE, ram_available=GIB), configuration(host_mb=None), "cpu")
    assert (budgets.device_bytes, budgets.host_bytes) == (0, 0)


def test_on_cuda_the_device_is_the_gpu_and_the_host_is_ram() -> None:
    budgets = node_budgets(GPU_NODE, configuration(host_mb=None), "cuda")
    free = GPU_NODE.gpus[0].free_bytes - CUDA_CONTEXT_BYTES
    ram = GPU_NODE.ram_available - int(0.07 * GPU_NODE.ram_total) - FOOTPRINT
    assert budgets.device_bytes == pytest.approx(free * 0.9 - 256 * MIB, abs=2)
    assert budgets.host_bytes == pytest.approx(ram * 0.8 - 1024 * MIB, abs=2)


def test_disk_tier() -> None:
    assert node_budgets(CPU_NODE, configuration(nvme={"enabled": False}), "cpu").nvme_bytes == 0
    assert node_budgets(CPU_NODE, configuration(nvme={"max_gb": 1.5}), "cpu").nvme_bytes == 1.5 * GIB


def test_kind() -> None:
    assert resolve_kind(CPU_NODE, configuration()) == "cpu"
    assert resolve_kind(GPU_NODE, configuration()) == "cuda"
    assert resolve_kind(GPU_NODE, configuration(compute={"device": "cpu"})) == "cpu"
    with pytest.raises(ResourceNotAvailableError, match=r"compute\.device"):
        resolve_kind(CPU_NODE, configuration(compute={"device": "cuda"}))


def test_an_unknown_gpu_is_refused() -> None:
    node = replace(GPU_NODE, gpus=(GPU(0, "A", GIB, GIB),))
    with pytest.raises(ResourceNotAvailableError, match="GPU 1"):
        node_budgets(node, configuration(), "cuda", device_index=1)
