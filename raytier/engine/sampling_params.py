"""What a request asks of sampling, validated once at the door."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, TypeVar

from raytier.checkpoint.manifest import GenerationDefaults
from raytier.errors import InvalidRequestError

T = TypeVar("T")

MAX_TEMPERATURE = 2.0
MAX_STOP_STRINGS = 64
MAX_STOP_LENGTH = 1024  # characters


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling of one request.

    Attributes:
        temperature: 0 (greedy) to 2.
        top_p: probability mass kept, in (0, 1].
        top_k: tokens kept; 0 = all (-1 is accepted for it).
        seed: makes the draws reproducible; None = the engine draws one.
        stop: strings that end the text.
        stop_token_ids: end the text in addition to the model's own.
        ignore_eos: do not end at the model's own end-of-sequence tokens.
        max_tokens: most tokens to generate, at least 1.
        include_stop_str_in_output: keep the stop string in the text.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        InvalidRequestError: a value is outside what is allowed; `param` names the field.
    """

    temperature: float
    top_p: float
    top_k: int
    max_tokens: int
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature)
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            _refuse("temperature", self.temperature, f"between 0 (greedy) and {MAX_TEMPERATURE:g}")
        _check_number("top_p", self.top_p)
        if not 0 < self.top_p <= 1:
            _refuse("top_p", self.top_p, "above 0 and at most 1")
        _check_integer("top_k", self.top_k, -1, None, "0 or -1 (all tokens), or at least 1")
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        _check_integer("max_tokens", self.max_tokens, 1, None, "at least 1")
        if self.seed is not None:
            _check_integer("seed", self.seed, -(2**63), 2**63 - 1, "a 64-bit integer")
        if len(self.stop) > MAX_STOP_STRINGS:
            _refuse("stop", f"{len(self.stop)} strings", f"at most {MAX_STOP_STRINGS} strings")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_LENGTH:
                _refuse("stop", text, f"strings of 1 to {MAX_STOP_LENGTH} characters")
        for token in self.stop_token_ids:
            _check_integer("stop_token_ids", token, 0, None, "token ids of at least 0")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "true or false")

    @classmethod
    def from_request(
        cls,
        defaults: GenerationDefaults,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        max_tokens: int | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stop_token_ids: Sequence[int] | None = None,
        ignore_eos: bool | None = None,
        include_stop_str_in_output: bool | None = None,
        skip_special_tokens: bool | None = None,
    ) -> SamplingParams:
        """Fields of a request over the model's defaults; None (absent or null) means the default.

        The model's own end-of-sequence ids are not copied here: the engine adds them unless `ignore_eos`.

        Raises:
            InvalidRequestError: a value is outside what is allowed.
        """
        return cls(
            temperature=defaults.temperature if temperature is None else temperature,
            top_p=defaults.top_p if top_p is None else top_p,
            top_k=defaults.top_k if top_k is None else top_k,
            max_tokens=defaults.max_new_tokens if max_tokens is None else max_tokens,
            seed=seed,
            stop=(stop,) if isinstance(stop, str) else tuple(_listed("stop", stop)),
            stop_token_ids=tuple(_listed("stop_token_ids", stop_token_ids)),
            ignore_eos=False if ignore_eos is None else ignore_eos,
            include_stop_str_in_output=False if include_stop_str_in_output is None else include_stop_str_in_output,
            skip_special_tokens=True if skip_special_tokens is None else skip_special_tokens,
        )


def _listed(name: str, value: Sequence[T] | None) -> Sequence[T]:
    if value is not None and not isinstance(value, list | tuple):
        _refuse(name, value, "a list")
    return value or ()


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        _refuse(name, value, "a finite number")


def _check_integer(name: str, value: object, low: int, high: int | None, allowed: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        _refuse(name, value, allowed)


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    raise InvalidRequestError(f"{name} must be {allowed}, got {value!r}", param=name)
