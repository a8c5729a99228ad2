"""How much KV lies below the device: in the host's memory and on disk. Pure."""

from __future__ import annotations

from collections import Counter

from raytier.checkpoint.manifest import ModelManifest
from raytier.config import MIB, AppConfig
from raytier.hardware.inventory import NodeInventory
from raytier.planner.budgets import GIB, UNLIMITED, Budgets, DeviceKind, kv_directories, unknown_path
from raytier.planner.plan import KVBelow
from raytier.planner.sizing import ALIGNMENT_SLACK, KV_CHUNK_BYTES, KV_CHUNKS

#: The host's part is at most so many times the device's KV, where the configuration does not say more,
_TIMES_DEVICE = 4
#: and at most this share of what weights leave of the pool.
_SHARE = 0.5
#: What goes to disk goes through the host: it has at least so many bytes, and so many blocks, for that.
_GATEWAY_BYTES, _GATEWAY_BLOCKS = 16 * MIB, 16


def gateway_bytes(manifest: ModelManifest, config: AppConfig) -> int:
    """Host memory through which KV goes to the disk, at the least; 0 where none goes there."""
    return max(_GATEWAY_BYTES, _GATEWAY_BLOCKS * _slot_bytes(manifest, config)) if kv_directories(config) else 0


def staging_bytes(manifest: ModelManifest, config: AppConfig) -> int:
    """Memory into which blocks are read from disk; 0 where none are."""
    return KV_CHUNKS * max(KV_CHUNK_BYTES, _slot_bytes(manifest, config)) if kv_directories(config) else 0


def plan_kv_below(
    manifest: ModelManifest,
    inventory: NodeInventory,
    config: AppConfig,
    kind: DeviceKind,
    budgets: Budgets,
    *,
    kv_bytes: int,
    host_weights: int,
    disk_weights: int,
) -> tuple[KVBelow, tuple[str, ...]]:
    """What there is for KV beside the weights of each tier, and what the user should know.

    Raises:
        ResourceNotAvailableError: the inventory knows nothing of a directory.
    """
    kv, warnings = config.kv, []
    if not kv.swapping or not kv.prefix_caching:
        return KVBelow(), ()
    disk = _disk_bytes(inventory, config, budgets, disk_weights)
    if disk < int(kv.disk_gb * GIB) and kv_directories(config):
        warnings.append(f"kv.disk_gb is {kv.disk_gb:g}, and there is room for {disk / GIB:.2f} GB")
    # On a CPU both are part of what is set aside for activations.
    staging = staging_bytes(manifest, config) if kind == "cuda" else 0
    room = max(0, budgets.host_bytes - host_weights - ALIGNMENT_SLACK * len(manifest.parameters) - staging)
    wanted = min(_TIMES_DEVICE * kv_bytes, int(_SHARE * room)) if kv.host_mb == "auto" else int(kv.host_mb * MIB)
    host = min(wanted, room)
    if host < wanted:
        warnings.append(
            f"kv.host_mb is {kv.host_mb}, and the host pool has room for {host / MIB:.0f} MB beside weights"
        )
    gateway = gateway_bytes(manifest, config) if disk else 0
    if host >= gateway:
        return KVBelow(host, disk), tuple(warnings)
    if kind == "cpu":
        return KVBelow(gateway, disk, private=True), tuple(warnings)
    if room >= gateway:
        return KVBelow(gateway, disk), tuple(warnings)
    warnings.append(f"no KV goes to disk: the host pool has no {gateway / MIB:.0f} MB for what is on its way there")
    return KVBelow(host), tuple(warnings)


def _disk_bytes(inventory: NodeInventory, config: AppConfig, budgets: Budgets, weights: int) -> int:
    directories, nvme = kv_directories(config), config.tiers.nvme
    if not directories:
        return 0
    disks = []
    for path in directories:
        disk = inventory.disk(path)
        if disk is None:
            raise unknown_path("tiers.nvme.paths" if nvme.paths else "cache_dir", path, inventory)
        disks.append(disk)
    sharing = Counter(disk.device or disk.path for disk in disks)
    least = min((disk.free_bytes - int(nvme.min_free_gb * GIB)) // sharing[disk.device or disk.path] for disk in disks)
    room = max(0, least) * len(disks)
    if nvme.paths and budgets.nvme_bytes < UNLIMITED:
        room = min(room, max(0, budgets.nvme_bytes - weights))
    return min(room, int(config.kv.disk_gb * GIB))


def _slot_bytes(manifest: ModelManifest, config: AppConfig) -> int:
    """A block of every group, each rounded up to whole blocks of the disk."""
    sizes = (config.kv.block_size * manifest.kv_group_token_bytes(window) for window in manifest.kv_windows)
    return sum(-(-nbytes // 4096) * 4096 for nbytes in sizes)
