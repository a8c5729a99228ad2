"""What deployment handles call: generation with the same semantics as HTTP, in Python's types."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from raytier.engine.outputs import OutputDelta
from raytier.serve.chat import ChatInput, prepare_chat
from raytier.serve.completion import TextInput, prepare_text
from raytier.serve.generate import FinishReason, Generation, Output, Prompt, finish_reason, in_thread, parts_of
from raytier.serve.parsers.answer import Message
from raytier.serve.parsers.parts import Part
from raytier.serve.served import ServedModel


@dataclass(frozen=True, slots=True)
class GenerateResult:
    """A finished generation.

    Attributes:
        outputs: its samples, `n` of them.
        messages: the same taken apart into content, thoughts and calls of tools.
        prompt_tokens, cached_tokens: of the prompt, and those whose KV was found.
        completion_tokens: of all samples.
        seconds: wall clock from submission to the last token.
    """

    outputs: tuple[Output, ...]
    messages: tuple[Message, ...]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    seconds: float

    @property
    def text(self) -> str:
        """Of the first sample, as the model wrote it."""
        return self.outputs[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the first sample."""
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> FinishReason:
        """Of the first sample."""
        return self.outputs[0].finish_reason

    @property
    def message(self) -> Message:
        """Of the first sample."""
        return self.messages[0]


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """New output of one sample of a chat.

    Attributes:
        index: sample, 0 to n - 1.
        text: as the model wrote it.
        parts: what is certain of the answer's content, thoughts and calls of tools.
        delta: the engine's own: tokens, log-probabilities, how it ended.
    """

    index: int
    text: str
    parts: tuple[Part, ...]
    delta: OutputDelta


async def generate(model: ServedModel, prompt: str | Sequence[int], **sampling: Any) -> GenerateResult:
    """Continue a raw prompt to its end.

    Raises:
        InvalidRequestError, QueueFullError, EngineDeadError: as over HTTP.
    """
    [prepared] = await in_thread(prepare_text, model, TextInput([prompt], sampling))
    return await _whole(model, prepared)


async def generate_stream(
    model: ServedModel, prompt: str | Sequence[int], **sampling: Any
) -> AsyncGenerator[OutputDelta, None]:
    """The same, delta by delta. Closing the generator aborts.

    Raises:
        RequestTimeoutError, EngineDeadError: instead of the last delta of a sample that has not come to its end.
    """
    generation = await Generation.start(model, await in_thread(prepare_text, model, TextInput([prompt], sampling)))
    try:
        async for _, delta in generation:
            if delta.finish_reason is not None:
                finish_reason(delta)
            yield delta
    finally:
        await generation.aclose()


async def chat(model: ServedModel, messages: Sequence[Mapping[str, Any]], **options: Any) -> GenerateResult:
    """Answer a conversation; raises as `generate`."""
    return await _whole(model, await in_thread(prepare_chat, model, _chat_input(messages, options)))


async def chat_stream(
    model: ServedModel, messages: Sequence[Mapping[str, Any]], **options: Any
) -> AsyncGenerator[ChatDelta, None]:
    """The same, delta by delta; raises as `generate_stream`. Closing the generator aborts."""
    prompt = await in_thread(prepare_chat, model, _chat_input(messages, options))
    parsers = [prompt.new_parser() for _ in range(prompt.params.n)]
    generation = await Generation.start(model, [prompt])
    try:
        async for choice, delta in generation:
            if delta.finish_reason is not None:
                finish_reason(delta)
            yield ChatDelta(choice, delta.text, parts_of(parsers[choice], delta), delta)
    finally:
        await generation.aclose()


#: Fields of `ChatInput` that a call gives by name; all others are sampling's.
_OPTIONS = frozenset(each.name for each in fields(ChatInput)) - {"messages", "sampling"}


def _chat_input(messages: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> ChatInput:
    own = {name: value for name, value in options.items() if name in _OPTIONS}
    sampling = {name: value for name, value in options.items() if name not in _OPTIONS}
    return ChatInput(messages, sampling, **own)


async def _whole(model: ServedModel, prompt: Prompt) -> GenerateResult:
    began = time.monotonic()
    generation = await Generation.start(model, [prompt])
    try:
        outputs = await generation.outputs()
    finally:
        await generation.aclose()
    tally = generation.tally
    messages = await asyncio.to_thread(lambda: [Message.of(output.text, prompt.new_parser()) for output in outputs])
    return GenerateResult(
        outputs=tuple(outputs),
        messages=tuple(messages),
        prompt_tokens=tally.prompt_tokens,
        cached_tokens=tally.cached_tokens,
        completion_tokens=tally.completion_tokens,
        seconds=time.monotonic() - began,
    )
