"""From a configuration to what the actors need, before any of them exists.

Describing a model imports torch and transformers: run it in a process that ends soon (Serve's builder task, a
Ray task), never in one that serves.
"""

from __future__ import annotations

import ray

from raytier.checkpoint.manifest import ModelDescription
from raytier.config import AppConfig
from raytier.hardware.inventory import take_inventory
from raytier.hardware.rates import RateKey, default_rates, load_rates
from raytier.planner.budgets import resolve_kind
from raytier.planner.placement import plan_weights
from raytier.planner.plan import ResourcePlan
from raytier.planner.resources import check_cluster, plan_resources


def prepare(config: AppConfig) -> tuple[ModelDescription, ResourcePlan]:
    """Describe the model, check that it can be planned on this node and that the cluster has the bundles.

    The actors plan again with what their node then has; what cannot work is refused here, within seconds.

    Raises:
        CheckpointError, UnsupportedModelError, BudgetError, ResourceNotAvailableError.
    """
    from raytier.checkpoint.describe import describe_model

    description = describe_model(config.model.directory())
    manifest = description.manifest
    inventory = take_inventory([manifest.model_dir])
    kind = resolve_kind(inventory, config)
    largest = max(manifest.files, key=lambda file: file.size).path
    threads = config.compute.resolve_threads(inventory.cpus)
    cached = load_rates(config.cache_dir, RateKey(largest, manifest.compute_dtype, kind, threads))
    plan = plan_weights(
        manifest,
        inventory,
        cached or default_rates(kind),
        description.configure(config),
        kind=kind,
    )
    resources = plan_resources(plan, inventory)
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    check_cluster(resources, [node["Resources"] for node in nodes if node["Alive"]])
    return description, resources
