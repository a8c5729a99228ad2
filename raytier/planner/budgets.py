"""How many bytes each tier of a node may hold (spec A4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raytier.config import MIB, AppConfig
from raytier.errors import ResourceNotAvailableError
from raytier.hardware.inventory import NodeInventory

DeviceKind = Literal["cpu", "cuda"]

GIB = 2**30
#: A disk tier without a cap: parameters are read in place, so it needs no free space.
UNLIMITED = 2**62

#: Share of the memory limit that stays unused: Ray's memory monitor kills workers above 0.95, shared memory counted.
MEMORY_HEADROOM = 0.07
#: The compute process before it holds any weights: torch, transformers, Ray worker, thread stacks.
COMPUTE_PROCESS_BYTES = 700 * MIB
#: The replica, the other actors and Ray's own daemons together.
OTHER_PROCESSES_BYTES = 600 * MIB
#: CUDA context, library handles and workspaces, which no allocator statistic shows.
CUDA_CONTEXT_BYTES = 512 * MIB


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes per tier of one node and one device; `explanation` says how they came about.

    `device_capacity` is what the device budget could be without `tiers.device.max_mb`.
    """

    device_bytes: int
    host_bytes: int
    nvme_bytes: int
    device_capacity: int
    explanation: tuple[str, ...] = ()


def resolve_kind(inventory: NodeInventory, config: AppConfig) -> DeviceKind:
    """The device that `compute.device` means on this node.

    Raises:
        ResourceNotAvailableError: a GPU is asked for and there is none.
    """
    wish = config.compute.device
    if wish == "cuda" and not inventory.gpus:
        raise ResourceNotAvailableError(
            f"compute.device is cuda, but node {inventory.hostname} shows no GPU (nvidia-smi, CUDA_VISIBLE_DEVICES): "
            "set compute.device to auto or cpu"
        )
    if wish == "auto":
        return "cuda" if inventory.gpus else "cpu"
    return wish


def node_budgets(inventory: NodeInventory, config: AppConfig, kind: DeviceKind, *, device_index: int = 0) -> Budgets:
    """Budgets of one node for one model.

    RAM that may be planned = available - 7 % of the memory limit - footprint of the processes. On a CPU node device
    and host share it: the device takes its part first and the host pool gets what its own limits leave of the rest.

    Raises:
        ResourceNotAvailableError: `device_index` names no GPU of the node.
    """
    tiers = config.tiers
    headroom = int(MEMORY_HEADROOM * inventory.memory_limit)
    footprint = COMPUTE_PROCESS_BYTES + OTHER_PROCESSES_BYTES
    ram = max(0, inventory.ram_available - headroom - footprint)
    lines = [
        f"RAM: {_mb(inventory.ram_available)} available of {_mb(inventory.memory_limit)}"
        f"{' (cgroup limit)' if inventory.cgroup_limit is not None else ''}"
        f" - {_mb(headroom)} kept free - {_mb(footprint)} for processes = {_mb(ram)}"
    ]

    if kind == "cuda":
        if not 0 <= device_index < len(inventory.gpus):
            raise ResourceNotAvailableError(f"GPU {device_index} was asked for, the node has {len(inventory.gpus)}")
        gpu = inventory.gpus[device_index]
        memory = max(0, gpu.free_bytes - CUDA_CONTEXT_BYTES)
        lines.append(
            f"GPU {device_index}: {_mb(gpu.free_bytes)} free of {_mb(gpu.total_bytes)} - {_mb(CUDA_CONTEXT_BYTES)} "
            f"for the CUDA context = {_mb(memory)}"
        )
    else:
        memory = ram
    capacity = max(0, int(memory * tiers.device.max_utilization - tiers.device.reserved_mb * MIB))
    device = _capped(capacity, tiers.device.max_mb)
    lines.append(
        f"device: {tiers.device.max_utilization:.0%} of {_mb(memory)} - {tiers.device.reserved_mb:g} MB reserved"
        f"{_cap_text(tiers.device.max_mb)} = {_mb(device)}"
    )

    shared = device if kind == "cpu" else 0
    host = max(0, int(ram * tiers.host.max_utilization - tiers.host.reserved_mb * MIB) - shared)
    host = _capped(host, tiers.host.max_mb)
    lines.append(
        f"host: {tiers.host.max_utilization:.0%} of {_mb(ram)} - {tiers.host.reserved_mb:g} MB reserved"
        f"{f' - {_mb(shared)} of the device' if shared else ''}{_cap_text(tiers.host.max_mb)} = {_mb(host)}"
    )

    if not tiers.nvme.enabled:
        nvme = 0
        lines.append("nvme: disabled")
    elif tiers.nvme.max_gb is None:
        nvme = UNLIMITED
        lines.append("nvme: no cap (the checkpoint is read in place)")
    else:
        nvme = int(tiers.nvme.max_gb * GIB)
        lines.append(f"nvme: at most {tiers.nvme.max_gb:g} GB")
    return Budgets(device, host, nvme, capacity, tuple(lines))


def _capped(nbytes: int, max_mb: float | None) -> int:
    return nbytes if max_mb is None else min(nbytes, int(max_mb * MIB))


def _cap_text(max_mb: float | None) -> str:
    return "" if max_mb is None else f", at most {max_mb:g} MB"


def _mb(nbytes: int) -> str:
    return f"{nbytes / MIB:.0f} MB"
