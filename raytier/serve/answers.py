"""OpenAI's answer objects out of deltas and results: one writer per route, whole and streamed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from raytier.engine.outputs import OutputDelta
from raytier.serve.generate import FinishReason, GenerateResult, Generation, finish_reason
from raytier.serve.schema import (
    Answer,
    AssistantMessage,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChunkChoice,
    Completion,
    Delta,
    TextChoice,
    Usage,
)
from raytier.serve.sse import event


class Writer(Protocol):
    """What one route writes."""

    def whole(self, results: Sequence[GenerateResult]) -> Answer:
        """The answer without streaming: one choice per result."""
        ...

    def opening(self) -> list[Answer]:
        """Events before the first token."""
        ...

    def chunks(self, index: int, delta: OutputDelta) -> list[Answer]:
        """Events of a delta of choice `index`; none when it changes nothing that the client sees."""
        ...

    def usage(self, usage: Usage) -> Answer:
        """The last event of a stream whose client asked for the usage."""
        ...


class ChatWriter:
    """/v1/chat/completions."""

    def __init__(self, model: str, include_usage: bool = False) -> None:
        self._head = _head("chatcmpl", model)
        # With include_usage every chunk carries the field, null until the last one.
        self._tail: dict[str, Any] = {"usage": None} if include_usage else {}

    def whole(self, results: Sequence[GenerateResult]) -> ChatCompletion:
        choices = [
            ChatChoice(
                index=index,
                message=AssistantMessage(role="assistant", content=result.text, refusal=None),
                logprobs=None,
                finish_reason=result.finish_reason,
            )
            for index, result in enumerate(results)
        ]
        return ChatCompletion(object="chat.completion", choices=choices, usage=_total(results), **self._head)

    def opening(self) -> list[Answer]:
        return [self._chunk(0, Delta(role="assistant", content=""), None)]

    def chunks(self, index: int, delta: OutputDelta) -> list[Answer]:
        chunks: list[Answer] = []
        if delta.text:
            chunks.append(self._chunk(index, Delta(content=delta.text), None))
        if delta.finish_reason is not None:
            chunks.append(self._chunk(index, Delta(), finish_reason(delta)))
        return chunks

    def usage(self, usage: Usage) -> ChatCompletionChunk:
        return ChatCompletionChunk(object="chat.completion.chunk", choices=[], usage=usage, **self._head)

    def _chunk(self, index: int, delta: Delta, reason: FinishReason | None) -> ChatCompletionChunk:
        choice = ChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=reason)
        return ChatCompletionChunk(object="chat.completion.chunk", choices=[choice], **self._head, **self._tail)


class CompletionWriter:
    """/v1/completions."""

    def __init__(self, model: str, include_usage: bool = False) -> None:
        self._head = _head("cmpl", model)
        self._tail: dict[str, Any] = {"usage": None} if include_usage else {}

    def whole(self, results: Sequence[GenerateResult]) -> Completion:
        choices = [
            TextChoice(index=i, text=r.text, logprobs=None, finish_reason=r.finish_reason)
            for i, r in enumerate(results)
        ]
        return Completion(object="text_completion", choices=choices, usage=_total(results), **self._head)

    def opening(self) -> list[Answer]:
        return []

    def chunks(self, index: int, delta: OutputDelta) -> list[Answer]:
        if not delta.text and delta.finish_reason is None:
            return []
        reason = None if delta.finish_reason is None else finish_reason(delta)
        choice = TextChoice(index=index, text=delta.text, logprobs=None, finish_reason=reason)
        return [Completion(object="text_completion", choices=[choice], **self._head, **self._tail)]

    def usage(self, usage: Usage) -> Completion:
        return Completion(object="text_completion", choices=[], usage=usage, **self._head)


async def stream_events(generation: Generation, writer: Writer, include_usage: bool) -> AsyncIterator[bytes]:
    """The events of a generation, the usage last; `[DONE]` is the transport's."""
    for answer in writer.opening():
        yield event(answer)
    tokens: dict[int, tuple[int, int]] = {}
    async for index, delta in generation:
        tokens[index] = (delta.prompt_tokens, delta.completion_tokens)
        chunks = writer.chunks(index, delta)
        if chunks:
            yield b"".join(map(event, chunks))
    if include_usage:
        yield event(writer.usage(Usage.of(*map(sum, zip(*tokens.values(), strict=True)))))


def _head(prefix: str, model: str) -> dict[str, Any]:
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}


def _total(results: Sequence[GenerateResult]) -> Usage:
    return Usage.of(sum(r.prompt_tokens for r in results), sum(r.completion_tokens for r in results))
