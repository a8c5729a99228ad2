"""What a benchmark and the process of one system say to each other: JSON objects, one per line, question and answer.

Run by the Python of every environment, so nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Decoded:
    """One decoding run.

    `step_s`: seconds of the steps of the window, in each of which every sequence of the batch got one token; `first_s`:
    seconds until every sequence had its first token; `ids`: tokens of the first sequence from its first on.
    """

    batch: int
    step_s: list[float]
    first_s: float
    ids: list[int]

    @property
    def tokens_per_s(self) -> float:
        return self.batch * len(self.step_s) / sum(self.step_s)


def prompts(batch: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    """Different prompts of `length` tokens each, the same for every system; no token 0, which ends sequences."""
    state = seed * 2654435761 + 1
    out = []
    for _ in range(batch):
        prompt = []
        for _ in range(length):
            state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
            prompt.append(1 + (state >> 33) % (vocab - 1))
        out.append(prompt)
    return out


def run_steps(
    prompts: Sequence[Sequence[int]],
    prefill: Callable[[], list[int]],
    step: Callable[[], list[int]],
    warm_up: int,
    steps: int,
) -> dict[str, Any]:
    """Time `prefill`, then `warm_up` + `steps` calls of `step`; both return the newest token of every sequence."""
    began = time.perf_counter()
    ids = [prefill()[0]]
    first = time.perf_counter() - began
    times = []
    for _ in range(warm_up + steps):
        before = time.perf_counter()
        ids.append(step()[0])
        times.append(time.perf_counter() - before)
    return asdict(Decoded(len(prompts), times[warm_up:], first, ids))


def answer(handler: object) -> None:
    """Call the methods of `handler` as asked for on stdin until it closes; what they print goes to stderr."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"result": getattr(handler, request.pop("method"))(**request)}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        out.write(json.dumps(reply) + "\n")
        out.flush()
