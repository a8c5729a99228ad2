"""The actors of a node as models see them: handles, measured rates, and what is left for one more model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from raytier.actors.device import DeviceStatus
from raytier.actors.disk import DiskStatus
from raytier.actors.executor import answer_of
from raytier.actors.host import HostStatus
from raytier.checkpoint.manifest import ModelDescription, ModelManifest
from raytier.config import AppConfig
from raytier.hardware.inventory import take_inventory
from raytier.hardware.rates import Rates
from raytier.planner.budgets import (
    Budgets,
    DeviceKind,
    Held,
    disk_directories,
    left_of,
    node_budgets,
    planned_paths,
    ramdisk_directory,
)
from raytier.planner.placement import plan_weights
from raytier.planner.plan import Tier, WeightPlan
from raytier.tiers.aligned import ALIGNMENT

CALL_TIMEOUT_S = 120.0


class NodeActors:
    """Handles of the actors of a node; without one of the ramdisk where there is none.

    Attributes:
        kind: what the device is.
        config: of the application.
        budgets: of the node, for all models together; host memory is what the host pool was made with.
    """

    def __init__(self, kind: DeviceKind, config: AppConfig, budgets: Budgets, handles: Mapping[str, Any]) -> None:
        self.kind = kind
        self.config = config
        self.budgets = budgets
        self.device, self.host, self.disk, self.kv = (handles[role] for role in ("device", "host", "disk", "kv"))
        self.ramdisk = handles.get("ramdisk")
        self._rates: dict[str, Rates] = {}

    def rates(self, manifest: ModelManifest) -> Rates:
        """Rates for a model: measured once in the life of these actors, if they are not in the cache."""
        if (known := self._rates.get(manifest.compute_dtype)) is not None:
            return known
        config = self.config
        largest = max(manifest.files, key=lambda file: file.size).path
        asked = self.device.rates.remote(
            largest, manifest.compute_dtype, config.cache_dir, disk_directories(config), ramdisk_directory(config)
        )
        rates: Rates = answer_of(asked, CALL_TIMEOUT_S)
        self.disk.calibrate.remote(rates.disk_read_bytes_per_s)
        if self.ramdisk is not None and rates.ramdisk_read_bytes_per_s is not None:
            self.ramdisk.calibrate.remote(rates.ramdisk_read_bytes_per_s)
        self._rates[manifest.compute_dtype] = rates
        return rates

    def plan(self, model_id: str, description: ModelDescription, without: Collection[str] = ()) -> WeightPlan:
        """Plan a model with what the node has left beside the others.

        Args:
            without: models that will be asleep by then.

        Raises:
            BudgetError: there is too little.
        """
        rates = self.rates(description.manifest)
        config, manifest = description.configure(self.config), description.manifest
        inventory = take_inventory(planned_paths(config, manifest.model_dir))
        held, empty = self._held({model_id, *without})
        if empty:
            # Nothing of what is available is a model's: a good moment to look at what the node has now.
            fresh = node_budgets(inventory, self.config, self.kind, started="all")
            self.budgets = replace(fresh, host_bytes=min(fresh.host_bytes, self.budgets.host_bytes))
        budgets = left_of(self.budgets, held)
        # In the host pool the range of every parameter is rounded up to whole blocks.
        host = max(0, budgets.host_bytes - ALIGNMENT * len(manifest.parameters))
        return plan_weights(
            manifest, inventory, rates, config, kind=self.kind, budgets=replace(budgets, host_bytes=host)
        )

    def _held(self, without: Collection[str]) -> tuple[Held, bool]:
        """What models other than `without` hold, and whether no model holds anything."""
        files = {Tier.NVME: self.disk} | ({Tier.RAMDISK: self.ramdisk} if self.ramdisk is not None else {})
        asked = [actor.status.remote() for actor in (self.device, self.host, *files.values())]
        device: DeviceStatus
        host: HostStatus
        stored: list[DiskStatus]
        device, host, *stored = answer_of(asked, CALL_TIMEOUT_S)
        others = {name: model for name, model in device.models.items() if name not in without}
        on_host = {name: nbytes - host.kept.get(name, 0) for name, nbytes in host.owners.items() if name not in without}
        in_files = {
            tier: sum(nbytes for name, nbytes in status.models.items() if name not in without)
            for tier, status in zip(files, stored, strict=True)
        }
        held = Held(
            device_bytes=sum(model.held_bytes for model in others.values()),
            host_bytes=sum(on_host.values()),
            ramdisk_bytes=in_files.get(Tier.RAMDISK, 0),
            nvme_bytes=in_files[Tier.NVME],
        )
        return held, not (device.models or host.owners or any(status.models for status in stored))
