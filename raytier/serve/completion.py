"""From a raw prompt to an engine's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytier.engine.requests import check_prompt
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
    text = request.prompt if isinstance(request.prompt, str) else None
    if text is None:
        token_ids = tuple(request.prompt)
    else:
        token_ids = model.encode(text, "prompt", add_special_tokens=request.add_special_tokens)
    config = model.engine.config
    check_prompt(token_ids, config.vocab_size, config.max_context)
    if not request.echo:
        return Prompt(token_ids, params)
    return Prompt(token_ids, params, echo="".join(map(model.texts.text_of, token_ids)) if text is None else text)
