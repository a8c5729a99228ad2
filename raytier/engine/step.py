"""The contract between the engine and what executes a step: one request, one answer per step.

Plain picklable data, no torch. A *step* is one scheduler iteration: one sweep over all layers that
carries every running sequence's next token and every prefill chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """How to draw one token. `temperature == 0` is greedy. `top_k == 0` means all.

    The draw depends only on (seed, sample, position): counter-based, so it is the same whatever
    else is in the batch and survives a restart.
    """

    temperature: float
    top_p: float
    top_k: int
    seed: int
    sample: int
    position: int


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """Consecutive new tokens of one sequence.

    Attributes:
        seq_id: engine-wide id of the sequence.
        token_ids: the tokens to run, at positions start .. start + len(token_ids) - 1.
        start: number of tokens whose KV is already in the blocks.
        block_table: physical block ids; covers at least start + len(token_ids) tokens.
        sample: how to draw the token after the last one, None for an unfinished prefill.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    sample: SampleSpec | None


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step. `step` counts up by one within an engine `epoch`."""

    model_id: str
    epoch: int
    step: int
    chunks: tuple[SequenceChunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(c.token_ids) for c in self.chunks)


@dataclass(slots=True)
class StepStats:
    """What one step cost. Bytes are exact counters, seconds are wall clock in the executing process.

    Attributes:
        bytes_streamed: parameter bytes this step consumed that came from ramdisk or disk.
        bytes_streamed_ramdisk: of these, what came from the ramdisk.
        bytes_read: bytes read from ramdisk and disk by this process since its last step (alignment included;
            prefetches for the next sweep count when they are read, and so do transfers).
        bytes_read_ramdisk: of these, what came from the ramdisk.
        reads, reads_ramdisk: read requests behind them.
        io_wait_s: time the compute thread waited for the ring.
        compute_s: step time without `io_wait_s`.
    """

    num_tokens: int = 0
    num_sequences: int = 0
    bytes_streamed: int = 0
    bytes_streamed_ramdisk: int = 0
    bytes_read: int = 0
    bytes_read_ramdisk: int = 0
    reads: int = 0
    reads_ramdisk: int = 0
    io_wait_s: float = 0.0
    compute_s: float = 0.0
    wall_s: float = 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What the model itself thought of a token: natural logarithms, before temperature and all else.

    Attributes:
        rank: 1 + how many tokens were more probable.
        top: (token id, logprob) of the likeliest ones, as many as the request asks for, lower ids first among equals.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...]


@dataclass(slots=True)
class StepResult:
    """`tokens[seq_id]` is the token drawn for each chunk that asked for one."""

    step: int
    tokens: dict[int, int] = field(default_factory=dict)
    stats: StepStats = field(default_factory=StepStats)


class StepExecutor(Protocol):
    """What an engine drives: a model runner in this process or a handle of a DeviceActor."""

    def step(self, batch: StepBatch) -> StepResult:
        """Run one step; raises `EngineDeadError` when the executor is gone."""
        ...
