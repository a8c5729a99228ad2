"""What an engine is told when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from raytier.config import Scheduler as SchedulerConfig


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits of an engine.

    Attributes:
        scheduler: the application's `scheduler` section.
        max_num_batched_tokens, max_mixed_tokens: tokens that a step carries at most, as planned (`DevicePlan`).
        max_context: longest sequence in tokens, prompt included.
        vocab_size: of the model; prompts with other ids are refused before they reach the executor.
        epoch: which life of the engine this is; carried by every step and report.
    """

    scheduler: SchedulerConfig
    max_num_batched_tokens: int
    max_mixed_tokens: int
    max_context: int
    vocab_size: int
    epoch: int = 0
