"""What about a node keeps it from being as fast as it could be, and what to do about it. Pure."""

from __future__ import annotations

from raytier.hardware.inventory import MIB, Disk, NodeInventory
from raytier.hardware.machine import Machine

GIB = 2**30
#: Ray's own objects and a host pool want at least this much shared memory.
_LEAST_SHM = GIB
_LEAST_FREE = 10 * GIB
#: Filesystems that live in memory; they need neither O_DIRECT nor much room.
_MEMORY_FILESYSTEMS = ("tmpfs", "ramfs")


def warnings(machine: Machine) -> tuple[str, ...]:
    """What a user can act on, one sentence each."""
    inventory = machine.inventory
    found = [*_memory(inventory)]
    for disk in inventory.disks:
        if disk.filesystem not in _MEMORY_FILESYSTEMS:
            found += _disk(disk)
    if machine.rates is not None and machine.rates.busy:
        found.append(
            f"other work used {machine.rates.other_cores:.1f} cores while this was measured: the rates are too low; "
            "run `raytier doctor --measure` again when the machine is idle"
        )
    return tuple(found)


def _memory(inventory: NodeInventory) -> list[str]:
    found = []
    if inventory.cgroup_limit is not None:
        found.append(
            f"a cgroup limits memory to {inventory.cgroup_limit / GIB:.1f} of {inventory.ram_total / GIB:.1f} GB; "
            "plans stay below it: raise the container's limit to use more"
        )
    if inventory.shm_free < _LEAST_SHM:
        found.append(
            f"/dev/shm has {inventory.shm_free / MIB:.0f} MB free: Ray's object store and a ramdisk there need more; "
            "start the container with --shm-size=2g or more"
        )
    if inventory.huge_pages == "never":
        found.append(
            "transparent huge pages are off: reads into memory are slower, to a third was measured; "
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        )
    return found


def _disk(disk: Disk) -> list[str]:
    found = []
    if disk.direct_io is False:
        found.append(
            f"{disk.path} ({disk.filesystem}) does not support O_DIRECT: streaming goes through the page cache there, "
            "which is slower and takes memory; keep models on a local ext4 or xfs disk"
        )
    if disk.free_bytes < _LEAST_FREE:
        found.append(f"{disk.path} has {disk.free_bytes / GIB:.1f} GB free: free some, or name another directory")
    return found
