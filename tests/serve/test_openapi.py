"""H2, H3: whatever fits the project's own OpenAPI document, or does not, is answered as the document says and never
with a 5xx (schemathesis, against a real HTTP server)."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from raytier.config import Scheduler
from raytier.serve.http import build_api
from tests.serve.echo import MODEL, Served, make_tokenizer

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """URL of a server that runs in a thread of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ready = threading.Event()
    stopping: list[uvicorn.Server] = []

    async def serve() -> None:
        scheduler = Scheduler(max_num_seqs=32, max_num_batched_tokens=64, max_queue=64)
        served = Served(make_tokenizer(), scheduler, 4096, 4096)
        try:
            await served.load()
            config = uvicorn.Config(build_api(served), host="127.0.0.1", port=port, log_level="error", lifespan="off")
            stopping.append(uvicorn.Server(config))
            ready.set()
            await stopping[0].serve()
        finally:
            served.close()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(30)
    while not stopping[0].started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    stopping[0].should_exit = True
    thread.join(30)


def test_every_operation(server: str) -> None:
    document = schemathesis.openapi.from_url(f"{server}/api/openapi.json")
    failures = []
    valid, wrong = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
    statuses: Counter[int] = Counter()
    for operation in (result.ok() for result in document.get_all_operations()):

        @settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck])
        @given(case=operation.as_strategy(valid) | operation.as_strategy(wrong))
        def ask(case: schemathesis.Case) -> None:
            for part in (case.body, case.query):
                if isinstance(part, dict):
                    part.pop("model", None)  # a name made up is a 404, and nothing behind it is asked
            statuses[case.call_and_validate(checks=CHECKS, timeout=30).status_code // 100] += 1

        try:
            ask()
            if operation.path == "/api/models/unload":
                load = httpx.post(f"{server}/api/models/load", json={"model_name_or_path": MODEL})
                assert load.status_code == 202
        except Exception as error:
            failures.append(f"{operation.label}: {error}")
    assert set(statuses) == {2, 4}
    assert not failures, "\n\n".join(failures)
