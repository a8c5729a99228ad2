"""A3, A4, A5: budgets per tier, absolute caps, one RAM on a CPU node, directories with room."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raytier.config import MIB
from raytier.errors import ResourceNotAvailableError
from raytier.hardware.inventory import GPU, Disk, NodeInventory
from raytier.planner.budgets import (
    CUDA_CONTEXT_BYTES,
    GIB,
    GROWTH_BYTES,
    RAY_PROCESSES_BYTES,
    UNLIMITED,
    Started,
    footprint,
    node_budgets,
    planned_paths,
    resolve_kind,
)
from tests.planner.models import CPU_NODE, GPU_NODE, configuration

FOOTPRINT = footprint("nothing")
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


@pytest.mark.parametrize("ramdisk", [{}, {"enabled": True, "size_mb": 8000}])
@pytest.mark.parametrize("device_mb", [None, 100, 4096])
@pytest.mark.parametrize("limit_gib", [None, 2, 4, 20])
@pytest.mark.parametrize("threshold", [RAY_THRESHOLD, 0.7])
def test_everything_together_stays_below_rays_threshold(
    ramdisk: dict[str, object], device_mb: float | None, limit_gib: int | None, threshold: float
) -> None:
    limit = None if limit_gib is None else limit_gib * GIB
    used = GIB // 2
    node = NodeInventory(
        "n", 2, 24 * GIB, (limit or 24 * GIB) - used, limit, shm_free=12 * GIB, memory_threshold=threshold
    )
    for rules in ([], [{"pattern": "mlp", "tier": "ramdisk"}]):
        config = configuration(device_mb=device_mb, host_mb=None, ramdisk=ramdisk, placement={"rules": rules})
        budgets = node_budgets(node, config, "cpu")
        planned = budgets.device_bytes + budgets.host_bytes + budgets.ramdisk_bytes
        assert planned == 0 or used + FOOTPRINT + planned <= threshold * node.memory_limit


def test_without_a_memory_monitor_the_kernel_still_needs_some() -> None:
    budgets = node_budgets(replace(CPU_NODE, memory_threshold=1.0), configuration(), "cpu")
    assert "1229 MB kept free" in budgets.explanation[0]  # 5 % of 24 GB


def test_processes_that_run_already_are_not_counted_again() -> None:
    taken: dict[Started, int] = {"nothing": 0, "ray": RAY_PROCESSES_BYTES, "all": FOOTPRINT - GROWTH_BYTES}
    capacities = [
        node_budgets(
            replace(CPU_NODE, ram_available=22 * GIB - nbytes), configuration(), "cpu", started=started
        ).device_capacity
        for started, nbytes in taken.items()
    ]
    assert capacities == [capacities[0]] * 3


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


# --- ramdisk and directories of the disk tier ------------------------------------------------------------------------


def test_a_ramdisk_is_bounded_by_its_share_its_directory_and_the_ram() -> None:
    def ramdisk(node: NodeInventory = CPU_NODE, device_mb: float = 1000, **keys: object) -> float:
        config = configuration(device_mb=device_mb, ramdisk={"enabled": True, **keys})
        return node_budgets(node, config, "cpu").ramdisk_bytes / MIB

    assert node_budgets(CPU_NODE, configuration(), "cpu").ramdisk_bytes == 0
    assert ramdisk(size_mb=2000, usable_percent=50) == 1000
    assert ramdisk(replace(CPU_NODE, shm_free=300 * MIB), size_mb=2000, usable_percent=100) == 300
    fast = replace(CPU_NODE, disks=(Disk("/fast", "tmpfs", 400 * MIB, GIB),))
    assert ramdisk(fast, path="/fast", usable_percent=100) == 400
    mounted = ramdisk(path="/mnt/new", mount=True, size_mb=500, usable_percent=100)
    assert mounted == 500  # it will be as large as it is asked to be
    left = ramdisk(size_mb=50_000, usable_percent=100, device_mb=15_000)
    ram = CPU_NODE.ram_available - 0.07 * CPU_NODE.ram_total - FOOTPRINT
    assert left == pytest.approx(min(12 * GIB, ram - 15_000 * MIB) / MIB, abs=1)
    with pytest.raises(ResourceNotAvailableError, match=r"tiers.ramdisk.path: nothing is known about /elsewhere"):
        ramdisk(path="/elsewhere")


def test_host_pool_and_ramdisk_share_the_ram_and_a_rule_puts_the_ramdisk_first() -> None:
    ram = CPU_NODE.ram_available - 0.07 * CPU_NODE.ram_total - FOOTPRINT
    keys = {"device_mb": 1000.0, "host_mb": None, "ramdisk": {"enabled": True, "size_mb": 9000, "usable_percent": 100}}
    default = node_budgets(CPU_NODE, configuration(**keys), "cpu")  # type: ignore[arg-type]
    assert default.host_bytes == pytest.approx(0.8 * ram - 1024 * MIB - 1000 * MIB, abs=2)
    assert default.ramdisk_bytes == pytest.approx(ram - 1000 * MIB - default.host_bytes, abs=2)
    rule = {"rules": [{"pattern": "mlp", "tier": "ramdisk"}]}
    ruled = node_budgets(CPU_NODE, configuration(placement=rule, **keys), "cpu")  # type: ignore[arg-type]
    assert ruled.ramdisk_bytes == 9000 * MIB
    assert ruled.host_bytes == pytest.approx(0.8 * ram - 1024 * MIB - 1000 * MIB - 9000 * MIB, abs=2)


def test_directories_of_the_disk_tier_keep_free_what_they_must() -> None:
    disks = (
        Disk("/a", "xfs", 20 * GIB, 100 * GIB, "1"),
        Disk("/b", "xfs", 8 * GIB, 100 * GIB, "2"),
        Disk("/c", "xfs", 20 * GIB, 100 * GIB, "1"),
    )
    node = replace(CPU_NODE, disks=disks)

    def nvme(*paths: str, **keys: object) -> float:
        return node_budgets(node, configuration(nvme={"paths": paths, **keys}), "cpu").nvme_bytes / GIB

    assert nvme("/a") == 15
    assert nvme("/a", "/b") == 2 * 3  # stripes are dealt out evenly
    assert nvme("/a", "/c") == 15  # on one disk
    assert nvme("/a", min_free_gb=0, max_gb=4) == 4
    assert nvme("/b", min_free_gb=9) == 0
    with pytest.raises(ResourceNotAvailableError, match=r"tiers.nvme.paths: nothing is known about /d"):
        nvme("/a", "/d")


def test_the_paths_to_look_at() -> None:
    assert planned_paths(configuration(), "/models/m") == ("/models/m",)
    config = configuration(nvme={"paths": ["/a", "/b"]}, ramdisk={"enabled": True})
    assert planned_paths(config, "") == ("/a", "/b", "/dev/shm")
    assert planned_paths(configuration(ramdisk={"enabled": True, "path": "/r"}), "/a") == ("/a", "/r")


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
