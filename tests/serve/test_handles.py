"""H3: what deployment handles call ends and refuses as HTTP does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from raytier.errors import EngineDeadError, InvalidRequestError, RequestTimeoutError
from raytier.serve.handles import chat, chat_stream, generate_stream
from tests.serve.conftest import MakeServed
from tests.serve.echo import TOOL_TEMPLATE, Served

LONG = "one two three four " * 20


async def test_from_python_too_half_a_stream_is_not_a_whole_one(make_served: MakeServed) -> None:
    served = make_served(timeout_s=0.2)
    await served.load()
    model = await served.model(None)
    for make in (generate_stream(model, LONG), chat_stream(model, user(LONG))):
        stream: Any = make
        served.executor.before_step[served.executor.steps + 6] = served.executor.gate.clear
        opened = asyncio.get_running_loop().call_later(0.4, served.executor.gate.set)
        with pytest.raises(RequestTimeoutError, match="request_timeout_s"):
            assert [delta.index async for delta in stream]
        opened.cancel()
        served.executor.gate.set()
        await served.idle()


async def test_from_python_too_a_closed_engine_is_an_error(served: Served) -> None:
    model = await served.model(None)
    served.executor.before_step[6] = served.only.close
    with pytest.raises(EngineDeadError, match="closed"):
        assert [delta.text async for delta in generate_stream(model, LONG)]


async def test_parameters_of_tools_are_checked_for_handles(make_served: MakeServed) -> None:
    served = make_served(template=TOOL_TEMPLATE)
    await served.load()
    tool = {"type": "function", "function": {"name": "add", "parameters": "x"}}
    with pytest.raises(InvalidRequestError, match="tools\\[0\\].function.parameters"):
        await chat(await served.model(None), user("dog"), tools=[tool], tool_choice="required")


def user(content: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]
