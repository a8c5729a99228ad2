"""Measuring decode steps of a loaded model, by the clock of the engine that makes them."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from statistics import median
from typing import TYPE_CHECKING

from raytier.engine.outputs import OutputDelta
from raytier.engine.sampling_params import SamplingParams
from raytier.engine.step import StepStats
from raytier.errors import EngineDeadError
from raytier.planner.cost import predict_step, sweep_of

if TYPE_CHECKING:
    from raytier.llm import LLM

#: Steps before a window: the first ones find a full ring.
WARM_UP = 3
#: Fewest and most steps of a window.
_STEPS = (4, 64)


@dataclass(frozen=True, slots=True)
class DecodeWindow:
    """Consecutive decode steps that all carried the whole batch: wall seconds, and sums of the steps' counters.

    Attributes:
        context: mean number of tokens that each sequence had behind it.
        device_seconds: of `seconds`, what the device took; the rest is the engine's turn and the call.
        io_wait_seconds: of those, what it waited for reads.
    """

    batch: int
    context: int
    steps: int
    seconds: float
    device_seconds: float
    io_wait_seconds: float
    bytes_streamed: int
    bytes_read: int

    @property
    def step_seconds(self) -> float:
        return self.seconds / self.steps

    @property
    def tokens_per_second(self) -> float:
        return self.batch * self.steps / self.seconds

    @property
    def streamed_per_second(self) -> float:
        """Parameter bytes from ramdisk and disk that were computed on, per second."""
        return self.bytes_streamed / self.seconds


def measure_decode(llm: LLM, batch: int, *, context: int, seconds: float) -> DecodeWindow:
    """Decode greedily with `batch` sequences of about `context` tokens for about `seconds`.

    Prompts have random tokens, all of them are read first; the window begins when every sequence decodes, and ends when
    the first of them ends.

    Raises:
        EngineDeadError: the engine died meanwhile. InvalidRequestError: the KV cache is too small for the batch.
    """
    predicted = predict_step(sweep_of(llm.manifest, llm.plan), llm.rates, batch, context).seconds
    steps = min(_STEPS[1], max(_STEPS[0], math.ceil(seconds / predicted)), max(_STEPS[0], context // 2))
    prompt = max(1, context - steps // 2 - WARM_UP)
    # The first sequences decode while the last ones' prompts are read.
    reading = math.ceil(batch * prompt / max(1, llm.plan.devices[0].max_mixed_tokens - batch))
    params = _greedy(steps + WARM_UP + reading + 1)
    started: set[int] = set()
    marks: list[tuple[float, int, StepStats]] = []
    finished: SimpleQueue[OutputDelta] = SimpleQueue()
    over = False

    def sink(number: int, delta: OutputDelta) -> None:  # on the engine's thread, after every step
        nonlocal over
        started.add(number)
        over = over or delta.finish_reason is not None
        if number == batch - 1 and len(started) == batch and not over:
            stats = llm.engine.stats()
            marks.append((time.perf_counter(), stats.steps, stats.total))
        if delta.finish_reason is not None:
            finished.put(delta)

    for number in range(batch):
        llm.engine.submit(_prompt(prompt, number, llm.manifest.vocab_size), params, partial(sink, number))
    for _ in range(batch):
        delta = finished.get()
        if delta.error is not None:
            raise EngineDeadError(delta.error)
    (began, first, before), (ended, last, after) = marks[min(WARM_UP, len(marks) - 2)], marks[-1]
    if after.num_tokens - before.num_tokens != batch * (last - first):
        raise RuntimeError("a step of the window did not carry the whole batch: the KV cache is too small for it")
    return DecodeWindow(
        batch,
        prompt + len(marks) // 2,
        last - first,
        ended - began,
        after.wall_s - before.wall_s,
        after.io_wait_s - before.io_wait_s,
        after.bytes_streamed - before.bytes_streamed,
        after.bytes_read - before.bytes_read,
    )


def measure_first_token(llm: LLM, prompt_tokens: int, *, times: int = 3) -> float:
    """Median seconds from submitting a prompt of random tokens to its first token, when nothing else runs.

    Raises:
        EngineDeadError: the engine died meanwhile.
    """
    found = []
    for number in range(times):
        arrived: SimpleQueue[OutputDelta] = SimpleQueue()
        began = time.perf_counter()
        llm.engine.submit(_prompt(prompt_tokens, number, llm.manifest.vocab_size), _greedy(1), arrived.put)
        delta = arrived.get()
        if delta.error is not None:
            raise EngineDeadError(delta.error)
        found.append(time.perf_counter() - began)
    return median(found)


def _greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=tokens, ignore_eos=True)


def _prompt(length: int, number: int, vocab: int) -> Sequence[int]:
    """Token ids that differ from sequence to sequence."""
    return [(7919 * (number + 1) + 104729 * i) % vocab for i in range(length)]
