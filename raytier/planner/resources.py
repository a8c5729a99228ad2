"""Node budgets as placement-group bundles, and whether a cluster can hold them (spec C6). Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raytier.errors import ResourceNotAvailableError
from raytier.hardware.inventory import NodeInventory
from raytier.planner.budgets import DeviceKind
from raytier.planner.plan import ResourcePlan, WeightPlan

#: Shares of a CPU: Ray only counts them; the compute process sets its own thread count.
SMALL_SHARE = 0.1
DEVICE_SHARE = 0.5
_TOLERANCE = 1e-6


def plan_resources(plan: WeightPlan, inventory: NodeInventory) -> ResourcePlan:
    """Bundles of an application whose only model is planned; raises as `node_resources`."""
    device = plan.devices[0]
    return node_resources(inventory, "cuda" if device.kind == "cuda" else "cpu", plan.host_bytes, device.index)


def node_resources(inventory: NodeInventory, kind: DeviceKind, host_bytes: int, device_index: int = 0) -> ResourcePlan:
    """Bundles of one application: the replica first, then device, host pool, disk tier and KV actor, on one node.

    Args:
        host_bytes: memory that the host pool asks Ray for.

    Raises:
        ResourceNotAvailableError: the plan is for a GPU that the inventory lacks.
    """
    if kind == "cuda" and device_index >= len(inventory.gpus):
        raise ResourceNotAvailableError(
            f"the plan uses GPU {device_index}, node {inventory.hostname} has {len(inventory.gpus)}"
        )
    compute = {"CPU": DEVICE_SHARE} | ({"GPU": 1.0} if kind == "cuda" else {})
    host = {"CPU": SMALL_SHARE} | ({"memory": float(host_bytes)} if host_bytes else {})
    return ResourcePlan(
        roles=("replica", "device", "host", "disk", "kv"),
        bundles=({"CPU": SMALL_SHARE}, compute, host, {"CPU": SMALL_SHARE}, {"CPU": SMALL_SHARE}),
    )


def check_cluster(resource_plan: ResourcePlan, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuse at once what would otherwise wait for ever: one node must hold all bundles (STRICT_PACK).

    Args:
        nodes: available resources of every living node, as Ray counts them.

    Raises:
        ResourceNotAvailableError: names the first bundle that fits nowhere, what it needs and what is left.
    """
    if not nodes:
        raise ResourceNotAvailableError("the cluster has no living node: start one with `ray start --head`")
    best_placed, best_message = -1, ""
    for number, node in enumerate(nodes):
        left, placed, message = dict(node), 0, ""
        for role, bundle in zip(resource_plan.roles, resource_plan.bundles, strict=True):
            short = next((r for r, q in bundle.items() if left.get(r, 0.0) + _TOLERANCE < q), None)
            if short is not None:
                message = (
                    f"bundle {placed} ({role}) needs {bundle[short]:g} {short}, and node {number + 1} of {len(nodes)} "
                    f"has {left.get(short, 0.0):g} left of {node.get(short, 0.0):g}"
                )
                break
            for resource, quantity in bundle.items():
                left[resource] = left.get(resource, 0.0) - quantity
            placed += 1
        if placed == len(resource_plan.bundles):
            return
        if placed > best_placed:
            best_placed, best_message = placed, message
    total: dict[str, float] = {}
    for bundle in resource_plan.bundles:
        for resource, quantity in bundle.items():
            total[resource] = total.get(resource, 0.0) + quantity
    needed = ", ".join(f"{quantity:g} {resource}" for resource, quantity in total.items())
    raise ResourceNotAvailableError(
        f"no node of the cluster can hold the application: {best_message}. All bundles go to one node and need "
        f"{needed} free there: stop other work or add a larger node."
    )
