"""Which tokens grammars allow next, computed in a thread of its own while the layers run.

What may come next follows from the tokens drawn so far, so a step's masks need nothing of the step itself. llguidance
lets other threads run while it works, and uses no OpenMP.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import fill_next_token_bitmask

from raytier.engine.step import SequenceSpec
from raytier.execution.logits import Bits, bits_of

_COMPILED = 64  # grammars kept compiled
_LIMITS = LLParserLimits(verbose_errors=False)


class GrammarState:
    """Where one sequence stands in its grammar. The thread of `GrammarMasks` alone works on it, but for `add`.

    Args:
        compiled: a matcher at the beginning of the grammar.
        output: tokens that were drawn already.
    """

    def __init__(self, spec: SequenceSpec, vocab: int, output: Sequence[int], compiled: Future[LLMatcher]) -> None:
        self.compiled = compiled
        self.min_tokens = spec.min_tokens
        self.not_stops = ~bits_of([token for token in spec.stop_ids if token < vocab], vocab)
        self.matcher: LLMatcher | None = None
        self.pending = list(output)

    def add(self, token: int) -> None:
        """`token` has been drawn."""
        self.pending.append(token)


class GrammarMasks:
    """Masks of the grammars of one model. `state` and `compute` are called by one thread.

    Args:
        tokenizer: llguidance's, as wide as the tokenizer's vocabulary or the model's, whichever is more.
        vocab: width of the logits.
    """

    def __init__(self, tokenizer: LLTokenizer, vocab: int) -> None:
        self._tokenizer = tokenizer
        self._vocab = vocab
        self._bytes = (vocab + 31) // 32 * 4
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        # A thread of its own: the masks of sequences whose grammars are known do not wait for a new one.
        self._compiler = ThreadPoolExecutor(1, thread_name_prefix="grammar-compiler")

    def state(self, spec: SequenceSpec, output: Sequence[int]) -> GrammarState:
        """Of a sequence that arrives. A new grammar takes up to a second to compile, which begins now: prompts are
        read meanwhile."""
        grammar = spec.grammar
        assert grammar is not None
        if grammar not in self._compiled:
            self._compiled[grammar] = self._compiler.submit(self._compile, grammar)
            if len(self._compiled) > _COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return GrammarState(spec, self._vocab, output, self._compiled[grammar])

    def compute(self, states: Sequence[GrammarState], positions: Sequence[int]) -> Future[list[Bits | str]]:
        """Begin to compute what each of `states` allows as output token number `position`: bits, or why that is not
        to be had. Nothing may be added to the states until the result is there."""
        return self._thread.submit(lambda: [self._mask(s, p) for s, p in zip(states, positions, strict=True)])

    def _mask(self, state: GrammarState, position: int) -> Bits | str:
        if state.matcher is None:
            state.matcher = state.compiled.result().deep_copy()
        matcher = state.matcher
        matcher.consume_tokens(state.pending)
        state.pending.clear()
        words = np.zeros((1, (self._tokenizer.vocab_size + 31) // 32), dtype=np.int32)
        fill_next_token_bitmask(matcher, words)
        if matcher.is_error():
            return matcher.get_error()
        mask = words.view(np.uint8)[0, : self._bytes]
        if position < state.min_tokens:
            going_on = mask & state.not_stops
            # A text that is complete cannot go on, whatever min_tokens says.
            mask = going_on if going_on.any() else mask
        return mask

    def _compile(self, grammar: str) -> LLMatcher:
        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)

    def close(self) -> None:
        """End the threads."""
        self._compiler.shutdown()
        self._thread.shutdown()
