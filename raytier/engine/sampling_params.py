"""What a request asks of sampling, validated once at the door."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

from raytier.checkpoint.manifest import GenerationDefaults
from raytier.engine.structured import StructuredOutputs
from raytier.engine.text import encodable
from raytier.errors import InvalidRequestError

MAX_TEMPERATURE = 2.0
MAX_PENALTY = 2.0
MAX_LOGIT_BIAS = 100.0
MAX_SAMPLES = 128
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024  # characters
MAX_LIST = 1024  # entries of logit_bias, bad_words, stop_token_ids


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling of one request.

    How they act on the logits of a token, in order: allowed_token_ids (and structured_outputs), bad_words, min_tokens,
    logit_bias, repetition_penalty, frequency_penalty and presence_penalty; then the largest one, or temperature, min_p,
    top_k, top_p and a draw.

    Attributes:
        temperature: 0 (greedy) to 2.
        top_p: probability mass kept, in (0, 1].
        top_k: tokens kept; 0 = all (-1 is accepted for it).
        max_tokens: most tokens to generate; 0 only together with prompt_logprobs.
        n: samples of the same prompt, 1 to 128.
        min_p: tokens less probable than this share of the likeliest one are left out, 0 to 1.
        repetition_penalty: above 0; positive logits of tokens of the prompt and of the output are divided by it,
            negative ones multiplied.
        presence_penalty: -2 to 2, subtracted from the logits of tokens of the output.
        frequency_penalty: -2 to 2, the same for each time that a token has been generated.
        logit_bias: (token id, -100 to 100), added to its logit.
        seed: makes the draws reproducible; None = the engine draws one.
        stop: strings that end the text.
        stop_token_ids: end the text in addition to the model's own.
        ignore_eos: do not end at the model's own end-of-sequence tokens.
        min_tokens: neither stop tokens nor stop strings end the text before so many tokens.
        logprobs: likeliest tokens to report beside each generated one, 0 to 20; None = nothing. These are
            log-probabilities of the model itself, before anything above is applied.
        prompt_logprobs: the same for every token of the prompt but the first.
        bad_words: texts that are not generated.
        allowed_token_ids: the only tokens that are generated; None = all.
        structured_outputs: what the text must match; None = anything.
        include_stop_str_in_output: keep the stop string in the text.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        InvalidRequestError: a value is outside what is allowed; `param` names the field.
    """

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    n: int = 1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    structured_outputs: StructuredOutputs | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name, (low, high, allowed) in _NUMBERS.items():
            _check_number(name, getattr(self, name), low, high, allowed)
        if self.top_p == 0 or self.repetition_penalty == 0:
            name = "top_p" if self.top_p == 0 else "repetition_penalty"
            _refuse(name, getattr(self, name), _NUMBERS[name][2])
        for name, (least, most, allowed) in _INTEGERS.items():
            _check_integer(name, getattr(self, name), least, most, allowed)
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        if self.max_tokens == 0 and self.prompt_logprobs is None:
            _refuse("max_tokens", 0, "at least 1 (0 only together with prompt_logprobs)")
        if self.min_tokens > self.max_tokens:
            _refuse("min_tokens", self.min_tokens, f"at most max_tokens ({self.max_tokens})")
        for name in ("seed", "logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None:
                _check_integer(name, value, *_OPTIONAL_INTEGERS[name])
        _check_strings("stop", self.stop, MAX_STOP_STRINGS, MAX_STOP_LENGTH)
        _check_strings("bad_words", self.bad_words, MAX_LIST, MAX_STOP_LENGTH)
        _check_ids("stop_token_ids", self.stop_token_ids, MAX_LIST)
        if self.allowed_token_ids is not None:
            if not self.allowed_token_ids:
                _refuse("allowed_token_ids", [], "a list of at least one token id")
            _check_ids("allowed_token_ids", self.allowed_token_ids, None)
        if len(self.logit_bias) > MAX_LIST:
            _refuse("logit_bias", f"{len(self.logit_bias)} entries", f"at most {MAX_LIST} entries")
        for token, bias in self.logit_bias:
            _check_integer("logit_bias", token, 0, None, "a map of token ids (of at least 0)")
            allowed = f"a map of token ids to numbers between {-MAX_LOGIT_BIAS:g} and {MAX_LOGIT_BIAS:g}"
            _check_number("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS, allowed)
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "true or false")

    @classmethod
    def from_request(cls, defaults: GenerationDefaults, **given: Any) -> SamplingParams:
        """Fields of a request over the model's defaults; None (absent or null) means the default.

        Lists become tuples, a single stop string a tuple of one, `logit_bias` is a map of token ids (or their
        decimal strings, as JSON has them) to numbers, `structured_outputs` a map of the fields of `StructuredOutputs`.
        The model's own end-of-sequence ids are not copied here: the engine adds them unless `ignore_eos`.

        Raises:
            InvalidRequestError: a field is not known, or its value is outside what is allowed.
        """
        for name in given:
            if name not in FIELDS:
                raise InvalidRequestError(f"unknown sampling field {name!r}; known: {', '.join(FIELDS)}", param=name)
        values = {
            "temperature": defaults.temperature,
            "top_p": defaults.top_p,
            "top_k": defaults.top_k,
            "max_tokens": defaults.max_new_tokens,
        }
        for name, value in given.items():
            if value is not None:
                values[name] = _READERS[name](name, value) if name in _READERS else value
        return cls(**values)  # type: ignore[arg-type]


#: Names of all fields, in order.
FIELDS = tuple(each.name for each in fields(SamplingParams))

_NUMBERS = {
    "temperature": (0.0, MAX_TEMPERATURE, f"between 0 (greedy) and {MAX_TEMPERATURE:g}"),
    "top_p": (0.0, 1.0, "above 0 and at most 1"),
    "min_p": (0.0, 1.0, "between 0 and 1"),
    "repetition_penalty": (0.0, math.inf, "above 0"),
    "presence_penalty": (-MAX_PENALTY, MAX_PENALTY, f"between {-MAX_PENALTY:g} and {MAX_PENALTY:g}"),
    "frequency_penalty": (-MAX_PENALTY, MAX_PENALTY, f"between {-MAX_PENALTY:g} and {MAX_PENALTY:g}"),
}
_INTEGERS: dict[str, tuple[int, int | None, str]] = {
    "top_k": (-1, None, "0 or -1 (all tokens), or at least 1"),
    "max_tokens": (0, None, "at least 1"),
    "n": (1, MAX_SAMPLES, f"between 1 and {MAX_SAMPLES}"),
    "min_tokens": (0, None, "at least 0"),
}
_OPTIONAL_INTEGERS: dict[str, tuple[int, int | None, str]] = {
    "seed": (-(2**63), 2**63 - 1, "a 64-bit integer"),
    "logprobs": (0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
    "prompt_logprobs": (0, MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}"),
}


def _listed(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        _refuse(name, value, "a list")
    return tuple(value)


def _stop(name: str, value: object) -> tuple[Any, ...]:
    return (value,) if isinstance(value, str) else _listed(name, value)


def _bias(name: str, value: object) -> tuple[tuple[Any, Any], ...]:
    if not isinstance(value, Mapping):
        _refuse(name, value, "a map of token ids to numbers")
    pairs = tuple((_id_of(key), bias) for key, bias in value.items())
    if len({token for token, _ in pairs}) != len(pairs):
        _refuse(name, value, "a map in which every token id stands once")
    return pairs


def _id_of(key: object) -> object:
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 19 else key


def _structured(name: str, value: object) -> StructuredOutputs:
    return value if isinstance(value, StructuredOutputs) else StructuredOutputs.from_request(value)


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "stop": _stop,
    "stop_token_ids": _listed,
    "bad_words": _listed,
    "allowed_token_ids": _listed,
    "logit_bias": _bias,
    "structured_outputs": _structured,
}


def _check_number(name: str, value: object, low: float, high: float, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _refuse(name, value, f"a finite number {allowed}" if name != "logit_bias" else allowed)
    if not low <= value <= high:
        _refuse(name, value, allowed)


def _check_integer(name: str, value: object, low: int, high: int | None, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        _refuse(name, value, allowed)


def _check_strings(name: str, values: tuple[str, ...], most: int, longest: int) -> None:
    if len(values) > most:
        _refuse(name, f"{len(values)} strings", f"at most {most} strings")
    for text in values:
        if not isinstance(text, str) or not 0 < len(text) <= longest:
            _refuse(name, text, f"strings of 1 to {longest} characters")
        encodable(text, name)


def _check_ids(name: str, values: tuple[int, ...], most: int | None) -> None:
    if most is not None and len(values) > most:
        _refuse(name, f"{len(values)} ids", f"at most {most} token ids")
    for token in values:
        _check_integer(name, token, 0, None, "token ids of at least 0")


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    raise InvalidRequestError(f"{name} must be {allowed}, got {value!r}", param=name)
