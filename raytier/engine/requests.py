"""A request under way: its samples, what it makes of their tokens, and how `SamplingParams` become sequences."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

from raytier.checkpoint.manifest import GenerationDefaults
from raytier.engine.detokenizer import Detokenizer
from raytier.engine.outputs import OutputDelta, RequestTimes, Sink
from raytier.engine.sampling_params import SamplingParams
from raytier.engine.scheduler import check_length
from raytier.engine.sequence import FinishReason, Sequence
from raytier.engine.step import SequenceSpec, TokenLogprobs
from raytier.engine.tokenizer import Tokenizer
from raytier.errors import InvalidRequestError


@dataclass(slots=True, eq=False)
class Sample:
    """One sample of a request. Times as in `RequestTimes`."""

    sequence: Sequence
    detokenizer: Detokenizer
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    stop_reason: str | int | None = None


@dataclass(slots=True, eq=False)
class Request:
    """What the engine knows of a request; `unfinished` samples are still to end.

    Attributes:
        prompt_logprobs: what there is so far; None where they are not asked for, or have been handed out.
    """

    request_id: str
    params: SamplingParams
    samples: tuple[Sample, ...]
    sink: Sink
    arrived: float
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = len(self.samples)
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    def take(self, sample: Sample, token: int | None, now: float) -> tuple[str, bool]:
        """Note a new token of a sample, or its end without one: new text, and whether a stop string ended it."""
        sequence = sample.sequence
        text, stop = "", None
        if token is not None:
            sample.last_token = now
            sample.first_token = now if sample.first_token is None else sample.first_token
            if sequence.finish_reason is not FinishReason.STOP:  # the text of a stop token is not output
                text, stop = sample.detokenizer.push(token)
            elif token in self.params.stop_token_ids:
                sample.stop_reason = token
        if stop is None and sequence.finished:
            rest, stop = sample.detokenizer.flush()
            text += rest
        if stop is not None:
            sample.stop_reason = stop
        return text, stop is not None

    def take_prompt_logprobs(self, logprobs: SequenceOf[TokenLogprobs]) -> None:
        """Those of the next tokens of the prompt."""
        assert self.prompt_logprobs is not None
        self.prompt_logprobs += logprobs

    def delta(
        self,
        sample: Sample,
        text: str,
        token: int | None,
        logprobs: TokenLogprobs | None,
        now: float,
        error: str | None = None,
    ) -> OutputDelta:
        """What is new of a sample."""
        sequence = sample.sequence
        reason = sequence.finish_reason
        times = None
        if reason is not None:
            self.unfinished -= 1
            times = RequestTimes(self.arrived, sample.scheduled, sample.first_token, sample.last_token, now)
        known, whole = self.prompt_logprobs, None
        if known is not None and len(known) == sequence.prompt_len and sequence.spec.sample == 0:
            whole, self.prompt_logprobs = tuple(known), None
        return OutputDelta(
            self.request_id,
            sequence.spec.sample,
            text,
            () if token is None else (token,),
            None if reason is None else reason.value,
            sequence.prompt_len,
            sequence.num_output,
            error,
            done=self.unfinished == 0,
            logprobs=() if logprobs is None else (logprobs,),
            prompt_logprobs=whole,
            stop_reason=sample.stop_reason,
            cached_tokens=min(self.samples[0].sequence.num_cached, sequence.prompt_len),
            times=times,
        )


@dataclass(frozen=True, slots=True)
class CheckedParams:
    """Sampling parameters that a model can follow, as its sequences take them: texts encoded, grammars compiled.

    Attributes:
        stop_ids: generated tokens that end a sequence.
    """

    params: SamplingParams
    spec: SequenceSpec
    stop_ids: frozenset[int]


def build_request(
    prompt: SequenceOf[int],
    checked: CheckedParams,
    sink: Sink,
    request_id: str,
    seq_ids: Iterable[int],
    *,
    arrived: float,
    priority: int,
    tokenizer: Tokenizer,
    max_context: int,
) -> Request:
    """A request whose samples wait to be scheduled; `seq_ids` yields an id for each."""
    params, spec = checked.params, checked.spec
    seed = secrets.randbits(63) if params.seed is None else params.seed
    # Room for one token at least, so that the scheduler refuses a prompt that fills the context.
    context = max(max_context, len(prompt) + min(1, params.max_tokens))
    longest = min(len(prompt) + params.max_tokens, context)
    samples = [
        Sample(
            # The prompt's logprobs are the same for all samples: the first one has them computed.
            Sequence(
                seq_id,
                list(prompt),
                len(prompt),
                longest,
                replace(spec, seed=seed, sample=index, prompt_logprobs=None if index else spec.prompt_logprobs),
                checked.stop_ids,
                priority,
            ),
            Detokenizer(
                tokenizer,
                stop=params.stop,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
            ),
        )
        for index, seq_id in zip(range(params.n), seq_ids, strict=False)
    ]
    return Request(request_id, params, tuple(samples), sink, arrived)


def check_prompt(tokens: SequenceOf[int], vocab_size: int, max_context: int) -> None:
    """Refuse what is no prompt, its length first: what is too long is not even looked at.

    Raises:
        InvalidRequestError: it is empty, longer than the context, or holds something else than ids of the vocabulary.
    """
    if not tokens:
        raise InvalidRequestError("the prompt is empty: at least one token is needed", param="prompt")
    check_length(len(tokens), len(tokens), max_context)
    if not all(type(token) is int for token in tokens):
        raise InvalidRequestError("the prompt must be a list of integer token ids", param="prompt")
    low, high = min(tokens), max(tokens)
    if low < 0 or high >= vocab_size:
        raise InvalidRequestError(
            f"token ids must be between 0 and {vocab_size - 1}, the prompt has {low} to {high}", param="prompt"
        )


def check_terms(priority: object, timeout_s: object, policy: str) -> None:
    """Refuse a priority or a time limit that cannot be kept.

    Raises:
        InvalidRequestError: it is not of its type or range, or the scheduler knows no priorities.
    """
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise InvalidRequestError(f"priority must be an integer, got {priority!r}", param="priority")
    if priority and policy != "priority":
        raise InvalidRequestError(
            f"priority must be 0 (or absent), got {priority}: scheduler.policy is {policy}; set it to priority",
            param="priority",
        )
    if timeout_s is None:
        return
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < math.inf:
        raise InvalidRequestError(f"timeout_s must be seconds above 0, got {timeout_s!r}", param="timeout_s")


def specify(
    params: SamplingParams, tokenizer: Tokenizer, defaults: GenerationDefaults, vocab_size: int
) -> CheckedParams:
    """How the tokens of a request are drawn, and which of them end it.

    Raises:
        InvalidRequestError: the model has no such token, or cannot produce what is asked for.
    """
    stop_ids = frozenset(params.stop_token_ids)
    grammar = None
    if params.structured_outputs is not None:
        grammar = tokenizer.grammar(params.structured_outputs, vocab_size)
        # What the grammar allows has an end, so that `ignore_eos` has nothing to go on with.
        stop_ids |= frozenset(tokenizer.spec.eos_token_ids)
    if not params.ignore_eos or grammar is not None:
        stop_ids |= frozenset(defaults.stop_token_ids)
    for name, ids in (
        ("logit_bias", [token for token, _ in params.logit_bias]),
        ("allowed_token_ids", params.allowed_token_ids or ()),
    ):
        if ids and max(ids) >= vocab_size:
            raise InvalidRequestError(
                f"{name} must hold token ids between 0 and {vocab_size - 1}, got {max(ids)}", param=name
            )
    spec = SequenceSpec(
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=params.logit_bias,
        allowed_token_ids=params.allowed_token_ids,
        bad_words=_bad_words(params.bad_words, tokenizer, vocab_size),
        min_tokens=params.min_tokens,
        stop_ids=tuple(sorted(token for token in stop_ids if token < vocab_size)),
        logprobs=params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        grammar=grammar,
    )
    return CheckedParams(params, spec, stop_ids)


def _bad_words(words: SequenceOf[str], tokenizer: Tokenizer, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Ids of each word, and of the word behind a space where that is another way to begin it (as vLLM has it)."""
    found = []
    for word in words:
        bare = tuple(tokenizer.encode(word.lstrip(), add_special_tokens=False))
        if not bare or max(bare) >= vocab_size:
            raise InvalidRequestError(
                f"bad_words: {word!r} is no word of this model: it has no tokens", param="bad_words"
            )
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), add_special_tokens=False))
        found.append(bare)
        if spaced[0] != bare[0] and len(spaced) == len(bare) and max(spaced) < vocab_size:
            found.append(spaced)
    return tuple(found)
