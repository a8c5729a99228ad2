"""T2 and T3: how close streamed decoding comes to the disk, and what batching makes of a streamed byte.

What runs: a Llama-shaped bf16 model of random weights (1.1 B parameters, 2.2 GB; `--quick` 0.15 B, 300 MB), made for
the run, through `raytier.LLM`: the real engine, a DeviceActor in its own process, one message per step. Its device
budget is half of the model's bytes and holds KV, ring and activations too; there is no host tier. So more than half of
the weights are read from disk in every step. A second `LLM` holds the same model resident. Greedy decoding from
one-token prompts at batch 1 and 32.

- T2.bytes: bytes read from disk per step / bytes of the parameters that every step streams. O_DIRECT's whole blocks,
  gaps read along, embedding rows: all that is read counts. The larger of both batches.
- T2.rate: streamed parameter bytes per second of wall time, seen by the client of the engine / the lower of
  * raw: the same file read with plain `preadv`, O_DIRECT, in 8 MiB requests by 1 to 16 threads into touched, aligned
    memory as large as a ring, nothing else running; the depth with the best median of the run counts;
  * compute: the same bytes / the time of the same step with every weight resident.
  The smaller of both batches counts.
- T3: tokens per second of the streamed model at batch 32 / at batch 1.

Why it is fair: rounds interleave raw reads, resident and streamed decoding, a ratio is made of neighbours within one
round, and medians over the rounds are reported, so a slower phase of a shared machine hits both sides. Windows begin
after the first steps, when what the ring held ready has been used up, and end at a step; nothing is left out in
between. Raw reads have no compute beside them, and the resident model no reads: both limits are at their best. All
processes run at the same priority (Ray would run the DeviceActors at nice 15, and the raw reads are made by this one).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from statistics import median
from typing import Any

# Ray runs its workers at nice 15 and this process reads at 0: on a machine that others use, that alone would decide.
os.environ.setdefault("RAY_worker_niceness", "0")

import ray
from random_model import LLAMA_1B, LLAMA_QUICK, Shape, random_model
from rich.console import Console
from rich.table import Table

from raytier import LLM
from raytier.engine.outputs import OutputDelta
from raytier.engine.sampling_params import SamplingParams
from raytier.engine.step import StepStats
from raytier.errors import RaytierError
from raytier.tiers.aligned import AlignedBuffer

MIB = 2**20
BATCHES = (1, 32)
DEPTHS = (1, 2, 4, 8, 16)
REQUEST = 8 * MIB
#: Memory that raw reads go through: more than the caches hold, as a ring is (into one small buffer, reads are faster).
REGION = 256 * MIB
#: Steps before a window: the first may carry part of the batch, and finds the ring full.
WARM_UP = 3
CONTEXT = 128


@dataclass(frozen=True)
class Window:
    """Consecutive full steps of one decoding run: wall seconds, and sums of the steps' counters."""

    steps: int
    seconds: float
    tokens: int
    bytes_streamed: int
    bytes_read: int

    @property
    def step_seconds(self) -> float:
        return self.seconds / self.steps


@dataclass
class Round:
    """One pass over everything that is measured. `raw`: bytes per second by depth; windows by batch."""

    raw: dict[int, float] = field(default_factory=dict)
    streamed: dict[int, Window] = field(default_factory=dict)
    resident: dict[int, Window] = field(default_factory=dict)


def read_raw(path: Path, depth: int, seconds: float) -> float:
    """Bytes per second of reading `path` over and over, front to back, `depth` requests in flight."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        count = os.path.getsize(path) // REQUEST
        slots = REGION // REQUEST // depth
        buffers = [AlignedBuffer(slots * REQUEST) for _ in range(depth)]
        for buffer in buffers:
            buffer.view[:] = bytes(buffer.nbytes)
        numbers = itertools.count()
        ends: list[tuple[float, int]] = []
        began = time.perf_counter()

        def run(buffer: AlignedBuffer) -> None:
            nbytes = 0
            while time.perf_counter() < began + seconds:
                number = next(numbers)
                start = number // depth % slots * REQUEST
                nbytes += os.preadv(fd, [buffer.view[start : start + REQUEST]], number % count * REQUEST)
            ends.append((time.perf_counter(), nbytes))

        threads = [threading.Thread(target=run, args=(buffer,)) for buffer in buffers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(nbytes for _, nbytes in ends) / (max(end for end, _ in ends) - began)
    finally:
        os.close(fd)


def decode(llm: LLM, batch: int, steps: int) -> Window:
    """Decode `steps` steps of a full batch, after a warm-up."""
    engine = llm.engine
    params = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=WARM_UP + steps, ignore_eos=True)
    marks: list[tuple[float, int, StepStats]] = []
    finished: SimpleQueue[OutputDelta] = SimpleQueue()

    def sink(first: bool, delta: OutputDelta) -> None:  # on the engine's thread, after every step
        if first:
            stats = engine.stats()
            marks.append((time.perf_counter(), stats.steps, stats.total))
        if delta.finish_reason is not None:
            finished.put(delta)

    for i in range(batch):
        engine.submit([1 + i], params, partial(sink, i == 0))
    for _ in range(batch):
        delta = finished.get()
        if delta.error is not None:
            raise SystemExit(f"the engine died: {delta.error}")
    (began, first, before), (ended, last, after) = marks[WARM_UP - 1], marks[-1]
    window = Window(
        last - first,
        ended - began,
        after.num_tokens - before.num_tokens,
        after.bytes_streamed - before.bytes_streamed,
        after.bytes_read - before.bytes_read,
    )
    assert window.tokens == batch * window.steps, "a step of the window did not carry the whole batch"
    return window


def start(model: Path, max_mb: float, threads: int | None) -> LLM:
    return LLM(
        str(model),
        tiers={"device": {"max_mb": max_mb, "reserved_mb": 0, "max_utilization": 1}, "host": {"max_mb": 0}},
        kv={"expected_sequences": max(BATCHES), "expected_context": CONTEXT},
        scheduler={"max_num_seqs": max(BATCHES), "max_num_batched_tokens": 128},
        compute={"device": "cpu"} | ({"threads": threads} if threads else {}),
        cache_dir=str(model / "cache"),  # rates are measured for this run
    )


def steps_for(llm: LLM, batch: int, seconds: float) -> int:
    """Steps of a window of about `seconds`, by a short trial."""
    trial = decode(llm, batch, 2)
    return min(CONTEXT - WARM_UP - 1, max(3, math.ceil(seconds / trial.step_seconds)))


def measure(model: Path, streamed: LLM, resident: LLM | None, rounds: int, seconds: float) -> list[Round]:
    file = model / "model.safetensors"
    runs = [("streamed", streamed)] + ([("resident", resident)] if resident is not None else [])
    steps = {(name, batch): steps_for(llm, batch, seconds) for name, llm in runs for batch in BATCHES}
    results = []
    for number in range(rounds):
        result = Round()
        for batch in BATCHES:
            for depth in DEPTHS:  # half of the raw reads before each batch
                rate = read_raw(file, depth, seconds / 8)
                result.raw[depth] = (result.raw[depth] + rate) / 2 if depth in result.raw else rate
            for name, llm in runs if number % 2 else runs[::-1]:
                getattr(result, name)[batch] = decode(llm, batch, steps[name, batch])
        results.append(result)
    return results


@dataclass(frozen=True)
class Report:
    """Ratios per round from which the results are taken."""

    plan_bytes: int
    rounds: Sequence[Round]

    @property
    def depth(self) -> int:
        return max(DEPTHS, key=lambda depth: median(r.raw[depth] for r in self.rounds))

    def rate(self, r: Round, batch: int) -> float:
        return r.streamed[batch].bytes_streamed / r.streamed[batch].seconds

    def compute(self, r: Round, batch: int) -> float:
        """Bytes per second at which the resident model would use up what the streamed one reads."""
        if batch not in r.resident:
            return math.inf
        window = r.streamed[batch]
        return window.bytes_streamed / window.steps / r.resident[batch].step_seconds

    def limit(self, r: Round, batch: int) -> float:
        return min(r.raw[self.depth], self.compute(r, batch))

    def read(self, r: Round, batch: int) -> float:
        return r.streamed[batch].bytes_read / (r.streamed[batch].steps * self.plan_bytes)

    def typical(self, value: Callable[[Round, int], float], batch: int) -> float:
        return median(value(r, batch) for r in self.rounds)

    def results(self) -> dict[str, dict[str, Any]]:
        rate = min(self.typical(lambda r, b: self.rate(r, b) / self.limit(r, b), batch) for batch in BATCHES)
        read = max(self.typical(self.read, batch) for batch in BATCHES)
        low, high = BATCHES
        gain = median(
            (r.streamed[high].tokens / r.streamed[high].seconds) / (r.streamed[low].tokens / r.streamed[low].seconds)
            for r in self.rounds
        )
        return {
            "T2.bytes": {
                "value": round(read, 4),
                "gate": 1.02,
                "goal": 1.00,
                "unit": "of the non-resident bytes",
                "lower_is_better": True,
            },
            "T2.rate": {"value": round(rate, 3), "gate": 0.90, "goal": 0.97, "unit": "of min(raw O_DIRECT, compute)"},
            "T3": {"value": round(gain, 2), "gate": 20, "goal": 30, "unit": "x tokens/s, batch 32 over 1"},
        }


def show(console: Console, shape: Shape, streamed: LLM, report: Report) -> None:
    plan = streamed.plan
    share = plan.devices[0]
    console.print(
        f"{shape.parameters / 1e9:.2f} B parameters, {shape.nbytes / 1e6:.0f} MB; streamed per step "
        f"{plan.streamed_bytes / 1e6:.0f} MB ({plan.streamed_bytes / shape.nbytes:.0%}), resident "
        f"{share.resident_bytes / 1e6:.0f} MB, ring {share.ring_bytes / 1e6:.0f} MB ({share.window} ahead)"
    )
    raw = ", ".join(f"{d}: {median(r.raw[d] for r in report.rounds) / 1e9:.2f}" for d in DEPTHS)
    console.print(f"raw O_DIRECT, GB/s by queue depth: {raw}")
    predicted = {p.batch: p.seconds for p in plan.predictions}
    table = Table(title="streamed decoding, median of the rounds (lowest to highest)")
    for column in ("batch", "step", "predicted", "resident step", "streamed", "limit", "of the limit", "tokens/s"):
        table.add_column(column, justify="right")
    for batch in BATCHES:
        step = report.typical(lambda r, b: r.streamed[b].step_seconds, batch)
        ratios = [report.rate(r, batch) / report.limit(r, batch) for r in report.rounds]
        compute = report.typical(report.compute, batch)
        resident = "does not fit" if math.isinf(compute) else ""
        by = "raw" if median(r.raw[report.depth] for r in report.rounds) < compute else "compute"
        table.add_row(
            str(batch),
            f"{step * 1e3:.0f} ms",
            f"{predicted[batch] * 1e3:.0f} ms ({step / predicted[batch] - 1:+.0%})",
            resident or f"{report.typical(lambda r, b: r.resident[b].step_seconds, batch) * 1e3:.0f} ms",
            f"{report.typical(report.rate, batch) / 1e9:.2f} GB/s",
            f"{report.typical(report.limit, batch) / 1e9:.2f} GB/s ({by})",
            f"{median(ratios):.1%} ({min(ratios):.1%} to {max(ratios):.1%})",
            f"{batch / step:.2f}",
        )
    console.print(table)
    results = Table()
    for column in ("id", "measured", "gate", "goal", ""):
        results.add_column(column)
    for name, row in report.results().items():
        bound = "at most" if row.get("lower_is_better") else "at least"
        results.add_row(name, str(row["value"]), f"{bound} {row['gate']}", f"{bound} {row['goal']}", row["unit"])
    console.print(results)


def main() -> None:
    parser = argparse.ArgumentParser(description="T2 and T3: streamed decoding against the disk's own rate.")
    parser.add_argument("--quick", action="store_true", help="a 300 MB model, shorter windows")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=5, help="at least five for a result that counts")
    parser.add_argument("--threads", type=int, help="CPU threads of the DeviceActors (all cores)")
    parser.add_argument("--dir", default="/var/tmp", help="directory on the disk to measure, not a tmpfs")
    arguments = parser.parse_args()
    console = Console(width=130)
    shape = LLAMA_QUICK if arguments.quick else LLAMA_1B
    console.print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} CPUs at the start")
    with ExitStack() as stack:
        model = stack.enter_context(random_model(shape, arguments.dir))
        # Both applications on one node: Ray only counts CPUs, so that a machine with one core runs this too.
        ray.init(
            address="local",
            num_cpus=max(2, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * MIB,
        )
        stack.callback(ray.shutdown)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # after Ray's own: the model is removed
        streamed = stack.enter_context(start(model, shape.nbytes / 2 / MIB, arguments.threads))
        resident: LLM | None = None
        try:
            resident = stack.enter_context(start(model, 1.5 * shape.nbytes / MIB + 512, arguments.threads))
        except RaytierError as error:
            console.print(f"no resident run, so raw O_DIRECT alone is the limit: {error}")
        if resident is not None and resident.plan.streamed_bytes:
            console.print("the model does not fit into this machine's memory: raw O_DIRECT alone is the limit")
            resident = None
        rounds = measure(model, streamed, resident, arguments.rounds, 0.5 if arguments.quick else 2.5)
        report = Report(streamed.plan.streamed_bytes, rounds)
        show(console, shape, streamed, report)
    console.print(f"load average {os.getloadavg()[0]:.2f} at the end")
    if arguments.json:
        print(json.dumps(report.results()))


if __name__ == "__main__":
    main()
