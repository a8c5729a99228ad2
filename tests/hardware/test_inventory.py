"""A1, A4: what is on a node, in any cgroup."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from raytier.errors import ConfigurationError
from raytier.hardware import inventory as module
from raytier.hardware.inventory import GPU, Disk, NodeInventory, take_inventory

MIB = 2**20
TOTAL, AVAILABLE = 16000 * MIB, 12000 * MIB


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 16000 MB without cgroups and GPUs."""
    write(
        tmp_path, "proc/meminfo", f"MemTotal: {TOTAL // 1024} kB\nMemFree: 1 kB\nMemAvailable: {AVAILABLE // 1024} kB\n"
    )
    write(tmp_path, "proc/self/mounts", "root / ext4 rw 0 0\nfast /fast xfs rw 0 0\n")
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def v2_group(root: Path, name: str, limit: str, current: int = 0, cache: int = 0) -> None:
    base = f"sys/fs/cgroup/{name}"
    write(root, f"{base}/memory.max", limit)
    write(root, f"{base}/memory.current", str(current))
    write(root, f"{base}/memory.stat", f"anon 1\nactive_file {cache // 2}\ninactive_file {cache // 2}\nshmem 7\n")


def test_without_cgroups(root: Path) -> None:
    found = take_inventory(root=str(root))
    assert (found.ram_total, found.ram_available, found.cgroup_limit) == (TOTAL, AVAILABLE, None)
    assert found.memory_limit == TOTAL
    assert found.cpus >= 1
    assert found.gpus == ()


def test_v2_smallest_ancestor_limit_binds_and_page_cache_is_reclaimable(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/outer/inner/leaf\n")
    write(root, "sys/fs/cgroup/cgroup.controllers", "memory")
    v2_group(root, "outer", str(8000 * MIB), current=7000 * MIB, cache=4000 * MIB)
    v2_group(root, "outer/inner", str(4000 * MIB), current=1500 * MIB, cache=1000 * MIB)
    v2_group(root, "outer/inner/leaf", "max")
    found = take_inventory(root=str(root))
    assert found.cgroup_limit == 4000 * MIB == found.memory_limit
    assert found.ram_available == 3500 * MIB


def test_v2_a_parent_with_less_room_left_bounds_what_is_available(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/outer/leaf\n")
    write(root, "sys/fs/cgroup/cgroup.controllers", "memory")
    v2_group(root, "outer", str(8000 * MIB), current=7000 * MIB)
    v2_group(root, "outer/leaf", str(4000 * MIB), current=1500 * MIB)
    found = take_inventory(root=str(root))
    assert found.cgroup_limit == 4000 * MIB
    assert found.ram_available == 1000 * MIB


def test_v2_memory_high_counts_as_a_limit(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/leaf\n")
    write(root, "sys/fs/cgroup/cgroup.controllers", "memory")
    v2_group(root, "leaf", str(4000 * MIB), current=500 * MIB)
    write(root, "sys/fs/cgroup/leaf/memory.high", str(3000 * MIB))
    assert take_inventory(root=str(root)).cgroup_limit == 3000 * MIB


def test_v2_a_limit_above_the_machine_is_none(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/leaf\n")
    write(root, "sys/fs/cgroup/cgroup.controllers", "memory")
    v2_group(root, "leaf", str(TOTAL * 2), current=TOTAL)
    found = take_inventory(root=str(root))
    assert (found.cgroup_limit, found.ram_available) == (None, AVAILABLE)


@pytest.mark.parametrize("path", ["/job/task", "/not/visible/in/this/container"])
def test_v1_limits_in_hybrid_mounts(root: Path, path: str) -> None:
    write(root, "proc/self/cgroup", f"9:name=systemd:/\n4:memory:{path}\n3:cpu,cpuacct:/\n0::/\n")
    mount = "sys/fs/cgroup/memory"
    for name in ("", "/job", "/job/task"):
        limit = 5000 * MIB if name == "" else 2**63 - 4096
        write(root, f"{mount}{name}/memory.limit_in_bytes", f"{limit}\n")
        write(root, f"{mount}{name}/memory.usage_in_bytes", f"{3000 * MIB}\n")
        write(root, f"{mount}{name}/memory.stat", f"cache 5\ntotal_active_file {800 * MIB}\ntotal_inactive_file 0\n")
    found = take_inventory(root=str(root))
    assert found.cgroup_limit == 5000 * MIB
    assert found.ram_available == 2800 * MIB


def test_disks_name_their_filesystem(root: Path, tmp_path: Path) -> None:
    (disk,) = take_inventory([str(tmp_path)], root=str(root)).disks
    assert disk.path == str(tmp_path)
    assert disk.filesystem == "ext4"
    assert 0 < disk.free_bytes <= disk.total_bytes


SMI = """0, GPU-aaaa, NVIDIA A100, 81920, 80000, 8.0
1, GPU-bbbb, NVIDIA H200, 143771, 143000, 9.0
2, GPU-cccc, NVIDIA H200, [N/A], [N/A], 9.0
"""


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["NVIDIA A100", "NVIDIA H200"]),
        ("", []),
        ("-1", []),
        ("1,0", ["NVIDIA H200", "NVIDIA A100"]),
        ("GPU-bb", ["NVIDIA H200"]),
        ("0,7,1", ["NVIDIA A100"]),  # as CUDA does: everything after an unknown device is invisible
    ],
)
def test_gpus_as_cuda_numbers_them(visible: str | None, expected: list[str]) -> None:
    gpus = module._parse_smi(SMI, visible)
    assert [gpu.name for gpu in gpus] == expected
    assert [gpu.index for gpu in gpus] == list(range(len(expected)))
    for gpu in gpus:
        assert gpu.free_bytes <= gpu.total_bytes


def test_a_broken_nvidia_smi_means_no_gpus(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    binary = tmp_path / "nvidia-smi"
    binary.write_text("#!/bin/sh\nexit 9\n")
    binary.chmod(0o755)
    monkeypatch.setattr(module.shutil, "which", lambda name: str(binary))
    assert take_inventory(root=str(root)).gpus == ()


def test_json_round_trip() -> None:
    node = NodeInventory(
        "n", 4, TOTAL, AVAILABLE, 9, 3, (Disk("/d", "xfs", 1, 2),), (GPU(0, "A100", 4, 3, "8.0"), GPU(1, "B", 2, 1))
    )
    assert NodeInventory.from_json(node.to_json()) == node


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ('{"hostname": "n", "cpus": 1, "ram_total": 5}', "inventory.ram_available: required"),
        ('{"hostname": "n", "cpus": 0, "ram_total": 5, "ram_available": 1}', "inventory.cpus"),
        ('{"hostname": "n", "cpus": 1, "ram_total": "x", "ram_available": 1}', "inventory.ram_total"),
        ('{"hostname": "n", "cpus": 1, "ram_total": 5, "ram_available": 1, "ram": 1}', "inventory.ram: unknown field"),
        (
            '{"hostname": "n", "cpus": 1, "ram_total": 5, "ram_available": 1, "gpus": [{"index": 0, "name": "A", '
            '"total_bytes": 4}]}',
            "inventory.gpus.0.free_bytes",
        ),
        ("[1]", "inventory"),
        ("{", "inventory is not JSON"),
    ],
)
def test_a_bad_field_is_named(text: str, field: str) -> None:
    with pytest.raises(ConfigurationError, match=field):
        NodeInventory.from_json(text)


# --- what decides how fast a node is ---------------------------------------------------------------------------------


def test_instruction_sets_and_huge_pages(root: Path) -> None:
    found = take_inventory(root=str(root))
    assert (found.instruction_sets, found.huge_pages) == ((), "")
    write(root, "proc/cpuinfo", "processor : 0\nflags : fpu sse avx2 avx512f amx_bf16\nprocessor : 1\nflags : fpu\n")
    write(root, "sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
    found = take_inventory(root=str(root))
    assert found.instruction_sets == ("avx2", "avx512f", "amx_bf16")
    assert found.huge_pages == "madvise"
    write(root, "proc/cpuinfo", "Features : fp asimd i8mm sve\n")
    assert take_inventory(root=str(root)).instruction_sets == ("asimd", "i8mm", "sve")


@pytest.mark.parametrize(
    ("environment", "threshold"),
    [
        ({}, 0.95),
        ({"RAY_memory_usage_threshold": "0.8"}, 0.8),
        ({"RAY_memory_usage_threshold": "lots"}, 0.95),
        ({"RAY_memory_usage_threshold": "80"}, 0.95),
        ({"RAY_memory_usage_threshold": "0.8", "RAY_memory_monitor_refresh_ms": "0"}, 1.0),
    ],
)
def test_rays_memory_monitor(
    root: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], threshold: float
) -> None:
    for name in ("RAY_memory_usage_threshold", "RAY_memory_monitor_refresh_ms"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert take_inventory(root=str(root)).memory_threshold == threshold


def test_a_path_that_will_be_made_is_reported_with_the_disk_it_will_lie_on(tmp_path: Path) -> None:
    future = str(tmp_path / "not" / "yet")
    found = take_inventory([future, str(tmp_path), future])
    assert [disk.path for disk in found.disks] == [future, str(tmp_path)]
    first, second = found.disks
    assert (first.filesystem, first.device) == (second.filesystem, second.device)
    assert found.disk(future) == first
    assert found.disk("/other") is None


def test_direct_io_is_tried_on_directories_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    paths = [str(tmp_path), str(tmp_path / "file")]
    tried: list[int] = []
    answer = 0
    real = os.open

    def opener(path: Any, flags: int, *rest: int) -> int:
        if not flags & os.O_DIRECT:
            return real(path, flags, *rest)
        tried.append(flags)
        if answer:
            raise OSError(answer, "no")
        return real("/dev/null", os.O_RDONLY)

    monkeypatch.setattr(module.os, "open", opener)
    assert [disk.direct_io for disk in take_inventory(paths).disks] == [True, True]
    assert [bool(flags & os.O_TMPFILE == os.O_TMPFILE) for flags in tried] == [True, False]
    answer = errno.EINVAL
    assert [disk.direct_io for disk in take_inventory(paths).disks] == [False, False]
    answer = errno.EACCES
    assert [disk.direct_io for disk in take_inventory(paths).disks] == [None, None]
    assert sorted(os.listdir(tmp_path)) == ["file"]
