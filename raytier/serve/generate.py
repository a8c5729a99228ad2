"""From a request to an engine and back, the same for HTTP and for deployment handles.

A `Prompt` is what an engine takes; a `Generation` is one or more of them under way.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

from raytier.engine.engine import Engine
from raytier.engine.outputs import OutputDelta, merge
from raytier.engine.sampling_params import SamplingParams
from raytier.errors import EngineDeadError, InvalidRequestError

FinishReason = Literal["stop", "length"]

#: What a request may say about sampling, in any way of calling.
SAMPLING_FIELDS = tuple(each.name for each in fields(SamplingParams))

# Variables of the template that are fields of the request themselves.
_TEMPLATE_ARGUMENTS = frozenset({"self", "messages", "add_generation_prompt"})


@dataclass(frozen=True, slots=True)
class ChatInput:
    """A conversation to continue.

    Attributes:
        messages: `{"role": ..., "content": text}`, in order; `developer` is taken as `system`.
        sampling: fields of `SamplingParams`; absent ones take the model's defaults.
        add_generation_prompt: end the prompt with the header of an assistant's turn.
        template_kwargs: further variables of the model's chat template.
    """

    messages: Sequence[Mapping[str, str]]
    sampling: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TextInput:
    """A raw prompt to continue: a text, or token ids. `sampling` as in `ChatInput`."""

    prompt: str | Sequence[int]
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids and sampling parameters, ready for an engine."""

    token_ids: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A finished generation. `seconds` is wall clock from submission to the last token."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    seconds: float


async def prepare(engine: Engine, requests: Sequence[ChatInput | TextInput]) -> list[Prompt]:
    """Apply template and tokenizer, off the event loop: a long prompt takes tens of milliseconds.

    Raises:
        InvalidRequestError: a sampling value is wrong, the template refuses the messages, or there are more
            prompts than the queue ever holds.
    """
    most = engine.config.scheduler.max_queue
    if len(requests) > most:
        raise InvalidRequestError(
            f"{len(requests)} prompts in one request; at most {most} (scheduler.max_queue): split it", param="prompt"
        )
    return await asyncio.to_thread(lambda: [_prepare(engine, request) for request in requests])


def _prepare(engine: Engine, request: ChatInput | TextInput) -> Prompt:
    unknown = [name for name in request.sampling if name not in SAMPLING_FIELDS]
    if unknown:
        raise InvalidRequestError(
            f"unknown sampling field {unknown[0]!r}; known: {', '.join(SAMPLING_FIELDS)}", param=unknown[0]
        )
    params = SamplingParams.from_request(engine.defaults, **request.sampling)
    if isinstance(request, ChatInput):
        # The rendered template holds its special tokens already.
        return Prompt(tuple(engine.tokenizer.encode(_render(engine, request), add_special_tokens=False)), params)
    if isinstance(request.prompt, str):
        return Prompt(tuple(engine.tokenizer.encode(_encodable(request.prompt, "prompt"))), params)
    return Prompt(tuple(request.prompt), params)


def _render(engine: Engine, chat: ChatInput) -> str:
    taken = _TEMPLATE_ARGUMENTS & chat.template_kwargs.keys()
    if taken:
        raise InvalidRequestError(
            f"chat_template_kwargs cannot set {', '.join(sorted(taken))}; use the field of the request",
            param="chat_template_kwargs",
        )
    messages = [{**m, "role": "system"} if m.get("role") == "developer" else m for m in chat.messages]
    text = engine.tokenizer.apply_chat_template(messages, chat.add_generation_prompt, **chat.template_kwargs)
    return _encodable(text, "messages")


def _encodable(text: str, param: str) -> str:
    """`text`, refused where it holds half of a surrogate pair, which tokenizers cannot take."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{param} holds a lone surrogate (U+{ord(text[error.start]):04X}), which is no character", param=param
        ) from None
    return text


async def generate(engine: Engine, prompt: str | Sequence[int], **sampling: Any) -> GenerateResult:
    """Continue a raw prompt to its end.

    Raises:
        InvalidRequestError, QueueFullError, EngineDeadError: as over HTTP.
    """
    return await _whole(engine, TextInput(prompt, sampling))


def generate_stream(engine: Engine, prompt: str | Sequence[int], **sampling: Any) -> AsyncGenerator[OutputDelta, None]:
    """The same, delta by delta. Closing the generator aborts."""
    return _stream(engine, TextInput(prompt, sampling))


async def chat(engine: Engine, messages: Sequence[Mapping[str, str]], **sampling: Any) -> GenerateResult:
    """Answer a conversation; raises as `generate`."""
    return await _whole(engine, ChatInput(messages, sampling))


def chat_stream(
    engine: Engine, messages: Sequence[Mapping[str, str]], **sampling: Any
) -> AsyncGenerator[OutputDelta, None]:
    """The same, delta by delta. Closing the generator aborts."""
    return _stream(engine, ChatInput(messages, sampling))


async def _whole(engine: Engine, request: ChatInput | TextInput) -> GenerateResult:
    generation = await Generation.start(engine, await prepare(engine, [request]))
    try:
        return (await generation.results())[0]
    finally:
        await generation.aclose()


async def _stream(engine: Engine, request: ChatInput | TextInput) -> AsyncGenerator[OutputDelta, None]:
    generation = await Generation.start(engine, await prepare(engine, [request]))
    try:
        async for _, delta in generation:
            yield delta
    finally:
        await generation.aclose()


class Generation:
    """Prompts under way in an engine; iterate once for `(index of the prompt, delta)` as they come.

    Invariant: after `aclose` the engine holds nothing of them. Whoever starts one closes it.
    """

    def __init__(self, engine: Engine, prompts: Sequence[Prompt]) -> None:
        # A generator by contract: closing it aborts.
        self._streams = [
            cast("AsyncGenerator[OutputDelta, None]", engine.stream(prompt.token_ids, prompt.params))
            for prompt in prompts
        ]
        self._first = [asyncio.ensure_future(anext(stream)) for stream in self._streams]
        self._pumps: list[asyncio.Task[None]] = []
        self._started = time.monotonic()

    @classmethod
    async def start(cls, engine: Engine, prompts: Sequence[Prompt]) -> Generation:
        """Submit all of `prompts`, or none. Returns when they are admitted, before their first tokens.

        Raises:
            InvalidRequestError: a prompt can never be served.
            QueueFullError: there is no room for all of them.
            EngineDeadError: the engine is gone.
        """
        generation = cls(engine, prompts)
        try:
            # A stream submits at its first `anext`, before it waits for anything: after one turn of the
            # loop each of them is admitted, or refused with its exception here.
            await asyncio.sleep(0)
            for first in generation._first:
                if first.done():
                    first.result()
        except BaseException:
            await generation.aclose()
            raise
        return generation

    async def aclose(self) -> None:
        """Abort what has not finished, even when this call is cancelled too. May be called again."""
        await asyncio.shield(asyncio.ensure_future(self._close()))

    async def _close(self) -> None:
        tasks = [*self._pumps, *self._first]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in self._streams:
            await stream.aclose()

    async def __aiter__(self) -> AsyncIterator[tuple[int, OutputDelta]]:
        if len(self._streams) == 1:
            async for delta in self._deltas(0):
                yield 0, delta
            return
        # Bounded: while the reader is slow, the engine goes on merging deltas.
        queue: asyncio.Queue[tuple[int, OutputDelta] | Exception | None] = asyncio.Queue(len(self._streams))
        self._pumps = [asyncio.ensure_future(self._pump(index, queue)) for index in range(len(self._streams))]
        running = len(self._pumps)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item

    async def results(self) -> list[GenerateResult]:
        """Wait for the end; one result per prompt, in order.

        Raises:
            EngineDeadError: the engine died or was closed on the way.
        """
        deltas: list[list[OutputDelta]] = [[] for _ in self._streams]
        seconds = [0.0 for _ in self._streams]
        async for index, delta in self:
            deltas[index].append(delta)
            seconds[index] = time.monotonic() - self._started
        merged = [merge(each) for each in deltas]
        return [
            GenerateResult(
                text=delta.text,
                token_ids=delta.token_ids,
                finish_reason=finish_reason(delta),
                prompt_tokens=delta.prompt_tokens,
                completion_tokens=delta.completion_tokens,
                seconds=took,
            )
            for delta, took in zip(merged, seconds, strict=True)
        ]

    async def _deltas(self, index: int) -> AsyncIterator[OutputDelta]:
        yield await self._first[index]
        async for delta in self._streams[index]:
            yield delta

    async def _pump(self, index: int, queue: asyncio.Queue[tuple[int, OutputDelta] | Exception | None]) -> None:
        try:
            async for delta in self._deltas(index):
                await queue.put((index, delta))
        except Exception as error:
            await queue.put(error)
        else:
            await queue.put(None)


def finish_reason(delta: OutputDelta) -> FinishReason:
    """How a finished delta ended, in OpenAI's words.

    Raises:
        EngineDeadError: the engine ended it, so what there is of the text is not an answer.
    """
    if delta.finish_reason == "stop":
        return "stop"
    if delta.finish_reason == "length":
        return "length"
    raise EngineDeadError("the engine was closed before the request had ended; send it again")
