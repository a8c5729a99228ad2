"""A model that repeats its prompt, a backend over real engines, and a client that can go away."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backing

from raytier.checkpoint.manifest import GenerationDefaults, TokenizerSpec
from raytier.config import Scheduler
from raytier.engine.engine import Engine, EngineConfig
from raytier.engine.outputs import EngineStats
from raytier.engine.step import StepBatch, StepResult
from raytier.engine.tokenizer import Tokenizer
from raytier.errors import EngineDeadError, ModelNotFoundError
from raytier.kv.block_pool import BlockPool

MODEL = "org/echo"
END = "<|end|>"
TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('a user has to speak first') }}{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if shout %}!{% endif %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = ["The quick brown fox jumps over the lazy dog.", "Grüße aus Köln, 東京 and 🙂 everywhere.", "one two three four"]


def make_tokenizer() -> Tokenizer:
    """Byte-level BPE over a few sentences, trained here."""
    backing = Backing(models.BPE())
    backing.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backing.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backing.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    special = [END, "<|system|>", "<|user|>", "<|assistant|>"]
    backing.add_special_tokens([AddedToken(name, special=True) for name in special])
    end = backing.token_to_id(END)
    return Tokenizer(TokenizerSpec(backing.to_str(), TEMPLATE, {"eos_token": END}, None, (end,), False))


class Echo:
    """Executor whose model repeats the prompt and then ends.

    Attributes:
        gate: steps wait here while it is cleared.
        before_step: step number (from 1) -> called when that step begins; may close the gate or raise.
    """

    def __init__(self, end: int) -> None:
        self._end = end
        self._tokens: dict[int, list[int]] = {}
        self._prompt_len: dict[int, int] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.before_step: dict[int, Callable[[], object]] = {}
        self.steps = 0

    def step(self, batch: StepBatch) -> StepResult:
        self.steps += 1
        self.before_step.get(self.steps, lambda: None)()
        assert self.gate.wait(30), "the test left the gate closed"
        drawn: dict[int, int] = {}
        for chunk in batch.chunks:
            known = self._tokens.setdefault(chunk.seq_id, [])
            known[chunk.start :] = chunk.token_ids
            if chunk.sample is None:
                continue
            length = self._prompt_len.setdefault(chunk.seq_id, len(known))
            position = chunk.sample.position
            drawn[chunk.seq_id] = known[position] if position < length else self._end
        return StepResult(batch.step, drawn)


def die() -> None:
    """What an executor does when its actor is gone."""
    raise EngineDeadError("the device actor died (OOM)")


class Served:
    """One engine as a `Backend`."""

    created = 1_700_000_000

    def __init__(self, tokenizer: Tokenizer, scheduler: Scheduler, blocks: int, max_context: int) -> None:
        self.executor = Echo(tokenizer.spec.eos_token_ids[0])
        self.pool = BlockPool(4)
        self.pool.add_extent(1, blocks)
        defaults = GenerationDefaults(temperature=0.0, stop_token_ids=tokenizer.spec.eos_token_ids)
        config = EngineConfig(scheduler, scheduler.max_num_batched_tokens, max_context, tokenizer.vocab_size)
        self.only = Engine(MODEL, self.executor, tokenizer, self.pool, defaults, config)
        self.reason: str | None = None

    def model_ids(self) -> list[str]:
        return [MODEL]

    def engine(self, model_id: str | None) -> Engine:
        if model_id not in (None, MODEL):
            raise ModelNotFoundError(f"model {model_id!r} is not served here; served are: {MODEL}")
        return self.only

    def health(self) -> str | None:
        return self.reason

    async def until(self, condition: Callable[[EngineStats], object]) -> None:
        """Wait for something in the engine's statistics; its thread sets no event of asyncio's."""

        async def met() -> None:
            while not condition(self.only.stats()):  # noqa: ASYNC110
                await asyncio.sleep(0.005)

        await asyncio.wait_for(met(), 10)

    async def idle(self) -> None:
        """Wait until the engine holds nothing."""
        await self.until(lambda stats: not (stats.running or stats.waiting or stats.kv_blocks_used))

    def close(self) -> None:
        self.executor.gate.set()
        self.only.close()


class Exchange:
    """One request straight over ASGI, as Ray Serve makes it: a task that is cancelled when the client goes away."""

    def __init__(
        self,
        app: FastAPI,
        path: str,
        body: Any,
        spec_version: str = "2.3",
        on_send: Callable[[dict[str, Any]], Awaitable[None]] | None = None,
    ) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec_version},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 8000),
        }
        self._request = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
        self._gone = asyncio.Event()
        self._on_send = on_send
        self._arrived = asyncio.Condition()
        self.sent: list[dict[str, Any]] = []
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))  # type: ignore[arg-type]

    async def _receive(self) -> dict[str, Any]:
        if self._request:
            return self._request.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(dict(message))
        async with self._arrived:
            self._arrived.notify_all()
        if self._on_send is not None:
            await self._on_send(message)

    def hang_up(self) -> None:
        """The server tells the application that the client has gone."""
        self._gone.set()

    @property
    def status(self) -> int | None:
        return next((m["status"] for m in self.sent if m["type"] == "http.response.start"), None)

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something in what was sent."""

        async def met() -> None:
            async with self._arrived:
                await self._arrived.wait_for(condition)

        await asyncio.wait_for(met(), 10)


def events(body: bytes) -> list[Any]:
    """The events of a stream, checked for exact framing; `[DONE]` stays a string."""
    assert body.endswith(b"\n\n")
    parsed: list[Any] = []
    for frame in body[:-2].split(b"\n\n"):
        assert frame.startswith(b"data: ")
        assert b"\n" not in frame
        data = frame[6:]
        parsed.append("[DONE]" if data == b"[DONE]" else json.loads(data))
    return parsed
