"""T10: a model that fits, through the whole engine, against plain transformers; and what raytier itself takes.

What runs: a Llama-shaped bf16 model of random weights (1.1 B parameters, 2.2 GB; `--quick` 0.15 B, 300 MB), made for
the run. Greedy decoding at batch 1, 8 and 32 from prompts of 64 tokens, different for every sequence and round.

- raytier: `raytier.LLM`, everything resident: the engine in one process, a DeviceActor in another, a message per step.
  One application per batch, told how many sequences to expect (`kv.expected_sequences`, `scheduler.max_num_seqs`), as
  its user would; `--quick`: one for all, which expects eight.
- transformers: the model's own forward with its own KV cache (`DynamicCache`), a static batch of equal lengths without
  padding or masks, argmax on the last position: `generate` without what it adds around that. No server, no second
  process, no paging.

T10.b1, T10.b8, T10.b32: tokens per second of raytier / of transformers, the median of the rounds. Only steps count that
give every sequence of the batch a token; prefill is left out on both sides.

T10.share: (time from step to step, seen by the client of the engine - time inside the DeviceActor's step) / 20 ms:
scheduling, the message there and back, detokenising, delivery and reports. Measured at batch 1 on a model whose step
takes about 20 ms (its number of layers follows from the step of T10.b1; `--quick`: the same model, whose step is
shorter). What a step spends inside the device, building the batch and drawing the token included, is on the side of the
model here, and in the other ids against raytier.

Why it is fair: the same torch, as many compute threads, all at one priority (Ray would run its workers at nice 15);
rounds interleave the sides and change their order, a ratio is made of neighbours within one round, and the side that
waits is stopped (SIGSTOP). Both sides run with their own defaults otherwise: memory in huge pages and packed weights
are what raytier brings.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

from peers.protocol import Decoded
from peers.side import Side, SideError, side
from random_model import LLAMA_1B, LLAMA_QUICK, Shape, random_model
from rich.console import Console
from rich.table import Table

BATCHES = (1, 8, 32)
PROMPT = 64
WARM_UP = 3
STEPS = {1: 40, 8: 24, 32: 12}
SHARE_STEPS = 100
#: The step that T10.share speaks of, in seconds.
SHARE_STEP = 0.020
#: Tokens of one sequence: prompt, window and what sequences decode while others are still being prefilled.
CONTEXT = 256
MIB = 2**20

Rounds = dict[str, dict[int, list[Decoded]]]


@contextmanager
def raytier_side(
    shape: Shape, model: Path, log: Path, threads: int, sequences: int
) -> Iterator[tuple[Side, dict[int, float]]]:
    """raytier with `model` loaded, expecting `sequences` at a time; and the step it predicts, seconds by batch."""
    with side("raytier", sys.executable, "run_raytier.py", log) as one:
        settings = {
            "tiers": {
                "device": {"max_mb": 1.5 * shape.nbytes / MIB + 512, "reserved_mb": 0, "max_utilization": 1},
                "host": {"max_mb": 0},
            },
            # As much KV in every case, so that the one of `--quick` runs the full batch.
            "kv": {"expected_sequences": sequences, "expected_context": CONTEXT * max(BATCHES) // sequences},
            "scheduler": {"max_num_seqs": max(BATCHES)},
            "compute": {"device": "cpu", "threads": threads},
            "cache_dir": str(model / "cache"),  # rates are measured for this run
        }
        about = one.call("load", path=str(model), settings=settings)
        if about["streamed_bytes"]:
            raise SystemExit("the model does not fit into this machine's memory: nothing to compare")
        yield one, {int(batch): seconds for batch, seconds in about["predicted_s"].items()}


def own_seconds(raytier: Side) -> tuple[float, float]:
    """Seconds of a step outside of the device, and of all of it, over `SHARE_STEPS` steps at batch 1."""
    before = raytier.call("counters")
    decoded = raytier.decode(1, 1, WARM_UP, SHARE_STEPS)
    after = raytier.call("counters")
    step = mean(decoded.step_s)
    return step - (after["wall_s"] - before["wall_s"]) / (after["steps"] - before["steps"]), step


def share_shape(bytes_per_s: float) -> Shape:
    """A model whose step takes about `SHARE_STEP` where weights are read at `bytes_per_s`."""
    fixed = replace(LLAMA_QUICK, layers=0).nbytes
    layer = replace(LLAMA_QUICK, layers=1).nbytes - fixed
    return replace(LLAMA_QUICK, layers=max(1, round((bytes_per_s * SHARE_STEP - fixed) / layer)))


def compare(running: dict[str, Side], batch: int, number: int, rounds: Rounds) -> None:
    """One round of `batch`: every side once, in an order that changes."""
    for name in list(running)[:: 1 if number % 2 else -1]:
        decoded = running[name].decode(batch, PROMPT, WARM_UP, STEPS[batch], seed=number * 100 + batch)
        rounds[name][batch].append(decoded)


def results(rounds: Rounds, own: float) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for batch in BATCHES:
        pairs = zip(rounds["raytier"][batch], rounds["transformers"][batch], strict=True)
        value = median(ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs)
        unit = f"x tokens/s of transformers at batch {batch}"
        table[f"T10.b{batch}"] = {"value": round(value, 3), "gate": 1.2, "goal": 1.6, "unit": unit}
    table["T10.share"] = {
        "value": round(own / SHARE_STEP, 4),
        "gate": 0.05,
        "goal": 0.02,
        "unit": "of a 20 ms step outside of the device",
        "lower_is_better": True,
    }
    return table


def show(console: Console, rounds: Rounds, predicted: dict[int, float], table: dict[str, dict[str, Any]]) -> None:
    rates = Table(title="tokens per second of decoding, median of the rounds (lowest to highest)")
    for column in ("side", *(f"batch {batch}" for batch in BATCHES), "prefill at 32"):
        rates.add_column(column, justify="left" if column == "side" else "right")
    for name, by_batch in rounds.items():
        cells = []
        for batch in BATCHES:
            found = [r.tokens_per_s for r in by_batch[batch]]
            cells.append(f"{median(found):.1f} ({min(found):.1f} to {max(found):.1f})")
        prefill = median(max(BATCHES) * PROMPT / r.first_s for r in by_batch[max(BATCHES)])
        rates.add_row(name, *cells, f"{prefill:.0f}")
    cells = []
    for batch in BATCHES:
        measured = median(mean(r.step_s) for r in rounds["raytier"][batch])
        cells.append(f"{batch / predicted[batch]:.1f} (step measured {measured / predicted[batch] - 1:+.0%})")
    rates.add_row("predicted by the plan", *cells, "")
    console.print(rates)
    rows = Table()
    for column in ("id", "measured", "gate", "goal", ""):
        rows.add_column(column)
    for name, row in table.items():
        bound = "at most" if row.get("lower_is_better") else "at least"
        rows.add_row(name, str(row["value"]), f"{bound} {row['gate']}", f"{bound} {row['goal']}", row["unit"])
    console.print(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="T10: a model that fits, against plain transformers.")
    parser.add_argument("--quick", action="store_true", help="a 300 MB model, fewer rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rounds", type=int, help="five, at least, for a result that counts (quick: 3)")
    parser.add_argument("--threads", type=int, help="CPU threads of both sides (all cores)")
    parser.add_argument("--dir", default="/var/tmp", help="where the models are written")
    arguments = parser.parse_args()
    console = Console(width=130)
    threads = arguments.threads or os.cpu_count() or 1
    count = arguments.rounds or (3 if arguments.quick else 5)
    console.print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} CPUs at the start")
    shape = LLAMA_QUICK if arguments.quick else LLAMA_1B
    rounds: Rounds = {name: {batch: [] for batch in BATCHES} for name in ("raytier", "transformers")}
    predicted: dict[int, float] = {}
    with ExitStack() as stack:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raytier-t10-")))
        try:
            with ExitStack() as models:
                model = models.enter_context(random_model(shape, arguments.dir))
                peer = models.enter_context(side("transformers", sys.executable, "run_hf.py", logs / "transformers"))
                peer.call("load", path=str(model), threads=threads)
                for batches in [BATCHES] if arguments.quick else [(batch,) for batch in BATCHES]:
                    sequences = 8 if arguments.quick else batches[0]
                    log = logs / f"raytier-{sequences}"
                    with raytier_side(shape, model, log, threads, sequences) as (raytier, steps):
                        predicted |= {batch: steps[batch] for batch in batches}
                        running = {"raytier": raytier, "transformers": peer}
                        for one in running.values():  # kernels chosen, pages touched
                            one.decode(max(batches), PROMPT, 0, 2)
                        for number in range(count):
                            for batch in batches:
                                compare(running, batch, number, rounds)
                        if arguments.quick:
                            own = [own_seconds(raytier) for _ in range(count)]
            if not arguments.quick:
                step = median(mean(r.step_s) for r in rounds["raytier"][1])
                small = share_shape(shape.nbytes / step)
                with (
                    random_model(small, arguments.dir) as model,
                    raytier_side(small, model, logs / "share", threads, 1) as (raytier, _),
                ):
                    own = [own_seconds(raytier) for _ in range(count)]
        except SideError as error:
            raise SystemExit(str(error)) from None
    seconds, step = (median(values) for values in zip(*own, strict=True))
    table = results(rounds, seconds)
    show(console, rounds, predicted, table)
    console.print(f"T10.share: {seconds * 1e3:.2f} ms outside of the device, of a step of {step * 1e3:.1f} ms")
    console.print(f"load average {os.getloadavg()[0]:.2f} at the end")
    if arguments.json:
        print(json.dumps(table))


if __name__ == "__main__":
    main()
