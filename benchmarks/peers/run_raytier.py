"""raytier through `raytier.LLM`: the real engine, a DeviceActor in its own process, one message per step."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from dataclasses import asdict
from functools import partial
from typing import Any

import ray
from protocol import Decoded, answer, prompts

from raytier import LLM
from raytier.engine.outputs import OutputDelta
from raytier.engine.sampling_params import SamplingParams

MIB = 2**20


class Raytier:
    """One application; see `side.Side` for who calls."""

    def load(self, path: str, settings: dict[str, Any]) -> dict[str, Any]:
        # Ray only counts CPUs; at least two, so that a machine with one core runs this too.
        ray.init(
            address="local",
            num_cpus=max(2, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * MIB,
        )
        began = time.perf_counter()
        self._llm = LLM(path, **settings)
        plan = self._llm.plan
        share = plan.devices[0]
        return {
            "seconds": time.perf_counter() - began,
            "resident_bytes": share.resident_bytes,
            "ring_bytes": share.ring_bytes,
            "window": share.window,
            "kv_bytes": share.kv_bytes,
            "streamed_bytes": plan.streamed_bytes,
            "threads": self._llm.status().device.threads,
            "predicted_s": {p.batch: p.seconds for p in plan.predictions},
            "warnings": list(plan.warnings),
        }

    def decode(
        self, batch: int, prompt: int, warm_up: int, steps: int, seed: int = 0, ids: list[list[int]] | None = None
    ) -> dict[str, Any]:
        engine = self._llm.engine
        chosen = ids or prompts(batch, prompt, engine.config.vocab_size, seed)
        # Prompts are read in pieces and sequences start one after another; the window holds the steps that carry all.
        spare = 64
        params = SamplingParams(
            temperature=0, top_p=1, top_k=0, max_tokens=1 + warm_up + steps + spare, ignore_eos=True
        )
        counts: Counter[int] = Counter()
        first: list[int] = []
        marks: list[float] = []
        advanced: set[int] = set()
        done = threading.Event()
        ended = threading.Semaphore(0)
        error: list[str] = []

        def sink(index: int, delta: OutputDelta) -> None:  # on the engine's thread, after every step
            if delta.error is not None:
                error.append(delta.error)
                done.set()
            if delta.token_ids:
                if index in advanced:  # this sequence again, and not all before it: the batch was not full
                    advanced.clear()
                advanced.add(index)
                counts[index] += len(delta.token_ids)
                if index == 0:
                    first.extend(delta.token_ids)
                if len(counts) == batch and (len(advanced) == batch or not marks):
                    marks.append(time.perf_counter())
                    advanced.clear()
                    if len(marks) == 1 + warm_up + steps:
                        done.set()
            if delta.finish_reason is not None:
                ended.release()

        began = time.perf_counter()
        requests = [engine.submit(tokens, params, partial(sink, index)) for index, tokens in enumerate(chosen)]
        done.wait()
        for request in requests:
            engine.abort(request)
        for _ in requests:
            ended.acquire()
        if error:
            raise RuntimeError(error[0])
        times = [later - earlier for earlier, later in itertools.pairwise(marks)]
        return asdict(Decoded(batch, times[warm_up:], marks[0] - began, first))

    def counters(self) -> dict[str, Any]:
        """Sums over all steps so far: steps, bytes streamed and read, seconds inside the device."""
        stats = self._llm.stats()
        return {"steps": stats.steps, **{k: v for k, v in asdict(stats.total).items() if isinstance(v, int | float)}}

    def close(self) -> None:
        self._llm.close()
        ray.shutdown()


if __name__ == "__main__":
    answer(Raytier())
