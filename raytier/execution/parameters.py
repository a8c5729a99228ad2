"""What is told about a parameter of a loaded model. No torch: those who ask do not compute."""

from __future__ import annotations

from dataclasses import dataclass

from raytier.planner.plan import Tier


@dataclass(frozen=True, slots=True)
class ParameterStatus:
    """One parameter now. Sizes in bytes: as stored, and as held where it is.

    Attributes:
        precision: the form in which it is held there, `source`: as in the checkpoint; codec: of its file.
        fixed: why it cannot move; None when it can.
        access_count: steps that have used it since the model was loaded; last_access: Unix time of the last, 0 never.
    """

    name: str
    layer: int | None
    tier: Tier
    nbytes: int
    current_nbytes: int
    fixed: str | None
    access_count: int
    last_access: float
    precision: str = "source"
    codec: str = "none"
