"""Inter-token latency of running streams while a 4k-token prompt is read, before and after the planned step budget.

What runs: a Llama-shaped bf16 model of random weights (0.38 B parameters, context 4608; `--quick` 0.15 B), resident,
and streamed with about a third of its weights in memory; through `raytier.LLM`, the real engine and a DeviceActor in
its own process. Four streams decode; when they are under way, a prompt of 4096 tokens (`--quick` 1024) arrives. Every
token of the four streams is stamped as the engine hands it out, from the arrival of the prompt until its first token.

"fixed" is `scheduler.max_num_batched_tokens: 512`, as it was before; "auto" is what the plan chooses
(`planner/step_tokens.py`). Both run in turn on the same model and budget.

- latency.itl_max, latency.itl_p99 and latency.itl_median: auto over fixed, resident model; `.streamed` likewise.
- latency.first_token: time to the first token of the long prompt, auto over fixed: what the shorter steps cost it.

The scheduler gives every running stream its token in every step, so the inter-token latency is the duration of a step.
There is no gate: the figures inform. Why it is fair: same process layout, model, budget, prompts; only one key differs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from threading import Event
from typing import Any

# Before Ray starts: its workers would run at nice 15, behind everything else on the machine.
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from random_model import LLAMA_QUICK, Shape, random_model
from rich.console import Console
from rich.table import Table

from raytier import LLM
from raytier.engine.outputs import OutputDelta
from raytier.engine.sampling_params import SamplingParams

MIB = 2**20
STREAMS = 4
FIXED = 512
SHAPE = Shape(hidden=1536, intermediate=4096, layers=12, heads=24, kv_heads=4, vocab=16000, context=4608)
QUICK = Shape(**(LLAMA_QUICK.__dict__ | {"context": 4608}))
UNDER_WAY = 5  # tokens of each stream before the prompt arrives


@dataclass(frozen=True)
class Latency:
    """Seconds between tokens of the streams while the prompt was read, and from its arrival to its first token."""

    step_tokens: int
    gaps: tuple[float, ...]
    first_token: float

    @property
    def p99(self) -> float:
        return quantiles(self.gaps, n=100, method="inclusive")[98]


def params(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=tokens, ignore_eos=True)


def measure(llm: LLM, prompt_tokens: int) -> Latency:
    """Let streams run, send the prompt, and stamp every token."""
    stamps: list[list[float]] = [[] for _ in range(STREAMS)]
    under_way, arrived = Event(), Event()
    first: list[float] = []

    def on_stream(number: int, delta: OutputDelta) -> None:  # on the engine's thread
        stamps[number].append(time.perf_counter())
        if all(len(times) >= UNDER_WAY for times in stamps) or delta.error is not None:
            under_way.set()

    def on_prompt(delta: OutputDelta) -> None:
        first.append(time.perf_counter())
        arrived.set()

    vocab = llm.manifest.vocab_size
    running = [
        llm.engine.submit([1 + i], params(llm.manifest.max_context - 8), partial(on_stream, i)) for i in range(STREAMS)
    ]
    under_way.wait()
    began = time.perf_counter()
    prompt = [(7919 * i) % vocab for i in range(prompt_tokens)]
    running.append(llm.engine.submit(prompt, params(1), on_prompt))
    arrived.wait()
    for request in running:
        llm.engine.abort(request)
    if llm.engine.dead is not None:
        raise SystemExit(f"the engine died: {llm.engine.dead}")
    gaps = [
        after - before for times in stamps for before, after in pairwise(times) if after >= began and before <= first[0]
    ]
    return Latency(llm.plan.devices[0].max_mixed_tokens, tuple(gaps), first[0] - began)


def start(model: Path, budget_mb: float, step_tokens: int | str) -> LLM:
    return LLM(
        str(model),
        tiers={"device": {"max_mb": budget_mb, "reserved_mb": 0, "max_utilization": 1}, "host": {"max_mb": 0}},
        kv={"expected_sequences": STREAMS + 1, "expected_context": 1280},
        scheduler={"max_num_seqs": 8, "max_num_batched_tokens": step_tokens},
        compute={"device": "cpu"},
        cache_dir=str(model / "cache"),  # rates are measured for this run
    )


def ratios(found: dict[tuple[str, str], Latency]) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for kind, suffix in (("resident", ""), ("streamed", ".streamed")):
        fixed, auto = found[kind, "fixed"], found[kind, "auto"]
        values = {
            "itl_median": median(auto.gaps) / median(fixed.gaps),
            "itl_p99": auto.p99 / fixed.p99,
            "itl_max": max(auto.gaps) / max(fixed.gaps),
            "first_token": auto.first_token / fixed.first_token,
        }
        for name, value in values.items():
            rows[f"latency.{name}{suffix}"] = {
                "value": round(value, 3),
                "gate": None,
                "goal": None,
                "unit": f"of {FIXED} tokens per step",
                "lower_is_better": True,
            }
    return rows


def show(console: Console, found: dict[tuple[str, str], Latency], prompt_tokens: int) -> None:
    table = Table(title=f"{STREAMS} streams while a prompt of {prompt_tokens} tokens is read")
    for column in ("model", "tokens per step", "ITL median", "p99", "max", "first token of the prompt"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for (kind, mode), latency in found.items():
        table.add_row(
            kind,
            f"{latency.step_tokens} ({mode})",
            f"{median(latency.gaps) * 1e3:.0f} ms",
            f"{latency.p99 * 1e3:.0f} ms",
            f"{max(latency.gaps) * 1e3:.0f} ms",
            f"{latency.first_token:.1f} s",
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Inter-token latency under a long prompt. Informative, no gate.")
    parser.add_argument("--quick", action="store_true", help="a 300 MB model and a prompt of 1024 tokens")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--dir", default="/var/tmp", help="directory on the disk to measure, not a tmpfs")
    arguments = parser.parse_args()
    console = Console(width=120)
    shape, prompt_tokens = (QUICK, 1024) if arguments.quick else (SHAPE, 4096)
    console.print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} CPUs at the start")
    found: dict[tuple[str, str], Latency] = {}
    with ExitStack() as stack:
        model = stack.enter_context(random_model(shape, arguments.dir))
        ray.init(
            address="local",
            num_cpus=max(2, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * MIB,
        )
        stack.callback(ray.shutdown)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # after Ray's own: the model is removed
        beside = 5 * 1280 * shape.kv_token_bytes / MIB + 64
        for kind, share in (("resident", 1.2), ("streamed", 0.4)):
            for mode in ("fixed", "auto"):
                budget = math.ceil(share * shape.nbytes / MIB + beside)
                with start(model, budget, FIXED if mode == "fixed" else "auto") as llm:
                    if (llm.plan.streamed_bytes > 0) != (kind == "streamed"):
                        raise SystemExit(f"{budget} MB make no {kind} model of {shape.nbytes / MIB:.0f} MB")
                    found[kind, mode] = measure(llm, prompt_tokens)
    show(console, found, prompt_tokens)
    console.print(f"load average {os.getloadavg()[0]:.2f} at the end")
    if arguments.json:
        print(json.dumps(ratios(found)))


if __name__ == "__main__":
    main()
