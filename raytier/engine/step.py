"""The contract between the engine and what executes a step: one request, one answer per step.

Plain picklable data, no torch. A *step* is one scheduler iteration: one sweep over all layers that
carries every running sequence's next token and every prefill chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from raytier.kv.orders import KVOrders, KVReport
from raytier.kv.tables import BlockCopy


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
    min_p: float = 0.0


@dataclass(frozen=True, slots=True)
class SequenceSpec:
    """How to draw all tokens of a sequence; the fields are those of `SamplingParams`, texts being token ids here.

    Attributes:
        bad_words: sequences of ids whose last one is not drawn after the others.
        stop_ids: what is not drawn before `min_tokens`, and what ends a grammar's text.
        grammar: llguidance's, see `StructuredOutputs.compile`.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    sample: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None

    def draw(self, position: int) -> SampleSpec:
        """How to draw the output token number `position`, from 0."""
        return SampleSpec(self.temperature, self.top_p, self.top_k, self.seed, self.sample, position, self.min_p)

    @property
    def counts_tokens(self) -> bool:
        """Whether the logits depend on how often tokens occurred."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    @property
    def needs_tokens(self) -> bool:
        """Whether the executor has to know the tokens of the sequence, beside those that it computes."""
        asks = self.counts_tokens or self.bad_words or self.grammar is not None
        return bool(asks or self.prompt_logprobs is not None)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A sequence that the executor does not know (any more): with its first chunk, and again after a preemption.

    Attributes:
        prompt_len: how many of its tokens are the prompt.
        tokens: prompt and generated ids; empty unless `spec.needs_tokens`.
        logprobs_known: leading tokens of the prompt whose logprobs are not wanted (again); the first has none.
    """

    seq_id: int
    spec: SequenceSpec
    prompt_len: int
    tokens: tuple[int, ...] = ()
    logprobs_known: int = 1


@dataclass(frozen=True, slots=True)
class SequenceChunk:
    """Consecutive new tokens of one sequence.

    Attributes:
        seq_id: engine-wide id of the sequence.
        token_ids: the tokens to run, at positions start .. start + len(token_ids) - 1.
        start: number of tokens whose KV is already in the blocks.
        block_table: physical block ids in KV cache group 0; covers at least start + len(token_ids) tokens.
        draws: whether the token after the last one is to be drawn; not so in an unfinished prefill.
        further_tables: of the groups behind group 0. Where a group's window has passed, a table holds the null block.
    """

    seq_id: int
    token_ids: tuple[int, ...]
    start: int
    block_table: tuple[int, ...]
    draws: bool
    further_tables: tuple[tuple[int, ...], ...] = ()

    @property
    def block_tables(self) -> tuple[tuple[int, ...], ...]:
        """Of all groups."""
        return (self.block_table, *self.further_tables)

    @property
    def stop(self) -> int:
        """Tokens that have KV when the step has run."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step. `step` counts up by one within an engine `epoch`.

    What the executor must know of a sequence is sent once: `arrivals` are those of `chunks` that it does not know,
    `ended` those that it may forget (finished or preempted; they may be in `arrivals` again). `copies` of KV blocks
    come before everything: all sources are read before any target is written. Before these come the `moves` to tiers
    below the device and back. A step without chunks only moves.
    """

    model_id: str
    epoch: int
    step: int
    chunks: tuple[SequenceChunk, ...]
    arrivals: tuple[Arrival, ...] = ()
    ended: tuple[int, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    moves: KVOrders | None = None

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
        bytes_decoded: bytes into which part of that was decoded.
        reads, reads_ramdisk: read requests behind them.
        damaged, damaged_ramdisk: times that what was read was not as it should be.
        mended: parameters whose files were made again for that reason.
        io_wait_s: time the compute thread waited for the ring.
        compute_s: step time without `io_wait_s`.
        sample_s: of it, from the logits to the tokens.
        mask_wait_s: of that, waiting for the masks of grammars, which are computed beside the layers.
    """

    num_tokens: int = 0
    num_sequences: int = 0
    bytes_streamed: int = 0
    bytes_streamed_ramdisk: int = 0
    bytes_read: int = 0
    bytes_read_ramdisk: int = 0
    bytes_decoded: int = 0
    reads: int = 0
    reads_ramdisk: int = 0
    damaged: int = 0
    damaged_ramdisk: int = 0
    mended: int = 0
    io_wait_s: float = 0.0
    compute_s: float = 0.0
    sample_s: float = 0.0
    mask_wait_s: float = 0.0
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
    """What a step brought, by `seq_id`.

    Attributes:
        tokens: the token drawn for each chunk that asked for one.
        logprobs: of that token, where the sequence asks for them.
        prompt_logprobs: of the prompt's tokens from the first one on that was not known, as far as this step computed
            them.
        failed: sequences whose token could not be drawn, and why; they have none in `tokens`.
        moved: what became of `moves`, of this step and earlier ones; None where there is nothing below the device.
    """

    step: int
    tokens: dict[int, int] = field(default_factory=dict)
    stats: StepStats = field(default_factory=StepStats)
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    moved: KVReport | None = None


class StepExecutor(Protocol):
    """What an engine drives: a model runner in this process or a handle of a DeviceActor."""

    def step(self, batch: StepBatch) -> StepResult:
        """Run one step; raises `EngineDeadError` when the executor is gone."""
        ...
