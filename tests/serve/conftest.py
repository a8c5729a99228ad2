"""An HTTP front over a real engine whose model repeats its prompt."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import pytest
from fastapi import FastAPI
from openai import AsyncOpenAI

from raytier.config import Scheduler
from raytier.engine.tokenizer import Tokenizer
from raytier.serve.http import build_api
from tests.serve.echo import TOOL_TEMPLATE, Served, make_tokenizer

MakeServed = Callable[..., Served]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return make_tokenizer()


@pytest.fixture
def make_served(tokenizer: Tokenizer) -> Iterator[MakeServed]:
    """Applications with other limits, no model loaded; closed after the test."""
    made: list[Served] = []

    def make(
        *,
        max_queue: int = 64,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 64,
        blocks: int = 4096,
        max_context: int = 4096,
        template: str | None = None,
        timeout_s: float | None = None,
    ) -> Served:
        scheduler = Scheduler(
            max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, max_queue=max_queue
        )
        model_tokenizer = tokenizer if template is None else make_tokenizer(template)
        made.append(Served(model_tokenizer, scheduler, blocks, max_context, timeout_s))
        return made[-1]

    yield make
    for served in made:
        served.close()


@pytest.fixture
async def served(make_served: MakeServed) -> Served:
    """An application whose model is loaded."""
    served = make_served()
    await served.load()
    return served


@pytest.fixture
def app(served: Served) -> FastAPI:
    return build_api(served)


@pytest.fixture
async def http(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://raytier", timeout=30) as client:
        yield client


@pytest.fixture
async def client(http: httpx.AsyncClient) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="none", base_url="http://raytier/v1", http_client=http, max_retries=0)


@pytest.fixture
async def tools(make_served: MakeServed) -> AsyncIterator[AsyncOpenAI]:
    """A client of a model that calls tools as Hermes does, and thinks."""
    served = make_served(template=TOOL_TEMPLATE)
    await served.load()
    transport = httpx.ASGITransport(app=build_api(served))
    async with httpx.AsyncClient(transport=transport, base_url="http://raytier", timeout=30) as client:
        yield AsyncOpenAI(api_key="none", base_url="http://raytier/v1", http_client=client, max_retries=0)
