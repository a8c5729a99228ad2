"""From prompts to an engine and back, the same for HTTP and for deployment handles.

A `Prompt` is what an engine takes; a `Generation` is one or more of them under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar, cast

from raytier.engine.outputs import OutputDelta, merge
from raytier.engine.requests import CheckedParams
from raytier.engine.sampling_params import SamplingParams
from raytier.engine.step import TokenLogprobs
from raytier.errors import EngineDeadError, InvalidRequestError, RequestTimeoutError
from raytier.serve.parsers.answer import AnswerParser
from raytier.serve.parsers.parts import Content, Part
from raytier.serve.served import ServedModel

FinishReason = Literal["stop", "length"]


class Prepared(Protocol):
    """What prompts are made of."""

    @property
    def has_grammar(self) -> bool: ...


Input = TypeVar("Input", bound=Prepared)
Made = TypeVar("Made")


def _plain() -> None:
    """No parser: the answer is text."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids and sampling parameters, ready for an engine.

    Attributes:
        checked: parameters that the engine has checked, so that nothing is compiled or encoded when it is submitted.
        new_parser: makes the parser of one answer.
        echo: text that an answer begins with; None for nothing.
    """

    token_ids: tuple[int, ...]
    checked: CheckedParams
    new_parser: Callable[[], AnswerParser | None] = _plain
    echo: str | None = None

    @property
    def params(self) -> SamplingParams:
        """As the request gave them."""
        return self.checked.params


@dataclass(frozen=True, slots=True)
class Output:
    """A finished sample.

    Attributes:
        text: as the model wrote it.
        token_ids: the one that ended the sample included.
        stop_reason: the stop string or token id of the request that ended it.
        logprobs: of each token, where they were asked for.
        prompt_logprobs: of each token of the prompt (None for the first), where they were asked for; of the first
            sample of a prompt.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None


@dataclass(slots=True)
class Tally:
    """Tokens of a request so far: a prompt counts once, however many samples it has."""

    prompts: dict[int, tuple[int, int]] = field(default_factory=dict)
    choices: dict[int, int] = field(default_factory=dict)

    def add(self, prompt: int, choice: int, delta: OutputDelta) -> None:
        self.prompts[prompt] = (delta.prompt_tokens, delta.cached_tokens)
        self.choices[choice] = delta.completion_tokens

    @property
    def prompt_tokens(self) -> int:
        return sum(tokens for tokens, _ in self.prompts.values())

    @property
    def cached_tokens(self) -> int:
        return sum(cached for _, cached in self.prompts.values())

    @property
    def completion_tokens(self) -> int:
        return sum(self.choices.values())


class Generation:
    """Prompts under way in an engine; iterate once for `(number of the choice, delta)` as they come.

    The choices of a prompt (its `n` samples) follow each other, and prompts keep their order.

    Invariant: after `aclose` the engine holds nothing of them. Whoever starts one closes it.

    Attributes:
        prompts: what was submitted.
        tally: tokens of what has been iterated over.
    """

    def __init__(self, model: ServedModel, prompts: Sequence[Prompt], priority: int) -> None:
        self.model = model
        self.prompts = prompts
        self.tally = Tally()
        # A generator by contract: closing it aborts.
        self._streams = [
            cast(
                "AsyncGenerator[OutputDelta, None]",
                model.engine.stream(prompt.token_ids, prompt.checked, priority=priority, timeout_s=model.timeout_s),
            )
            for prompt in prompts
        ]
        self._first_choice = [0]
        for prompt in prompts:
            self._first_choice.append(self._first_choice[-1] + prompt.params.n)
        self._first = [asyncio.ensure_future(anext(stream)) for stream in self._streams]
        self._pumps: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, model: ServedModel, prompts: Sequence[Prompt], *, priority: int = 0) -> Generation:
        """Submit all of `prompts`, or none. Returns when they are admitted, before their first tokens.

        Args:
            priority: lower ones go first, where `scheduler.policy` is priority.

        Raises:
            InvalidRequestError: a prompt can never be served.
            QueueFullError: there is no room for all of them.
            EngineDeadError: the engine is gone.
        """
        generation = cls(model, prompts, priority)
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

    @property
    def num_choices(self) -> int:
        return self._first_choice[-1]

    def prompt_of(self, choice: int) -> Prompt:
        """The prompt that a choice belongs to."""
        return next(p for p, end in zip(self.prompts, self._first_choice[1:], strict=True) if choice < end)

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
                yield self._seen(0, delta), delta
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
                index, delta = item
                yield self._seen(index, delta), delta

    def _seen(self, prompt: int, delta: OutputDelta) -> int:
        choice = self._first_choice[prompt] + delta.index
        self.tally.add(prompt, choice, delta)
        return choice

    async def outputs(self) -> list[Output]:
        """Wait for the end; one output per choice, in order.

        Raises:
            EngineDeadError: the engine died or was closed on the way.
        """
        deltas: list[list[OutputDelta]] = [[] for _ in range(self.num_choices)]
        async for choice, delta in self:
            deltas[choice].append(delta)
        return [
            Output(
                text=delta.text,
                token_ids=delta.token_ids,
                finish_reason=finish_reason(delta),
                stop_reason=delta.stop_reason,
                logprobs=delta.logprobs,
                prompt_logprobs=delta.prompt_logprobs,
            )
            for delta in map(merge, deltas)
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


def parts_of(parser: AnswerParser | None, delta: OutputDelta) -> tuple[Part, ...]:
    """What a delta adds to an answer."""
    if parser is None:
        return (Content(delta.text),) if delta.text else ()
    last = delta.finish_reason is not None
    return tuple(parser.push(delta.text) + (parser.finish() if last else []))


def check_number(model: ServedModel, prompts: int, samples: int = 1) -> None:
    """Refuse a batch of more prompts, with so many samples each, than the queue ever holds.

    Raises:
        InvalidRequestError: split it.
    """
    most = model.engine.config.scheduler.max_queue
    if prompts * samples > most:
        each = f" of {samples} samples each" if samples > 1 else ""
        raise InvalidRequestError(
            f"{prompts} prompts{each} in one request; at most {most} in all (scheduler.max_queue): split it",
            param="prompt" if prompts > 1 else "n",
        )


#: Threads that wait for grammars: the event loop's own ones stay free for what takes milliseconds, health checks too.
_GRAMMARS = ThreadPoolExecutor(2, thread_name_prefix="grammar-compiler")


async def in_thread(prepare: Callable[[ServedModel, Input], Made], model: ServedModel, request: Input) -> Made:
    """`prepare(model, request)` on a thread, apart from the others where it may have to compile a grammar."""
    pool = _GRAMMARS if request.has_grammar else None
    return await asyncio.get_running_loop().run_in_executor(pool, prepare, model, request)


def finish_reason(delta: OutputDelta) -> FinishReason:
    """How a finished delta ended, in OpenAI's words.

    Raises:
        EngineDeadError: the engine ended it, so what there is of the text is not an answer.
        RequestTimeoutError: it took longer than `api.request_timeout_s`.
    """
    if delta.finish_reason == "stop":
        return "stop"
    if delta.finish_reason == "length":
        return "length"
    if delta.finish_reason == "timeout":
        raise RequestTimeoutError(
            f"the request has not ended in time (api.request_timeout_s), {delta.completion_tokens} tokens were "
            "generated: ask for fewer (max_tokens), or raise the limit"
        )
    raise EngineDeadError("the engine was closed before the request had ended; send it again")
