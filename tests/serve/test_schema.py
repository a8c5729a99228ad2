"""Our answer models against the `openai` package's own types, and what importing the front costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParams

from raytier.engine.sampling_params import FIELDS
from raytier.serve.body import Body
from raytier.serve.requests import ChatCompletionRequest, CompletionRequest


@pytest.mark.parametrize(
    ("params", "request_type"), [(ChatParams, ChatCompletionRequest), (TextParams, CompletionRequest)]
)
def test_every_field_of_the_sdk_has_a_decision(params: type, request_type: type[Body]) -> None:
    """A field that OpenAI adds is implemented, ignored or refused by name, never merely unknown."""
    known = set(request_type.model_fields) | set(request_type.unsupported) | request_type.ignored
    assert set(params.__annotations__) - known == set()
    assert not set(request_type.model_fields) & (set(request_type.unsupported) | request_type.ignored)


@pytest.mark.parametrize("request_type", [ChatCompletionRequest, CompletionRequest])
def test_every_sampling_field_can_be_given(request_type: type[Body]) -> None:
    assert set(FIELDS) - set(request_type.model_fields) == set()


def test_the_front_does_not_import_the_sdk() -> None:
    names = ("openai", "torch", "transformers", "httpx")
    code = f"import sys, raytier.serve.server; print([m for m in {names} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"
