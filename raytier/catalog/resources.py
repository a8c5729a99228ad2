"""What an entry asks for is looked at before anything of its model is fetched or read (spec E5)."""

from __future__ import annotations

from raytier.config import MIB
from raytier.errors import ResourceNotAvailableError, UnsupportedModelError
from raytier.hardware.inventory import NodeInventory, take_inventory
from raytier.model_entry import ModelEntry
from raytier.planner.budgets import DeviceKind


def check_resources(entry: ModelEntry, kind: DeviceKind, inventory: NodeInventory | None = None) -> None:
    """Refuse a model that this application cannot run, whatever its files are.

    Args:
        kind: what the application computes on.
        inventory: of the node; None = as it is now.

    Raises:
        ResourceNotAvailableError: it wants another device, or more memory than there is; says how much is missing.
        UnsupportedModelError: it wants what cannot be done.
    """
    name = entry.model_id
    if entry.quantization_bits is not None and kind == "cuda":
        raise UnsupportedModelError(
            f"{name}: quantization_bits: {entry.quantization_bits}: quantised weights are computed on by CPUs only in "
            "this version; set quantization_bits to null, or compute.device to cpu"
        )
    if entry.device_preference not in ("auto", kind):
        raise ResourceNotAvailableError(
            f"{name}: device_preference: {entry.device_preference} is wanted, and this application computes on {kind}: "
            "set device_preference to auto, or compute.device in the application's configuration"
        )
    if entry.required_gpu_memory_mb is None and entry.required_ram_mb is None:
        return
    inventory = take_inventory() if inventory is None else inventory
    needs = [("required_ram_mb", entry.required_ram_mb, inventory.ram_available, "of RAM")]
    if kind == "cuda":
        free = inventory.gpus[0].free_bytes if inventory.gpus else 0
        needs.append(("required_gpu_memory_mb", entry.required_gpu_memory_mb, free, "of GPU memory"))
    for field, wanted, free, what in needs:
        if wanted is not None and wanted * MIB > free:
            raise ResourceNotAvailableError(
                f"{name}: {field}: {wanted:g} MB {what} are wanted, {free / MIB:.0f} MB are free: "
                f"{wanted - free / MIB:.0f} MB are missing; unload other models, or lower {field}"
            )
