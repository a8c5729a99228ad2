"""From a raw prompt to an engine's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytier.engine.sampling_params import SamplingParams
from raytier.serve.generate import Prompt
from raytier.serve.served import ServedModel


@dataclass(frozen=True, slots=True)
class TextInput:
    """A raw prompt to continue: a text, or token ids.

    Attributes:
        sampling: fields of `SamplingParams`; absent ones take the model's defaults.
        echo: begin the answer with the prompt.
        add_special_tokens: those of the tokenizer; None = as the model's files say.
    """

    prompt: str | Sequence[int]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    echo: bool = False
    add_special_tokens: bool | None = None


def prepare_text(model: ServedModel, request: TextInput) -> Prompt:
    """Tokenize. Takes milliseconds, so not on an event loop.

    Raises:
        InvalidRequestError: a sampling value is wrong, or it is no text that fits.
    """
    params = SamplingParams.from_request(model.engine.defaults, **request.sampling)
    model.engine.check(params)  # a new grammar is compiled here, and not on the event loop
    if isinstance(request.prompt, str):
        token_ids = model.encode(request.prompt, "prompt", add_special_tokens=request.add_special_tokens)
        return Prompt(token_ids, params, echo=request.prompt if request.echo else None)
    echo = "".join(map(model.texts.text_of, request.prompt)) if request.echo else None
    return Prompt(tuple(request.prompt), params, echo=echo)
