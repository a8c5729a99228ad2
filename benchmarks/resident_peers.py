"""T11: a model that fits into memory, on CPU in bf16, against the better of vLLM-CPU and llama.cpp.

What runs: a Llama-shaped bf16 model of random weights (1.1 B parameters, 2.2 GB; `--quick` 0.15 B, 300 MB), made for
the run. Greedy decoding at batch 1, 8 and 32 from prompts of 64 tokens, different for every sequence and round.

- raytier: `raytier.LLM`, everything resident: the engine here, a DeviceActor in its own process, a message per step.
- vLLM: its offline engine, stepped in its own process (an engine process beside it would only take time from it on two
  cores), compiled (`--quick`: eager, compiling takes long), OpenMP threads bound to the cores, Intel OpenMP and, where
  the system has it, tcmalloc preloaded as its documentation advises.
- llama.cpp: the same bf16 weights as GGUF, `llama_batch` with one token of every sequence, the C sampler, built for
  this machine's instructions.

T11.b1, T11.b8, T11.b32: tokens per second of raytier / of the better peer at that batch, the median of the rounds. Only
the steps count that give every sequence of the batch a token: prefill is left out on all sides.

Why it is fair: as many compute threads on every side, all at the same priority (Ray would run its workers at nice 15);
rounds interleave the sides, a ratio is made of neighbours within one round; the sides that wait are stopped (SIGSTOP),
so that neither spinning threads nor Ray's daemons take time from the one that runs. No prefix cache anywhere.
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

BATCHES = (1, 8, 32)
TARGETS = {1: (0.9, 1.0), 8: (1.1, 1.3), 32: (1.2, 1.5)}
PROMPT = 64
WARM_UP = 3
STEPS = {1: 40, 8: 24, 32: 12}
QUICK_STEPS = {1: 16, 8: 10, 32: 6}
#: Tokens of one sequence: prompt, window and what sequences decode while others are still being prefilled.
CONTEXT = 256
PEERS = ("vllm", "llama")
MIB = 2**20


@dataclass
class Run:
    """A side and its rounds by batch."""

    side: Side
    about: dict[str, Any]
    rounds: dict[int, list[Decoded]] = field(default_factory=lambda: {batch: [] for batch in BATCHES})

    def rate(self, batch: int) -> float:
        return median(r.tokens_per_s for r in self.rounds[batch])


def preload(python: Path) -> str:
    """Libraries that vLLM asks to have preloaded: Intel's OpenMP of its environment, the system's tcmalloc."""
    found = [*python.parent.parent.glob("lib/libiomp5.so")]
    for directory in ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64"):
        found += sorted(Path(directory).glob("libtcmalloc_minimal.so.4"))[:1]
    return ":".join(str(path) for path in found)


def start(stack: ExitStack, name: str, shape: Shape, model: Path, logs: Path, options: argparse.Namespace) -> Run:
    """Start a side and let it load the model."""
    threads = options.threads or os.cpu_count() or 1
    sequences = max(BATCHES)
    log = logs / f"{name}.log"
    if name == "raytier":
        one = stack.enter_context(side(name, sys.executable, "run_raytier.py", log))
        settings = {
            "tiers": {
                "device": {"max_mb": 1.5 * shape.nbytes / MIB + 512, "reserved_mb": 0, "max_utilization": 1},
                "host": {"max_mb": 0},
            },
            "kv": {"expected_sequences": sequences, "expected_context": CONTEXT},
            "scheduler": {"max_num_seqs": sequences},
            "compute": {"device": "cpu", "threads": threads},
            "cache_dir": str(model / "cache"),  # rates are measured for this run
        }
        about = one.call("load", path=str(model), settings=settings)
        if about["streamed_bytes"]:
            raise SystemExit("the model does not fit into this machine's memory: nothing to compare")
    elif name == "vllm":
        python = python_of("vllm")
        assert python is not None
        environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_CACHE_ROOT": str(logs / "vllm"),
            "OMP_NUM_THREADS": str(threads),
            "LD_PRELOAD": preload(python),
        } | dict(pair.split("=", 1) for pair in options.vllm_env)
        one = stack.enter_context(side(name, python, "run_vllm.py", log, environment=environment))
        eager = {"enforce_eager": True} if options.quick else {}
        about = one.call("load", path=str(model), context=CONTEXT, sequences=sequences, options=eager)
    else:
        one = stack.enter_context(side(name, python_of("llama"), "run_llama.py", log))
        about = one.call(
            "load",
            path=str(model / "model.gguf"),
            context=sequences * CONTEXT,
            sequences=sequences,
            threads=threads,
        )
    return Run(one, about)


def results(runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
    peers = [runs[name] for name in PEERS if name in runs]
    table: dict[str, dict[str, Any]] = {}
    if not peers or "raytier" not in runs:
        return table
    for batch in BATCHES:
        best = max(peers, key=lambda run: run.rate(batch))
        pairs = zip(runs["raytier"].rounds[batch], best.rounds[batch], strict=True)
        value = median(ours.tokens_per_s / theirs.tokens_per_s for ours, theirs in pairs)
        gate, goal = TARGETS[batch]
        unit = f"x tokens/s of {best.side.name} at batch {batch}"
        table[f"T11.b{batch}"] = {"value": round(value, 3), "gate": gate, "goal": goal, "unit": unit}
    return table


def show(console: Console, shape: Shape, runs: dict[str, Run]) -> None:
    console.print(f"{shape.parameters / 1e9:.2f} B parameters, {shape.nbytes / 1e6:.0f} MB, prompts of {PROMPT} tokens")
    table = Table(title="tokens per second of decoding, median of the rounds (lowest to highest)")
    for column in ("side", "threads", *(f"batch {batch}" for batch in BATCHES), "prefill at 32"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for name, run in runs.items():
        cells = []
        for batch in BATCHES:
            rates = [r.tokens_per_s for r in run.rounds[batch]]
            cells.append(f"{run.rate(batch):.1f} ({min(rates):.1f} to {max(rates):.1f})")
        prefill = median(32 * PROMPT / r.first_s for r in run.rounds[32])
        table.add_row(name, str(run.about["threads"]), *cells, f"{prefill:.0f}")
    console.print(table)
    rows = Table()
    for column in ("id", "measured", "gate", "goal", ""):
        rows.add_column(column)
    for name, row in results(runs).items():
        rows.add_row(name, str(row["value"]), f"at least {row['gate']}", f"at least {row['goal']}", row["unit"])
    console.print(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="T11: a model that fits, against vLLM-CPU and llama.cpp.")
    parser.add_argument("--quick", action="store_true", help="a 300 MB model, vLLM without compiling")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rounds", type=int, help="five, at least, for a result that counts (quick: 2)")
    parser.add_argument("--threads", type=int, help="CPU threads of every side (all cores)")
    parser.add_argument("--only", action="append", choices=["raytier", *PEERS], help="these sides alone")
    parser.add_argument("--vllm-env", action="append", default=[], metavar="NAME=VALUE", help="to try a setting")
    parser.add_argument("--dir", default="/var/tmp", help="where the model is written")
    arguments = parser.parse_args()
    console = Console(width=130)
    shape = LLAMA_QUICK if arguments.quick else LLAMA_1B
    steps = QUICK_STEPS if arguments.quick else STEPS
    console.print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} CPUs at the start")
    wanted = [name for name in PEERS if name in (arguments.only or PEERS)]
    for line in missing(*wanted):
        console.print(f"left out: {line}")
    names = ["raytier", *(name for name in wanted if python_of(name) is not None)]
    if arguments.only and "raytier" not in arguments.only:
        names.remove("raytier")
    with ExitStack() as stack:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
        model = stack.enter_context(random_model(shape, arguments.dir))
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raytier-t11-")))
        if "llama" in names:
            command = [str(python_of("llama")), str(HERE / "run_llama.py"), str(model), str(model / "model.gguf")]
            subprocess.run(command, check=True)
        try:
            runs = {name: start(stack, name, shape, model, logs, arguments) for name in names}
            for run in runs.values():  # kernels chosen, pages touched
                run.side.decode(max(BATCHES), PROMPT, 0, 2)
            for number in range(arguments.rounds or (2 if arguments.quick else 5)):
                for batch in BATCHES:
                    for name in names if number % 2 else names[::-1]:
                        run = runs[name]
                        decoded = run.side.decode(batch, PROMPT, WARM_UP, steps[batch], seed=number * 100 + batch)
                        run.rounds[batch].append(decoded)
        except SideError as error:
            raise SystemExit(str(error)) from None
        show(console, shape, runs)
    console.print(f"load average {os.getloadavg()[0]:.2f} at the end")
    if arguments.json:
        print(json.dumps(results(runs)))


if __name__ == "__main__":
    main()
