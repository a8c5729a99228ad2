"""The state of one sequence: tokens, how many of them have KV, and the blocks that hold it."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import StrEnum

from raytier.engine.step import Arrival, SequenceSpec
from raytier.kv.tables import SequenceKV


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
        running: the block tables cover at least num_computed tokens;
        waiting: num_computed == 0 and no blocks (a preempted sequence is recomputed from its tokens, but for what is
            found in the prefix cache);
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
        num_cached: prompt tokens whose KV was there when it first began.
        kv: its blocks. samples: those of its request, where there are several.
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
    num_cached: int = 0
    kv: SequenceKV = field(init=False)
    samples: Samples | None = None
    status: Status = Status.WAITING
    finish_reason: FinishReason | None = None
    preemptions: int = 0

    def __post_init__(self) -> None:
        self.kv = SequenceKV(self.seq_id)

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
    def most_found(self) -> int:
        """Leading tokens that need not be computed if their KV is found: the logits of what follows are needed, those
        of the last token always."""
        if self.spec.prompt_logprobs is not None and self.logprobs_known < self.prompt_len:
            return min(self.logprobs_known, len(self.tokens)) - 1
        return len(self.tokens) - 1

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
        if self.status is Status.RUNNING and any(len(t) * block_size < self.num_computed for t in self.kv.tables):
            raise AssertionError(f"sequence {self.seq_id}: {self.kv.tables} for {self.num_computed} tokens")
        if self.status is Status.WAITING and (self.kv.tables or self.num_computed):
            raise AssertionError(f"sequence {self.seq_id} waits but holds {self.kv.num_blocks} blocks")


class Samples:
    """The sequences of one request, which all begin with its prompt: one computes it, the others share its blocks."""

    def __init__(self, members: SequenceOf[Sequence]) -> None:
        self._members = members
        self._leader = members[0]

    def leader(self) -> Sequence | None:
        """A running one, that which began first if it still runs; None where none does."""
        if self._leader.status is not Status.RUNNING:
            running = (s for s in self._members if s.status is Status.RUNNING)
            self._leader = max(running, key=lambda s: s.num_computed, default=self._leader)
        return self._leader if self._leader.status is Status.RUNNING else None
