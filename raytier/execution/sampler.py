"""From logits to tokens, for all sequences of a batch; it holds what drawing needs to know of each of them.

That state is made when a sequence arrives (first, or again after a preemption, from its tokens) and follows the tokens
drawn here, so that a step carries none of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future

from llguidance import LLTokenizer
from torch import Tensor

from raytier.checkpoint.manifest import TokenizerSpec
from raytier.engine.step import Arrival, SampleSpec, SequenceChunk, StepBatch, StepResult
from raytier.engine.structured import guide_tokenizer
from raytier.execution.drawing import draw
from raytier.execution.grammar import GrammarMasks, GrammarState
from raytier.execution.logits import Bits, LogitRules, adjust
from raytier.execution.logprobs import token_logprobs


class _State:
    """What is known of one sequence."""

    def __init__(self, arrival: Arrival, vocab: int, grammar: GrammarState | None) -> None:
        self.spec = arrival.spec
        self.prompt_len = arrival.prompt_len
        self.tokens = arrival.tokens if arrival.spec.prompt_logprobs is not None else ()
        self.logprobs_known = arrival.logprobs_known
        self.rules = LogitRules(arrival.spec, vocab, arrival.prompt_len, arrival.tokens)
        self.grammar = grammar

    def position(self, chunk: SequenceChunk) -> int:
        """Number of the output token that `chunk` draws."""
        return chunk.stop - self.prompt_len

    def prompt_targets(self, chunk: SequenceChunk) -> range:
        """Tokens of the prompt whose logprobs `chunk` brings: each is judged by the logits of the one before it."""
        if self.spec.prompt_logprobs is None:
            return range(0)
        return range(max(chunk.start + 1, self.logprobs_known), min(chunk.stop + 1, self.prompt_len))


class Sampler:
    """Draws the tokens of steps: `begin` before the layers run, `finish` with their logits.

    Args:
        vocab: width of the logits.
        tokenizer: of the model, for grammars; None where there will be none.
    """

    def __init__(self, vocab: int, tokenizer: TokenizerSpec | None) -> None:
        self._vocab = vocab
        self._tokenizer = tokenizer
        self._states: dict[int, _State] = {}
        self._epoch = -1
        self._masks: GrammarMasks | None = None
        self._computing: tuple[list[int], Future[list[Bits | str]]] | None = None

    def __len__(self) -> int:
        """Sequences that are known."""
        return len(self._states)

    def begin(self, batch: StepBatch) -> None:
        """Take note of sequences that come and go, and begin to compute the masks of grammars.

        Raises:
            RuntimeError: a chunk belongs to a sequence that has not arrived.
        """
        if batch.epoch != self._epoch:
            self._states.clear()
            self._epoch = batch.epoch
        for seq_id in batch.ended:
            self._states.pop(seq_id, None)
        for arrival in batch.arrivals:
            self._states[arrival.seq_id] = _State(arrival, self._vocab, self._grammar_of(arrival))
        if unknown := [chunk.seq_id for chunk in batch.chunks if chunk.seq_id not in self._states]:
            raise RuntimeError(f"step {batch.step} carries sequences that have not arrived: {unknown}")
        self._computing = self._compute_masks(batch)

    def rows(self, batch: StepBatch) -> list[int]:
        """Which of the step's packed tokens need logits: those of the draws first, then those of prompt logprobs."""
        draws: list[int] = []
        prompts: list[int] = []
        offset = 0
        for chunk in batch.chunks:
            if chunk.draws:
                draws.append(offset + len(chunk.token_ids) - 1)
            targets = self._states[chunk.seq_id].prompt_targets(chunk)
            prompts += range(offset + targets.start - 1 - chunk.start, offset + targets.stop - 1 - chunk.start)
            offset += len(chunk.token_ids)
        return draws + prompts

    def finish(self, batch: StepBatch, logits: Tensor) -> StepResult:
        """Draw from `logits` `[rows, vocab]`, of the rows that `rows` named."""
        began = time.perf_counter()
        result = StepResult(batch.step)
        drawing = [chunk for chunk in batch.chunks if chunk.draws]
        masks = self._wait_for_masks(result)
        failed = result.failed
        if drawing:
            tokens = self._draw(logits[: len(drawing)], drawing, masks, failed)
            for chunk, token in zip(drawing, tokens, strict=True):
                if chunk.seq_id not in failed:
                    result.tokens[chunk.seq_id] = token
                    self._take(chunk.seq_id, token)
        self._add_logprobs(logits, drawing, result)
        self._add_prompt_logprobs(logits, len(drawing), batch.chunks, result)
        result.stats.sample_s = time.perf_counter() - began
        return result

    def close(self) -> None:
        """End the thread of the grammars and forget everything."""
        if self._masks is not None:
            self._masks.close()
        self._states.clear()

    # ---- masks ---------------------------------------------------------------------------------

    def _compute_masks(self, batch: StepBatch) -> tuple[list[int], Future[list[Bits | str]]] | None:
        asking: list[int] = []
        grammars: list[GrammarState] = []
        positions: list[int] = []
        for chunk in batch.chunks:
            state = self._states[chunk.seq_id]
            if chunk.draws and state.grammar is not None:
                asking.append(chunk.seq_id)
                grammars.append(state.grammar)
                positions.append(state.position(chunk))
        return (asking, self._masks.compute(grammars, positions)) if self._masks is not None and asking else None

    def _grammar_of(self, arrival: Arrival) -> GrammarState | None:
        if arrival.spec.grammar is None:
            return None
        if self._masks is None:
            self._masks = GrammarMasks(self._guide(), self._vocab)
        return self._masks.state(arrival.spec, arrival.tokens[arrival.prompt_len :])

    def _guide(self) -> LLTokenizer:
        if self._tokenizer is None:
            raise RuntimeError("a sequence has a grammar, but this executor was given no tokenizer")
        return guide_tokenizer(self._tokenizer, self._vocab)

    def _wait_for_masks(self, result: StepResult) -> dict[int, Bits]:
        """Masks by sequence; those that are not to be had are noted as failures."""
        computing, self._computing = self._computing, None
        if computing is None:
            return {}
        began = time.perf_counter()
        asking, future = computing
        found: dict[int, Bits] = {}
        for seq_id, mask in zip(asking, future.result(), strict=True):
            if isinstance(mask, str):
                result.failed[seq_id] = f"the grammar cannot go on: {mask}"
            else:
                found[seq_id] = mask
        result.stats.mask_wait_s = time.perf_counter() - began
        return found

    # ---- draws ---------------------------------------------------------------------------------

    def _draw(
        self, raw: Tensor, chunks: Sequence[SequenceChunk], masks: dict[int, Bits], failed: dict[int, str]
    ) -> list[int]:
        """A token per row of `raw`; those of `failed` sequences mean nothing."""
        states = [self._states[chunk.seq_id] for chunk in chunks]
        positions = [state.position(chunk) for state, chunk in zip(states, chunks, strict=True)]
        acting = [row for row, state in enumerate(states) if state.rules.acts(positions[row])]
        logits = raw
        if acting:
            # The model's own logits are needed as they are for logprobs.
            changed = (raw if len(acting) == len(chunks) else raw[acting]).float()
            changed = changed.clone() if changed.data_ptr() == raw.data_ptr() else changed
            adjust(
                changed,
                [states[row].rules for row in acting],
                [positions[row] for row in acting],
                [masks.get(chunks[row].seq_id) for row in acting],
            )
            impossible = changed.max(dim=-1).values == float("-inf")
            for row, nothing in zip(acting, impossible.tolist(), strict=True):
                if nothing:
                    why = "allowed_token_ids, bad_words, logit_bias and structured_outputs together leave no token"
                    failed.setdefault(chunks[row].seq_id, why)
            if len(acting) == len(chunks):
                logits = changed
            else:
                logits = raw.float() if raw.dtype != changed.dtype else raw.clone()
                logits[acting] = changed
        specs: list[SampleSpec] = [state.spec.draw(p) for state, p in zip(states, positions, strict=True)]
        return draw(logits, specs)

    def _take(self, seq_id: int, token: int) -> None:
        state = self._states[seq_id]
        state.rules.add(token)
        if state.grammar is not None and token not in state.spec.stop_ids:
            state.grammar.add(token)

    # ---- logprobs ------------------------------------------------------------------------------

    def _add_logprobs(self, logits: Tensor, drawing: Sequence[SequenceChunk], result: StepResult) -> None:
        rows, ids, tops, tokens = [], [], [], result.tokens
        for row, chunk in enumerate(drawing):
            top = self._states[chunk.seq_id].spec.logprobs
            if top is not None and chunk.seq_id in tokens:
                rows.append(row)
                ids.append(chunk.seq_id)
                tops.append(top)
        if rows:
            found = token_logprobs(logits, rows, [tokens[seq_id] for seq_id in ids], tops)
            result.logprobs = dict(zip(ids, found, strict=True))

    def _add_prompt_logprobs(
        self, logits: Tensor, row: int, chunks: Sequence[SequenceChunk], result: StepResult
    ) -> None:
        for chunk in chunks:
            state = self._states[chunk.seq_id]
            targets = state.prompt_targets(chunk)
            if targets:
                top = state.spec.prompt_logprobs
                assert top is not None
                wanted = state.tokens[targets.start : targets.stop]
                rows = range(row, row + len(targets))
                found = token_logprobs(logits, rows, wanted, [top] * len(targets))
                result.prompt_logprobs[chunk.seq_id] = tuple(found)
                state.logprobs_known = targets.stop
                row += len(targets)
