"""Decoding with weights in int8 and int4, resident and streamed, against llama.cpp's Q8_0 and Q4_0.

What runs: a Llama-shaped bf16 model of random weights (1.1 B parameters, 2.2 GB; `--quick` 0.15 B, 300 MB), made for
the run, converted by each side: greedy decoding at batch 1 and 32 from prompts of 64 tokens.

- raytier: `raytier.LLM`, everything resident, `precision.device` int8, int4 (groups of 64 columns with a scale and a
  minimum: 4.5 bits per weight, as Q4_0 has) and int8-dynamic, the output head and all matrices in it.
- llama.cpp: the same weights as GGUF, quantised by llama.cpp (`pure`: the output head too). It quantises activations to
  8 bits, which of raytier's precisions int8-dynamic alone does.

`quant.int8.b1`, `quant.int8.b32`, `quant.int8-dynamic.b32`: tokens per second over Q8_0's. `quant.int4.b1`,
`quant.int4.b32`: over Q4_0's. `quant.int4.streamed`: all decoder layers on disk at batch 1, int4 over bf16 (as the
checkpoint has it), both by raytier; the limit printed beside it is that of the bytes.

Why it is fair: as in `resident_peers.py` (equal threads and priorities, rounds that interleave the sides, ratios of
neighbours within a round, who waits is stopped); llama.cpp uses the instructions of this machine, AMX included.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from peers.install import missing, python_of
from peers.protocol import Decoded
from peers.side import HERE, Side, SideError, side
from random_model import LLAMA_1B, LLAMA_QUICK, Shape, random_model
from rich.console import Console
from rich.table import Table

BATCHES = (1, 32)
PROMPT = 64
WARM_UP = 3
STEPS = {1: 32, 32: 10}
STREAMED_STEPS = 8
CONTEXT = 256
MIB = 2**20
#: Precision -> llama.cpp's; then (id, precision, batch, gate, goal).
PEERS = {"int8": "Q8_0", "int4": "Q4_0", "int8-dynamic": "Q8_0"}
RATIOS = (
    ("quant.int8.b1", "int8", 1, 0.85, 1.0),
    ("quant.int4.b1", "int4", 1, 0.8, 1.0),
    ("quant.int8.b32", "int8", 32, 1.2, 2.0),
    ("quant.int4.b32", "int4", 32, 0.45, 1.0),
    ("quant.int8-dynamic.b32", "int8-dynamic", 32, 2.0, 2.0),
)


@dataclass
class Run:
    """A side and its rounds by batch."""

    side: Side
    about: dict[str, Any]
    rounds: dict[int, list[Decoded]] = field(default_factory=lambda: {batch: [] for batch in BATCHES})

    def rate(self, batch: int) -> float:
        return median(r.tokens_per_s for r in self.rounds[batch])


def settings_for(shape: Shape, directory: Path, threads: int) -> dict[str, Any]:
    return {
        "tiers": {
            "device": {"max_mb": 1.5 * shape.nbytes / MIB + 512, "reserved_mb": 0, "max_utilization": 1},
            "host": {"max_mb": 0},
        },
        "kv": {"expected_sequences": max(BATCHES), "expected_context": CONTEXT},
        "scheduler": {"max_num_seqs": max(BATCHES)},
        "compute": {"device": "cpu", "threads": threads},
        "cache_dir": str(directory),
    }


def start_raytier(stack: ExitStack, model: Path, logs: Path, name: str, settings: dict[str, Any]) -> Run:
    one = stack.enter_context(side(f"raytier {name}", sys.executable, "run_raytier.py", logs / f"raytier-{name}.log"))
    return Run(one, one.call("load", path=str(model), settings=settings))


def resident(stack: ExitStack, shape: Shape, model: Path, logs: Path, options: argparse.Namespace) -> dict[str, Run]:
    """All sides that hold the model in memory, with their rounds."""
    threads = options.threads or os.cpu_count() or 1
    runs: dict[str, Run] = {}
    chosen = options.only or list(PEERS)
    for precision in chosen:
        settings = settings_for(shape, logs / "cache", threads) | {"precision": {"device": precision}}
        runs[precision] = start_raytier(stack, model, logs, precision, settings)
    if (python := python_of("llama")) is not None:
        script, plain = str(HERE / "run_llama.py"), model / "model.gguf"
        subprocess.run([str(python), script, str(model), str(plain)], check=True)
        for kind in sorted({PEERS[precision] for precision in chosen}):
            target = model / f"{kind}.gguf"
            quantise = [str(python), script, str(plain), str(target), kind]
            subprocess.run(quantise, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            one = stack.enter_context(side(kind, python, "run_llama.py", logs / f"{kind}.log"))
            sequences = max(BATCHES)
            runs[kind] = Run(
                one,
                one.call("load", path=str(target), context=sequences * CONTEXT, sequences=sequences, threads=threads),
            )
        plain.unlink()
    for run in runs.values():
        run.side.decode(max(BATCHES), PROMPT, 0, 2)
    names = list(runs)
    for number in range(options.rounds or (2 if options.quick else 5)):
        for batch in BATCHES:
            for name in names if number % 2 else names[::-1]:
                decoded = runs[name].side.decode(batch, PROMPT, WARM_UP, STEPS[batch], seed=number * 100 + batch)
                runs[name].rounds[batch].append(decoded)
    return runs


def streamed(shape: Shape, model: Path, logs: Path, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Tokens per second at batch 1 with every decoder layer on disk, and bytes per sweep: `bf16` and `int4`."""
    threads = options.threads or os.cpu_count() or 1
    found: dict[str, tuple[float, float]] = {}
    with ExitStack() as stack:
        runs = {}
        for name, precision in (("bf16", "source"), ("int4", "auto")):
            settings = settings_for(shape, logs / "cache", threads) | {
                "placement": {"rules": [{"pattern": "layers", "tier": "nvme"}]},
                "precision": {"nvme": precision, "adaptive_rules": [{"pattern": "layers", "precision": "int4"}]},
            }
            runs[name] = start_raytier(stack, model, logs, f"streamed-{name}", settings)
        for run in runs.values():
            run.side.decode(1, PROMPT, 0, 2)
        for number in range(options.rounds or (2 if options.quick else 5)):
            for run in runs.values():
                run.rounds[1].append(run.side.decode(1, PROMPT, 1, STREAMED_STEPS, seed=number))
        for name, run in runs.items():
            counters = run.side.call("counters")
            found[name] = run.rate(1), counters["bytes_streamed"] / counters["steps"]
    return found


def results(runs: dict[str, Run], from_disk: dict[str, tuple[float, float]]) -> dict[str, dict[str, Any]]:
    table: dict[str, dict[str, Any]] = {}
    for name, precision, batch, gate, goal in RATIOS:
        ours, theirs = runs.get(precision), runs.get(PEERS[precision])
        if ours is None or theirs is None:
            continue
        pairs = zip(ours.rounds[batch], theirs.rounds[batch], strict=True)
        value = median(a.tokens_per_s / b.tokens_per_s for a, b in pairs)
        unit = f"x tokens/s of llama.cpp {PEERS[precision]} at batch {batch}"
        table[name] = {"value": round(value, 3), "gate": gate, "goal": goal, "unit": unit}
    if from_disk:
        value = from_disk["int4"][0] / from_disk["bf16"][0]
        unit = "x tokens/s of bf16, layers on disk, batch 1"
        table["quant.int4.streamed"] = {"value": round(value, 3), "gate": 3.0, "goal": 3.0, "unit": unit}
    return table


def show(console: Console, shape: Shape, runs: dict[str, Run], from_disk: dict[str, tuple[float, float]]) -> None:
    console.print(f"{shape.parameters / 1e9:.2f} B parameters, {shape.nbytes / 1e6:.0f} MB in bf16")
    table = Table(title="tokens per second of decoding, median of the rounds (lowest to highest)")
    for column in ("side", "weights, MB", *(f"batch {batch}" for batch in BATCHES)):
        table.add_column(column, justify="left" if column == "side" else "right")
    for run in runs.values():
        rates = {batch: [r.tokens_per_s for r in run.rounds[batch]] for batch in BATCHES}
        cells = [f"{run.rate(b):.1f} ({min(rates[b]):.1f} to {max(rates[b]):.1f})" for b in BATCHES]
        nbytes = run.about.get("resident_bytes")
        table.add_row(run.side.name, f"{nbytes / 1e6:.0f}" if nbytes else "-", *cells)
    for name, (rate, nbytes) in from_disk.items():
        table.add_row(f"raytier {name}, layers on disk", f"{nbytes / 1e6:.0f} a sweep", f"{rate:.2f}", "-")
    console.print(table)
    if from_disk:
        limit = from_disk["bf16"][1] / from_disk["int4"][1]
        console.print(f"bytes per sweep, bf16 over int4: {limit:.2f}")
    rows = Table()
    for column in ("id", "measured", "gate", "goal", ""):
        rows.add_column(column)
    for name, row in results(runs, from_disk).items():
        rows.add_row(name, str(row["value"]), f"at least {row['gate']}", f"at least {row['goal']}", row["unit"])
    console.print(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantised decoding against llama.cpp's Q8_0 and Q4_0.")
    parser.add_argument("--quick", action="store_true", help="a 300 MB model, two rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rounds", type=int, help="five, at least, for a result that counts (quick: 2)")
    parser.add_argument("--threads", type=int, help="CPU threads of every side (all cores)")
    parser.add_argument("--only", action="append", choices=list(PEERS), help="these precisions alone, nothing streamed")
    parser.add_argument("--dir", default="/var/tmp", help="where the model is written")
    arguments = parser.parse_args()
    console = Console(width=130)
    shape = LLAMA_QUICK if arguments.quick else LLAMA_1B
    console.print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} CPUs at the start")
    for line in missing("llama"):
        console.print(f"left out: {line}")
    with ExitStack() as stack:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
        model = stack.enter_context(random_model(shape, arguments.dir))
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raytier-quant-", dir=arguments.dir)))
        try:
            with ExitStack() as sides:
                runs = resident(sides, shape, model, logs, arguments)
            from_disk = {} if arguments.only else streamed(shape, model, logs, arguments)
        except SideError as error:
            raise SystemExit(str(error)) from None
        show(console, shape, runs, from_disk)
    console.print(f"load average {os.getloadavg()[0]:.2f} at the end")
    if arguments.json:
        print(json.dumps(results(runs, from_disk)))


if __name__ == "__main__":
    main()
