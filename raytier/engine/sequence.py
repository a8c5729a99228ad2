"""The state of one sequence: tokens, how many of them have KV, and the blocks that hold it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from raytier.engine.sampling_params import SamplingParams
from raytier.engine.step import SampleSpec


class Status(StrEnum):
    WAITING = "waiting"  # in the queue, holds no blocks
    RUNNING = "running"  # holds the blocks of its known tokens
    FINISHED = "finished"


class FinishReason(StrEnum):
    STOP = "stop"  # a stop token or stop string
    LENGTH = "length"  # max_tokens or the context limit
    ABORT = "abort"  # cancelled by the caller or by the engine's close
    ERROR = "error"  # the engine died


@dataclass(slots=True, eq=False)
class Sequence:
    """One sequence, as integers.

    Invariants (`check` asserts them):
        0 <= num_computed <= len(tokens) <= max_tokens, 1 <= prompt_len <= len(tokens);
        running: the blocks cover all known tokens, so `block_table` holds at least num_computed tokens;
        waiting: num_computed == 0 and no blocks (a preempted sequence is recomputed from its tokens);
        finished: no blocks, except while a step in flight still writes to them.

    Attributes:
        tokens: prompt and generated token ids.
        prompt_len: how many of them are the prompt.
        max_tokens: length at which it finishes, prompt included.
        num_computed: leading tokens whose KV is in the blocks.
        stop_ids: a generated token in this set finishes the sequence.
        seed: of the draws; together with the index of the output token it names a draw, so a sequence that
            is preempted and recomputed draws the same tokens.
        sample: index among the samples of its request.
    """

    seq_id: int
    tokens: list[int]
    prompt_len: int
    max_tokens: int
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int] = frozenset()
    sample: int = 0
    num_computed: int = 0
    block_table: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    preemptions: int = 0

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def remaining(self) -> int:
        """Known tokens without KV: 1 while decoding, more during prefill."""
        return len(self.tokens) - self.num_computed

    @property
    def finished(self) -> bool:
        return self.status is Status.FINISHED

    def next_draw(self) -> SampleSpec:
        """How to draw the token behind the known ones."""
        p = self.params
        return SampleSpec(p.temperature, p.top_p, p.top_k, self.seed, self.sample, self.num_output)

    def check(self, block_size: int) -> None:
        """Assert the invariants between steps.

        Raises:
            AssertionError: the state is inconsistent.
        """
        if not (0 <= self.num_computed <= len(self.tokens) <= self.max_tokens and self.prompt_len >= 1):
            raise AssertionError(f"sequence {self.seq_id}: {self.num_computed} computed of {len(self.tokens)} tokens")
        if self.status is Status.RUNNING and len(self.block_table) * block_size < self.num_computed:
            raise AssertionError(f"sequence {self.seq_id}: {len(self.block_table)} blocks for {self.num_computed}")
        if self.status is Status.WAITING and (self.block_table or self.num_computed):
            raise AssertionError(f"sequence {self.seq_id} waits but holds {len(self.block_table)} blocks")
