"""How many bytes each tier of a node may hold (spec A4)."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

from raytier.config import MIB, AppConfig
from raytier.errors import ResourceNotAvailableError
from raytier.hardware.inventory import Disk, NodeInventory

DeviceKind = Literal["cpu", "cuda"]

#: Processes whose memory is no longer part of what is available: none, Ray's daemons, or the application's as well.
Started = Literal["nothing", "ray", "all"]

GIB = 2**30
#: A disk tier without a cap: parameters are read in place, so it needs no free space.
UNLIMITED = 2**62

#: Share of the memory limit that stays unused below the threshold at which Ray's memory monitor kills workers; it
#: counts shared memory as used.
MONITOR_MARGIN = 0.02
#: The least that stays unused, also where no monitor runs: the kernel kills as well.
LEAST_HEADROOM = 0.05
#: The compute process before it holds any weights: torch, transformers, Ray worker, thread stacks. Here and below, the
#: proportional set sizes measured with the demo model, rounded up.
COMPUTE_PROCESS_BYTES = 400 * MIB
#: The replica, and the actors that do not compute.
SERVING_PROCESSES_BYTES = 300 * MIB
#: `serve run` and its Ray: the daemons, the dashboard with its modules, Serve's controller and proxy.
RAY_PROCESSES_BYTES = 900 * MIB
#: What all of them still take once they have started: buffers of the kernels, of Ray and of the tokenizer.
GROWTH_BYTES = 200 * MIB
#: CUDA context, library handles and workspaces, which no allocator statistic shows.
CUDA_CONTEXT_BYTES = 512 * MIB

_DEFAULT_RAMDISK = "/dev/shm"


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes per tier of one node and one device; `explanation` says how they came about.

    `device_capacity` is what the device budget could be without `tiers.device.max_mb`; `device_held` is what other
    models hold of the device, beside these budgets.
    """

    device_bytes: int
    host_bytes: int
    nvme_bytes: int
    device_capacity: int
    explanation: tuple[str, ...] = ()
    ramdisk_bytes: int = 0
    device_held: int = 0


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes that models on a node hold of each tier; of nvme in its own directories, not in checkpoints."""

    device_bytes: int = 0
    host_bytes: int = 0
    ramdisk_bytes: int = 0
    nvme_bytes: int = 0


def left_of(budgets: Budgets, held: Held) -> Budgets:
    """What is left for one more model."""
    taken = {
        "device": held.device_bytes,
        "host": held.host_bytes,
        "ramdisk": held.ramdisk_bytes,
        "nvme": held.nvme_bytes,
    }
    lines = [f"{tier}: {_mb(nbytes)} of it are held by other models" for tier, nbytes in taken.items() if nbytes]
    return replace(
        budgets,
        device_bytes=max(0, budgets.device_bytes - held.device_bytes),
        host_bytes=max(0, budgets.host_bytes - held.host_bytes),
        ramdisk_bytes=max(0, budgets.ramdisk_bytes - held.ramdisk_bytes),
        nvme_bytes=max(0, budgets.nvme_bytes - held.nvme_bytes),
        device_held=budgets.device_held + held.device_bytes,
        explanation=(*budgets.explanation, *lines),
    )


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


def ramdisk_directory(config: AppConfig) -> str | None:
    """The directory of the ramdisk, None when it is not enabled."""
    ramdisk = config.tiers.ramdisk
    return (ramdisk.path or _DEFAULT_RAMDISK) if ramdisk.enabled else None


def store_directories(config: AppConfig) -> tuple[str, ...]:
    """Where the disk tier keeps what is not as in the checkpoint: its own directories, or one in the cache; none where
    it has nothing of the kind."""
    nvme = config.tiers.nvme
    if not nvme.enabled or not config.converts("nvme"):
        return ()
    return nvme.paths or (os.path.join(config.cache_dir, "store"),)


def disk_directories(config: AppConfig) -> tuple[str, ...]:
    """The directories that the disk tier writes to; none where it only reads the checkpoint."""
    nvme = config.tiers.nvme
    return (nvme.paths or store_directories(config)) if nvme.enabled else ()


def kv_directories(config: AppConfig) -> tuple[str, ...]:
    """Where KV goes on disk: the disk tier's own directories, or one in the cache; none where it does not go there."""
    nvme, kv = config.tiers.nvme, config.kv
    if not nvme.enabled or not kv.disk_gb or not kv.swapping or not kv.prefix_caching:
        return ()
    return tuple(os.path.join(path, "kv") for path in nvme.paths or (config.cache_dir,))


def planned_paths(config: AppConfig, model_dir: str | None = None) -> tuple[str, ...]:
    """The paths whose disks an inventory must hold for this configuration to be planned (`take_inventory`)."""
    ramdisk = ramdisk_directory(config)
    paths = (
        model_dir,
        *config.tiers.nvme.paths,
        *store_directories(config),
        *kv_directories(config),
        *(() if ramdisk is None else (ramdisk,)),
    )
    return tuple(dict.fromkeys(path for path in paths if path))


def footprint(started: Started) -> int:
    """Bytes that processes will still take, of which the first ones have `started`."""
    if started == "all":
        return GROWTH_BYTES
    ray = RAY_PROCESSES_BYTES if started == "nothing" else 0
    return ray + SERVING_PROCESSES_BYTES + COMPUTE_PROCESS_BYTES + GROWTH_BYTES


def node_budgets(
    inventory: NodeInventory,
    config: AppConfig,
    kind: DeviceKind,
    *,
    device_index: int = 0,
    started: Started = "nothing",
) -> Budgets:
    """Budgets of one node for one model.

    RAM that may be planned = available - what stays free below the memory monitor's threshold - footprint of the
    processes. Device (on a CPU node), ramdisk and host share it: the device takes its part first, and the host pool
    gets what its own limits leave of the rest. The ramdisk comes after the host pool, the faster tier; before it where
    a placement rule names it.

    Args:
        started: which processes have taken their memory out of what is available already.

    Raises:
        ResourceNotAvailableError: `device_index` names no GPU of the node, or the inventory lacks a path of the
            configuration.
    """
    tiers = config.tiers
    headroom = int(max(LEAST_HEADROOM, 1 - inventory.memory_threshold + MONITOR_MARGIN) * inventory.memory_limit)
    processes = footprint(started)
    ram = max(0, inventory.ram_available - headroom - processes)
    lines = [
        f"RAM: {_mb(inventory.ram_available)} available of {_mb(inventory.memory_limit)}"
        f"{' (cgroup limit)' if inventory.cgroup_limit is not None else ''}"
        f" - {_mb(headroom)} kept free - {_mb(processes)} for processes = {_mb(ram)}"
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
    by_rule = any(rule.tier == "ramdisk" for rule in config.placement.rules)
    ramdisk, ramdisk_line = _ramdisk_bytes(inventory, config, ram - shared) if by_rule else (0, "")
    host = max(0, int(ram * tiers.host.max_utilization - tiers.host.reserved_mb * MIB) - shared - ramdisk)
    host = _capped(host, tiers.host.max_mb)
    taken = [f" - {_mb(n)} of the {what}" for n, what in ((shared, "device"), (ramdisk, "ramdisk")) if n]
    lines.append(
        f"host: {tiers.host.max_utilization:.0%} of {_mb(ram)} - {tiers.host.reserved_mb:g} MB reserved"
        f"{''.join(taken)}{_cap_text(tiers.host.max_mb)} = {_mb(host)}"
    )
    if not by_rule:
        ramdisk, ramdisk_line = _ramdisk_bytes(inventory, config, ram - shared - host)
    if ramdisk_line:
        lines.append(ramdisk_line)

    nvme, nvme_line = _nvme_bytes(inventory, config)
    lines.append(nvme_line)
    return Budgets(device, host, nvme, capacity, tuple(lines), ramdisk)


def _ramdisk_bytes(inventory: NodeInventory, config: AppConfig, ram: int) -> tuple[int, str]:
    """Bytes of the ramdisk, of which `ram` bytes are left, and how they came about ("" when it is not enabled)."""
    directory, ramdisk = ramdisk_directory(config), config.tiers.ramdisk
    if directory is None:
        return 0, ""
    size = int(ramdisk.size_mb * ramdisk.usable_percent / 100 * MIB)
    text = f"ramdisk: {ramdisk.usable_percent:g}% of {ramdisk.size_mb:g} MB"
    if not ramdisk.mount:  # a tmpfs that is there already has its own size, and other users
        disk = inventory.disk(directory)
        if disk is None and directory != _DEFAULT_RAMDISK:
            raise unknown_path("tiers.ramdisk.path", directory, inventory)
        free = inventory.shm_free if disk is None else disk.free_bytes
        size = min(size, free)
        text += f", {_mb(free)} free in {directory}"
    nbytes = max(0, min(size, ram))
    return nbytes, f"{text}, {_mb(max(0, ram))} of RAM left = {_mb(nbytes)}"


def _nvme_bytes(inventory: NodeInventory, config: AppConfig) -> tuple[int, str]:
    """Bytes of the disk tier, and how they came about."""
    nvme = config.tiers.nvme
    cap = None if nvme.max_gb is None else int(nvme.max_gb * GIB)
    if not nvme.enabled:
        return 0, "nvme: disabled"
    directories = disk_directories(config)
    if not directories:
        if cap is None:
            return UNLIMITED, "nvme: no cap (the checkpoint is read in place)"
        return cap, f"nvme: at most {nvme.max_gb:g} GB"
    disks = []
    for path in directories:
        disk = inventory.disk(path)
        if disk is None:
            raise unknown_path("tiers.nvme.paths" if nvme.paths else "cache_dir", path, inventory)
        disks.append(disk)
    # Stripes are dealt out evenly, so the directory with the least room decides; directories on one disk share it.
    sharing = Counter(_device(disk) for disk in disks)
    least = min((disk.free_bytes - int(nvme.min_free_gb * GIB)) // sharing[_device(disk)] for disk in disks)
    nbytes = max(0, least) * len(disks)
    nbytes = nbytes if cap is None else min(nbytes, cap)
    return nbytes, (
        f"nvme: directories {len(disks)}, {_mb(max(0, least))} in each with {nvme.min_free_gb:g} GB left free"
        f"{'' if cap is None else f', at most {nvme.max_gb:g} GB'} = {_mb(nbytes)}"
    )


def _device(disk: Disk) -> str:
    return disk.device or disk.path


def unknown_path(field: str, path: str, inventory: NodeInventory) -> ResourceNotAvailableError:
    """That an inventory says nothing of a path of the configuration."""
    return ResourceNotAvailableError(
        f"{field}: nothing is known about {path} on {inventory.hostname}; for a described machine, add it to "
        "inventory.disks with its free_bytes"
    )


def _capped(nbytes: int, max_mb: float | None) -> int:
    return nbytes if max_mb is None else min(nbytes, int(max_mb * MIB))


def _cap_text(max_mb: float | None) -> str:
    return "" if max_mb is None else f", at most {max_mb:g} MB"


def _mb(nbytes: int) -> str:
    return f"{nbytes / MIB:.0f} MB"
