"""From a raw prompt to an engine's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raytier.engine.requests import CheckedParams, check_prompt
from raytier.engine.sampling_params import SamplingParams
from raytier.serve.generate import Prompt, check_number
from raytier.serve.served import ServedModel


@dataclass(frozen=True, slots=True)
class TextInput:
    """Raw prompts to continue: texts, or token ids.

    Attributes:
        sampling: fields of `SamplingParams`; absent ones take the model's defaults.
        echo: begin the answer with the prompt.
        add_special_tokens: those of the tokenizer; None = as the model's files say.
    """

    prompts: Sequence[str | Sequence[int]]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    echo: bool = False
    add_special_tokens: bool | None = None

    @property
    def has_grammar(self) -> bool:
        """Whether something may have to be compiled for it."""
        return self.sampling.get("structured_outputs") is not None


def prepare_text(model: ServedModel, request: TextInput) -> list[Prompt]:
    """Tokenize. Takes milliseconds, and more where a grammar is new, so not on an event loop.

    Raises:
        InvalidRequestError: a sampling value is wrong, a prompt is none that fits, or there are too many.
    """
    checked = model.engine.check(SamplingParams.from_request(model.engine.defaults, **request.sampling))
    check_number(model, len(request.prompts), checked.params.n)
    return [_prompt(model, each, request, checked) for each in request.prompts]


def _prompt(model: ServedModel, given: str | Sequence[int], request: TextInput, checked: CheckedParams) -> Prompt:
    if isinstance(given, str):
        token_ids = model.encode(given, "prompt", add_special_tokens=request.add_special_tokens)
    else:
        token_ids = tuple(given)
    config = model.engine.config
    check_prompt(token_ids, config.vocab_size, config.max_context)
    if not request.echo:
        return Prompt(token_ids, checked)
    text = given if isinstance(given, str) else "".join(map(model.texts.text_of, token_ids))
    return Prompt(token_ids, checked, echo=text)
