"""From a configuration to what the actors need, before any of them exists.

Describing a model imports torch and transformers: run it in a process that ends soon (Serve's builder task, a
Ray task), never in one that serves.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import ray
from ray._private.state import available_resources_per_node  # a DeveloperAPI; what is free has no other per-node view

from raytier.checkpoint.manifest import ModelDescription
from raytier.checkpoint.quantisation import quantised
from raytier.config import AppConfig
from raytier.errors import ResourceNotAvailableError
from raytier.hardware.inventory import NodeInventory, take_inventory
from raytier.hardware.rates import RateKey, default_rates, load_rates
from raytier.model_entry import ModelEntry
from raytier.planner.budgets import (
    DeviceKind,
    disk_directories,
    node_budgets,
    planned_paths,
    ramdisk_directory,
    resolve_kind,
)
from raytier.planner.placement import plan_weights
from raytier.planner.plan import ResourcePlan
from raytier.planner.resources import check_cluster, node_resources
from raytier.sources.loader import Loaders
from raytier.sources.registry import Registry

#: What was just given back shows as free a moment later.
_SETTLE_S = 3.0


def prepare(
    config: AppConfig, reclaimable: Mapping[str, Mapping[str, float]] | None = None
) -> tuple[ModelDescription | None, ResourcePlan]:
    """Describe the startup model, check that it can be planned on this node and that the cluster has the bundles free.

    The actors plan again with what their node then has; what cannot work is refused here, within seconds. Other models
    are planned when they are loaded, inside the node's budgets; of these it is checked that a loader takes them. A
    startup model whose files have to be fetched is planned when they are here.

    Args:
        reclaimable: node id -> resources that are in use now and will be free by the time the bundles are placed.

    Returns:
        The description of the startup model; None where there is none, or it has to be fetched.

    Raises:
        ConfigurationError, CheckpointError, UnsupportedModelError, BudgetError, ResourceNotAvailableError.
    """
    registry, loaders = Registry.of(config), Loaders(config)
    found = {entry.model_id: loaders.of(entry) for entry in registry.entries}
    # The only model is as good as named: what is wrong with it is better known now than when it is loaded.
    named = registry.startup or (registry.ids[0] if len(found) == 1 else None)
    directory = None if named is None else found[named].find(registry.get(named))
    entry = None if named is None else registry.get(named)
    if entry is not None:
        config = _as_wanted(config, entry)
    # Before torch is imported: this process ends soon, and what it takes until then is there for the actors.
    inventory = take_inventory(planned_paths(config, directory))
    kind = resolve_kind(inventory, config)
    if entry is None or directory is None:
        resources = node_resources(inventory, kind, _host_bytes(inventory, config, kind))
        _check_cluster(resources, reclaimable or {})
        return None, resources
    from raytier.checkpoint.describe import describe_entry

    description = describe_entry(entry, directory)
    manifest = description.manifest
    largest = max(manifest.files, key=lambda file: file.size).path
    threads = config.compute.resolve_threads(inventory.cpus)
    nvme_paths, ramdisk = disk_directories(config), ramdisk_directory(config)
    key = RateKey(largest, manifest.compute_dtype, kind, threads, nvme_paths, ramdisk)
    plan = plan_weights(
        manifest,
        inventory,
        load_rates(config.cache_dir, key) or default_rates(kind),
        description.configure(config),
        kind=kind,
        started="ray",
    )
    others = _host_bytes(inventory, config, kind) if len(found) > 1 else 0
    resources = node_resources(inventory, kind, max(plan.host_bytes, others), plan.devices[0].index)
    _check_cluster(resources, reclaimable or {})
    return description, resources


def _as_wanted(config: AppConfig, entry: ModelEntry) -> AppConfig:
    """The configuration for the startup model, which chooses the device where that is open."""
    if config.compute.device == "auto" and entry.device_preference != "auto":
        compute = config.compute.model_copy(update={"device": entry.device_preference})
        config = config.model_copy(update={"compute": compute})
    return quantised(config, entry.quantization_bits)


def _host_bytes(inventory: NodeInventory, config: AppConfig, kind: DeviceKind) -> int:
    """Memory of the host pool for models that are not planned yet: what the configuration names, else none, since by
    itself the pool would take nearly all that the node has."""
    if config.tiers.host.max_mb is None:
        return 0
    return node_budgets(inventory, config, kind, started="ray").host_bytes


def _check_cluster(resources: ResourcePlan, reclaimable: Mapping[str, Mapping[str, float]]) -> None:
    nodes = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]
    check_cluster(resources, list(nodes.values()))  # what no node has at all will not become free
    deadline = time.monotonic() + _SETTLE_S
    while True:
        free = available_resources_per_node()  # type: ignore[no-untyped-call]
        try:
            check_cluster(resources, [_sum(free.get(node, {}), reclaimable.get(node, {})) for node in nodes])
            return
        except ResourceNotAvailableError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


def _sum(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in one.keys() | other.keys()}
