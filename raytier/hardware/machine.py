"""A machine described in a file: what it has and how fast it is (`raytier plan --machine FILE`)."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from pydantic import ConfigDict

from raytier.hardware.inventory import NodeInventory, parse_json, validate
from raytier.hardware.rates import Rates, default_rates


@dataclass(frozen=True, slots=True)
class Machine:
    """Inventory and rates of a node. `rates` may be None in a file: assumed ones are used then."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    inventory: NodeInventory
    rates: Rates | None = None

    def rates_for(self, kind: str) -> Rates:
        """The file's rates, or conservative ones for a device of `kind` ("cpu" or "cuda")."""
        return default_rates(kind) if self.rates is None else self.rates

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Machine:
        """Raises ConfigurationError that names the bad field, for instance `machine.inventory.cpus`."""
        return validate(cls, parse_json(text, "machine"), "machine")
