"""One question to the planner: this model on this node under this configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from raytier.checkpoint.manifest import ModelManifest
from raytier.config import AppConfig
from raytier.hardware.inventory import NodeInventory
from raytier.hardware.rates import Rates
from raytier.planner.budgets import Budgets, DeviceKind
from raytier.planner.cost import Sweep, SweepModel, predict_step
from raytier.planner.plan import Prediction, TierSchemes
from raytier.planner.sizing import KVDemand, resident_nbytes
from raytier.planner.solver import Capacity, Solution


@dataclass(frozen=True)
class Case:
    """Everything that placement, warnings and refusals are derived from. Sizes in bytes.

    Attributes:
        step_tokens: tokens that a step carries at most (`DevicePlan.max_num_batched_tokens`).
        mixed_tokens: of a step with decodes among them (`DevicePlan.max_mixed_tokens`).
        activation_bytes: what such a step takes beside weights, KV and ring, and what the reading threads decode with.
        resident: parameters that only the device can hold -> why.
        schemes: what each tier makes of a parameter.
        sweeps: describes what a sweep does; of this model, kind of device and schemes.
    """

    manifest: ModelManifest
    inventory: NodeInventory
    rates: Rates
    config: AppConfig
    kind: DeviceKind
    budgets: Budgets
    demand: KVDemand
    step_tokens: int
    mixed_tokens: int
    activation_bytes: int
    resident: Mapping[str, str]
    schemes: TierSchemes
    sweeps: SweepModel

    @property
    def capacity(self) -> Capacity:
        budgets = self.budgets
        return Capacity(budgets.device_bytes, budgets.host_bytes, budgets.nvme_bytes, budgets.ramdisk_bytes)

    def sweep(self, solution: Solution) -> Sweep:
        """What a sweep does under `solution`."""
        return self.sweeps.describe(solution.tiers, solution.ring)

    def step(self, solution: Solution, batch: int = 1) -> Prediction:
        """The predicted decode step under `solution`, at the expected context."""
        return predict_step(self.sweep(solution), self.rates, batch, self.demand.context)

    @cached_property
    def weight_bytes(self) -> int:
        """All weights, if all were resident."""
        return sum(resident_nbytes(p, self.manifest, self.schemes) for p in self.manifest.parameters)

    @property
    def resident_bytes(self) -> int:
        """Weights that cannot leave the device."""
        parameters = (self.manifest.by_name[name] for name in self.resident)
        return sum(resident_nbytes(p, self.manifest, self.schemes) for p in parameters)

    @property
    def cast_bytes(self) -> int:
        """Resident bytes of the weights that are on the device only because they are cast when loaded."""
        parameters = (self.manifest.by_name[name] for name in self.resident)
        return sum(
            resident_nbytes(p, self.manifest, self.schemes)
            for p in parameters
            if len(p.shape) > 1 and p.dtype != self.manifest.computed_dtype(p)
        )

    @property
    def floor_kv_bytes(self) -> int:
        return self.demand.floor * self.demand.block_bytes

    @property
    def expected_kv_bytes(self) -> int:
        return self.demand.expected * self.demand.block_bytes
