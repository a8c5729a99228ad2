"""Our answer models against the `openai` package's own types, and what importing the front costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParams
from pydantic import BaseModel

from raytier.engine.outputs import OutputDelta
from raytier.serve.answers import ChatWriter, CompletionWriter
from raytier.serve.fields import IGNORED, UNSUPPORTED_REQUEST
from raytier.serve.generate import GenerateResult
from raytier.serve.schema import Answer, ChatCompletionRequest, CompletionRequest, ModelCard, Usage

RESULT = GenerateResult("hé\u2028", (1, 2), "stop", 3, 2, 0.5)
LAST = OutputDelta("r", 0, "x", (1,), "length", 3, 1)


def conforms(answer: Answer, kind: type[BaseModel]) -> None:
    """`answer` is what the SDK's type means: required fields there, values of their types, no field unknown to it."""
    _all_known(kind.model_validate_json(answer.json_bytes(), strict=True))


def _all_known(value: object) -> None:
    if isinstance(value, BaseModel):
        assert not value.model_extra, f"{type(value).__name__} does not know {value.model_extra}"
        for _, field in value:
            _all_known(field)
    elif isinstance(value, list):
        for item in value:
            _all_known(item)


@pytest.mark.parametrize("include_usage", [False, True])
def test_answers_are_what_the_sdk_knows(include_usage: bool) -> None:
    chat, text = ChatWriter("m", include_usage), CompletionWriter("m", include_usage)
    conforms(chat.whole([RESULT]), ChatCompletion)
    conforms(text.whole([RESULT, RESULT]), Completion)
    for chunk in (*chat.opening(), *chat.chunks(0, LAST), chat.usage(Usage.of(1, 2))):
        conforms(chunk, ChatCompletionChunk)
    conforms(text.usage(Usage.of(1, 2)), Completion)
    conforms(ModelCard(id="m", object="model", created=1, owned_by="raytier"), Model)


def test_nothing_is_written_that_the_client_cannot_see() -> None:
    held_back = OutputDelta("r", 0, "", (5,), None, 3, 1)
    assert ChatWriter("m").chunks(0, held_back) == []
    assert CompletionWriter("m").chunks(0, held_back) == []


@pytest.mark.parametrize(
    ("params", "request_type"), [(ChatParams, ChatCompletionRequest), (TextParams, CompletionRequest)]
)
def test_every_field_of_the_sdk_has_a_decision(params: type, request_type: type[BaseModel]) -> None:
    """A field that OpenAI adds is implemented, ignored or refused by name, never merely unknown."""
    known = set(request_type.model_fields) | set(UNSUPPORTED_REQUEST) | IGNORED
    assert set(params.__annotations__) - known == set()
    assert not set(request_type.model_fields) & (set(UNSUPPORTED_REQUEST) | IGNORED)


def test_the_front_does_not_import_the_sdk() -> None:
    code = "import sys, raytier.serve.http; print([m for m in ('openai', 'torch', 'transformers') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"
