"""G3, G4: tools that a chat names, and where its answer is taken apart."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from raytier.serve.answers import ChatWriter, CompletionWriter
from tests.serve.echo import MODEL

ADD: Any = {"type": "function", "function": {"name": "add"}}
DOG: Any = [{"role": "user", "content": "dog"}]


async def test_whole_answers_are_taken_apart_in_a_thread(
    tools: AsyncOpenAI, http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsers read every character, which no other stream should wait for."""
    where: list[threading.Thread] = []
    for writer in (ChatWriter, CompletionWriter):
        monkeypatch.setattr(writer, "whole", _noted(writer.whole, where))
    await tools.chat.completions.create(model=MODEL, messages=DOG, tools=[ADD])
    await http.post("/v1/completions", json={"prompt": "dog"})
    assert len(where) == 2
    assert threading.main_thread() not in where


def _noted(whole: Callable[..., Any], where: list[threading.Thread]) -> Callable[..., Any]:
    def write(*given: Any) -> Any:
        where.append(threading.current_thread())
        return whole(*given)

    return write


@pytest.mark.parametrize("parameters", [{"$defs": []}, {"$defs": "x"}], ids=str)
async def test_definitions_of_tools_are_checked(tools: AsyncOpenAI, parameters: dict[str, Any]) -> None:
    tool: Any = {"type": "function", "function": {"name": "add", "parameters": parameters}}
    with pytest.raises(openai.BadRequestError, match="defs of add"):
        await tools.chat.completions.create(model=MODEL, messages=DOG, tools=[tool], tool_choice="required")
