"""The state of one sequence: tokens, how many of them have KV, and the blocks that hold it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from raytier.engine.step import Arrival, SequenceSpec


class Status(StrEnum):
    WAITING = "waiting"  # in the queue, holds no blocks
    RUNNING = "running"  # holds the blocks of its known tokens
    FINISHED = "finished"


class FinishReason(StrEnum):
    STOP = "stop"  # a stop token or stop string
    LENGTH = "length"  # max_tokens or the context limit
    ABORT = "abort"  # cancelled by the caller or by the engine's close
    TIMEOUT = "timeout"  # it took longer than the request allows
    ERROR = "error"  # the engine died, or no token could be drawn


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
        max_tokens: length at which it finishes, prompt included; `prompt_len` where nothing is to be generated.
        spec: how its tokens are drawn; together with the index of the output token its seed and sample name a draw,
            so a sequence that is preempted and recomputed draws the same tokens.
        stop_ids: a generated token in this set finishes the sequence.
        priority: lower ones go first, equal ones in order of arrival.
        num_computed: leading tokens whose KV is in the blocks.
        logprobs_known: leading tokens of the prompt whose logprobs are there or not needed (the first has none).
    """

    seq_id: int
    tokens: list[int]
    prompt_len: int
    max_tokens: int
    spec: SequenceSpec
    stop_ids: frozenset[int] = frozenset()
    priority: int = 0
    num_computed: int = 0
    logprobs_known: int = 1
    block_table: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    preemptions: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Who goes first: the smaller one."""
        return self.priority, self.seq_id

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

    def arrival(self) -> Arrival:
        """What the executor must know of it before its next chunk."""
        tokens = tuple(self.tokens) if self.spec.needs_tokens else ()
        return Arrival(self.seq_id, self.spec, self.prompt_len, tokens, self.logprobs_known)

    def logit_rows(self, count: int) -> int:
        """Tokens among the next `count` ones whose logits are needed for logprobs of the prompt."""
        if self.spec.prompt_logprobs is None:
            return 0
        first = max(self.num_computed, self.logprobs_known - 1)
        return max(0, min(self.num_computed + count, self.prompt_len - 1) - first)

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
