"""OpenAI's answer objects out of deltas and outputs: one writer per route, whole and streamed."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from raytier.engine.outputs import OutputDelta
from raytier.engine.step import TokenLogprobs
from raytier.serve.generate import Generation, Output, Prompt, finish_reason, parts_of
from raytier.serve.logprobs import TokenTexts, chat_logprobs, prompt_logprobs, text_logprobs
from raytier.serve.parsers.answer import AnswerParser, Message
from raytier.serve.parsers.parts import CallArguments, CallBegun, Content, Part, Reasoning
from raytier.serve.schema import (
    Answer,
    AssistantMessage,
    CalledFunction,
    ChatChoice,
    ChatCompletion,
    Completion,
    FinishReason,
    TextChoice,
    ToolCall,
    Usage,
)
from raytier.serve.text import on_one_line


class Writer(Protocol):
    """What one route writes about one generation."""

    def whole(self, outputs: Sequence[Output]) -> Answer:
        """The answer without streaming: one choice per output."""
        ...

    def opening(self) -> bytes:
        """Events before the first token."""
        ...

    def events(self, choice: int, delta: OutputDelta) -> bytes:
        """Events of a delta of a choice; empty when it changes nothing that the client sees."""
        ...

    def usage(self) -> bytes:
        """The last event of a stream whose client asked for the usage."""
        ...


async def stream_events(generation: Generation, writer: Writer, include_usage: bool) -> AsyncIterator[bytes]:
    """The events of a generation, the usage last; `[DONE]` is the transport's."""
    if opening := writer.opening():
        yield opening
    async for choice, delta in generation:
        if events := writer.events(choice, delta):
            yield events
    if include_usage:
        yield writer.usage()


class _Stream:
    """The events of one answer: all begin and end alike."""

    def __init__(self, prefix: str, kind: str, generation: Generation, include_usage: bool) -> None:
        self.head: dict[str, Any] = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": generation.model.engine.model_id,
        }
        self._tally = generation.tally
        # With include_usage every event carries the field, null until the last one.
        self._begin = json.dumps({**self.head, "object": kind}, separators=(",", ":"), ensure_ascii=False)[:-1]
        self._end = ',"usage":null}\n\n' if include_usage else "}\n\n"

    def choice(self, choice: dict[str, Any]) -> bytes:
        """An event with one choice."""
        text = json.dumps(choice, separators=(",", ":"), ensure_ascii=False)
        return on_one_line(f'data: {self._begin},"choices":[{text}]{self._end}').encode()

    def usage(self) -> bytes:
        usage = Usage.of(self._tally).model_dump_json()
        return f'data: {self._begin},"choices":[],"usage":{usage}}}\n\n'.encode()


class _ChoiceOfAStream:
    """What is kept of a choice between its events."""

    def __init__(self, parser: AnswerParser | None) -> None:
        self.parser = parser
        self.calls = 0
        self.begun = False
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.text = ""
        self.text_length = 0
        self.finish_reason: FinishReason | None = None

    def parts(self, delta: OutputDelta) -> tuple[Part, ...]:
        """What the delta adds to the answer."""
        parts = parts_of(self.parser, delta)
        self.calls += sum(isinstance(part, CallBegun) for part in parts)
        return parts


class ChatWriter:
    """/v1/chat/completions."""

    def __init__(self, generation: Generation, include_usage: bool = False) -> None:
        self._generation = generation
        self._stream = _Stream("chatcmpl", "chat.completion.chunk", generation, include_usage)
        self._choices = [
            _ChoiceOfAStream(generation.prompt_of(choice).new_parser()) for choice in range(generation.num_choices)
        ]

    def whole(self, outputs: Sequence[Output]) -> ChatCompletion:
        choices = [
            _chat_choice(index, output, self._generation.prompt_of(index), self._generation.model.texts)
            for index, output in enumerate(outputs)
        ]
        extra: dict[str, Any] = {}
        if outputs[0].prompt_logprobs is not None:
            extra["prompt_logprobs"] = prompt_logprobs(outputs[0].prompt_logprobs, self._generation.model.texts)
        return ChatCompletion(
            object="chat.completion",
            choices=choices,
            usage=Usage.of(self._generation.tally),
            **self._stream.head,
            **extra,
        )

    def opening(self) -> bytes:
        first = {"role": "assistant", "content": ""}
        return b"".join(self._event(index, first) for index in range(len(self._choices)))

    def events(self, choice: int, delta: OutputDelta) -> bytes:
        state = self._choices[choice]
        state.logprobs += delta.logprobs
        events = []
        parts = state.parts(delta)
        for number, part in enumerate(parts):
            logprobs = self._logprobs(choice) if number == len(parts) - 1 else None
            events.append(self._event(choice, _delta(part), logprobs=logprobs))
        if delta.finish_reason is not None:
            reason: FinishReason = finish_reason(delta)
            reason = "tool_calls" if reason == "stop" and state.calls else reason
            events.append(self._event(choice, {}, reason, self._logprobs(choice) if state.logprobs else None))
        return b"".join(events)

    def usage(self) -> bytes:
        return self._stream.usage()

    def _logprobs(self, choice: int) -> dict[str, Any] | None:
        """Those of the tokens since the last event; they wait while text is held back."""
        params = self._generation.prompt_of(choice).params
        if params.logprobs is None:
            return None
        state = self._choices[choice]
        tokens, state.logprobs = state.logprobs, []
        return chat_logprobs(tokens, self._generation.model.texts, params.logprobs)

    def _event(
        self, choice: int, delta: dict[str, Any], reason: FinishReason | None = None, logprobs: Any = None
    ) -> bytes:
        return self._stream.choice({"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": reason})


def _delta(part: Part) -> dict[str, Any]:
    match part:
        case Content(text):
            return {"content": text}
        case Reasoning(text):
            return {"reasoning_content": text}
        case CallBegun(index, identity, name):
            function = {"name": name, "arguments": ""}
            return {"tool_calls": [{"index": index, "id": identity, "type": "function", "function": function}]}
        case CallArguments(index, text):
            return {"tool_calls": [{"index": index, "function": {"arguments": text}}]}


def _chat_choice(index: int, output: Output, prompt: Prompt, texts: TokenTexts) -> ChatChoice:
    message = Message.of(output.text, prompt.new_parser())
    fields: dict[str, Any] = {"role": "assistant", "content": message.content, "refusal": None}
    if message.reasoning is not None:
        fields["reasoning_content"] = message.reasoning
    if message.calls:
        fields["tool_calls"] = [
            ToolCall(id=call.id, type="function", function=CalledFunction(name=call.name, arguments=call.arguments))
            for call in message.calls
        ]
    wanted = prompt.params.logprobs
    return ChatChoice(
        index=index,
        message=AssistantMessage(**fields),
        logprobs=None if wanted is None else chat_logprobs(output.logprobs, texts, wanted),
        finish_reason="tool_calls" if message.calls and output.finish_reason == "stop" else output.finish_reason,
    )


class CompletionWriter:
    """/v1/completions."""

    def __init__(self, generation: Generation, include_usage: bool = False) -> None:
        self._generation = generation
        self._stream = _Stream("cmpl", "text_completion", generation, include_usage)
        self._choices = [_ChoiceOfAStream(None) for _ in range(generation.num_choices)]
        self._prompts: dict[int, Sequence[TokenLogprobs | None]] = {}
        self._waiting: dict[int, list[int]] = {}  # prompt -> choices whose first event needs its log-probabilities

    def whole(self, outputs: Sequence[Output]) -> Completion:
        choices = []
        for index, output in enumerate(outputs):
            prompt = self._generation.prompt_of(index)
            self._note(prompt, output.prompt_logprobs)
            extra: dict[str, Any] = {}
            if output.prompt_logprobs is not None and prompt.echo is None:
                extra["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs, self._generation.model.texts)
            choices.append(
                TextChoice(
                    index=index,
                    text=(prompt.echo or "") + output.text,
                    logprobs=self._logprobs(index, output.token_ids, output.logprobs),
                    finish_reason=output.finish_reason,
                    **extra,
                )
            )
        return Completion(
            object="text_completion", choices=choices, usage=Usage.of(self._generation.tally), **self._stream.head
        )

    def opening(self) -> bytes:
        return b""

    def events(self, choice: int, delta: OutputDelta) -> bytes:
        state = self._choices[choice]
        prompt = self._generation.prompt_of(choice)
        state.finish_reason = None if delta.finish_reason is None else finish_reason(delta)
        self._note(prompt, delta.prompt_logprobs)
        state.token_ids += delta.token_ids
        state.logprobs += delta.logprobs
        state.text += delta.text
        waiting = self._waiting.setdefault(id(prompt), [])
        if prompt.echo is not None and prompt.params.logprobs is not None and id(prompt) not in self._prompts:
            # The first sample brings them, and other samples may be faster.
            waiting.append(choice)
            return b""
        ready = dict.fromkeys([*waiting, choice])
        waiting.clear()
        return b"".join(map(self._event, ready))

    def usage(self) -> bytes:
        return self._stream.usage()

    def _event(self, choice: int) -> bytes:
        """What there is of a choice and has not been written."""
        state = self._choices[choice]
        text = state.text if state.begun else (self._generation.prompt_of(choice).echo or "") + state.text
        if not text and state.finish_reason is None:
            return b""
        logprobs = self._logprobs(choice, state.token_ids, state.logprobs)
        state.token_ids, state.logprobs, state.text = [], [], ""
        return self._stream.choice(
            {"index": choice, "text": text, "logprobs": logprobs, "finish_reason": state.finish_reason}
        )

    def _note(self, prompt: Prompt, logprobs: Sequence[TokenLogprobs | None] | None) -> None:
        """The prompt's come with its first sample and belong to all of them."""
        if logprobs is not None:
            self._prompts[id(prompt)] = logprobs

    def _logprobs(
        self, choice: int, token_ids: Sequence[int], tokens: Sequence[TokenLogprobs | None]
    ) -> dict[str, Any] | None:
        """Those of the choice's next tokens, behind those of an echoed prompt."""
        prompt, state = self._generation.prompt_of(choice), self._choices[choice]
        begun, state.begun = state.begun, True
        if prompt.params.logprobs is None:
            return None
        if prompt.echo is not None and not begun:
            token_ids = [*prompt.token_ids, *token_ids]
            tokens = [*self._prompts[id(prompt)], *tokens]
        written = text_logprobs(token_ids, tokens, self._generation.model.texts, state.text_length)
        state.text_length += sum(map(len, written["tokens"]))
        return written
