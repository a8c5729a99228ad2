"""T1: decoding a model larger than the memory it may use, against accelerate's disk offload and llama.cpp's mmap.

What runs: a Llama-shaped bf16 model of random weights (3.0 B parameters, 6.0 GB; `--quick` 1.1 B, 2.2 GB), made for
the run, greedy decoding at batch 1. Every side has a memory cgroup of its own (4 GiB; `--quick` 1.875) around its whole
tree of processes: for raytier that is Ray with its daemons, the actors and the driver. Whoever looks for the limit
where a container would show it finds it, Ray's memory monitor too.

- raytier: `raytier.LLM`, its plan made by itself from the limit that it finds; no part of the device budget held back.
- accelerate: transformers with a `device_map` that leaves the decoder layers and the head on disk; it reads them from
  the same safetensors file. Twice, the faster counts: all of them ("accelerate"), and with as many layers kept in
  memory as the limit allows, spread evenly ("accelerate+kept", not with `--quick`).
- llama.cpp: mmap of a GGUF file with the same bf16 weights, written outside of the limit.

T1.accelerate, T1.llama: tokens per second of raytier / of the peer, the median of the rounds.

Why it is fair: rounds interleave the sides, the ratio is made of neighbours within one round, and the sides that wait
are stopped (SIGSTOP). Same threads, same priority. Page cache counts for whoever reads a page first, so both files
leave it before the sides start (checked with mincore) and the peers read them inside their limit. A window begins after
the first steps of a run, when each side holds in memory what it is going to hold. raytier's file reads bypass
the page cache, so that they neither help nor burden the peer that reads the same file.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import shutil
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
from peers.memory_limit import MemoryLimit, NoMemoryLimit, memory_limit
from peers.protocol import Decoded
from peers.side import HERE, Side, SideError, side
from random_model import GIB, LLAMA_1B, LLAMA_3B, Shape, random_model
from rich.console import Console
from rich.table import Table

MIB = 2**20
#: Memory that transformers needs beside the layers it keeps: Python, torch, one layer read twice (file and copy).
HF_PROCESS_BYTES = 900 * MIB
PROMPT = 16
GATE, GOAL = 2.5, 4.0
#: The sides beside raytier: their environments, and which of them an id is about.
ENVIRONMENTS = {"accelerate": "hf", "accelerate+kept": "hf", "llama": "llama"}
IDS = {"T1.accelerate": ("accelerate", "accelerate+kept"), "T1.llama": ("llama",)}


@dataclass(frozen=True)
class Load:
    """A shape with the limit under which it does not fit, and the length of the windows in steps."""

    shape: Shape
    limit: int
    steps: dict[str, int]
    warm_up: int
    peers: tuple[str, ...]


FULL = Load(LLAMA_3B, 4 * GIB, {"raytier": 12, "peer": 4}, 2, tuple(ENVIRONMENTS))
QUICK = Load(LLAMA_1B, int(1.875 * GIB), {"raytier": 4, "peer": 2}, 1, ("accelerate", "llama"))


@dataclass
class Run:
    """A side under its limit, and what it did."""

    side: Side
    limit: MemoryLimit
    about: dict[str, Any]
    rounds: list[Decoded] = field(default_factory=list)

    @property
    def rate(self) -> float:
        return median(r.tokens_per_s for r in self.rounds)


def cached_bytes(path: Path) -> int:
    """How much of a file is in the page cache."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    size = path.stat().st_size
    present = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with open(path, "rb") as file:
        length = ctypes.c_size_t(size)
        address = libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), ctypes.c_long(0))
        if address in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "mmap")
        try:
            if libc.mincore(ctypes.c_void_p(address), length, present):
                raise OSError(ctypes.get_errno(), "mincore")
        finally:
            libc.munmap(ctypes.c_void_p(address), length)
    return sum(bytes(present)) * mmap.PAGESIZE


def drop_from_cache(path: Path) -> None:
    """Write a file out and take it from the page cache.

    Raises:
        SystemExit: it stays there.
    """
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if (left := cached_bytes(path)) > path.stat().st_size / 100:
        raise SystemExit(f"{left / 1e6:.0f} MB of {path} stay in the page cache: what is measured then means nothing")


def hf_layers(load: Load) -> int:
    """Decoder layers that transformers can keep in memory under the limit; the embedding stays as well."""
    sizes = {name: 2 * shape[0] * shape[-1] for name, shape in load.shape.tensors() if len(shape) == 2}
    layer = sum(size for name, size in sizes.items() if name.startswith("model.layers.0."))
    room = load.limit - HF_PROCESS_BYTES - sizes["model.embed_tokens.weight"] - 2 * layer
    return max(0, min(load.shape.layers, int(room // layer)))


def gguf(model: Path) -> Path:
    """The model as a GGUF file beside it."""
    target = model / "model.gguf"
    python = python_of("llama")
    assert python is not None
    subprocess.run([str(python), str(HERE / "run_llama.py"), str(model), str(target)], check=True)
    return target


def start(
    stack: ExitStack, console: Console, name: str, load: Load, model: Path, logs: Path, options: argparse.Namespace
) -> Run:
    """Start a side under its limit and let it load the model."""
    threads = options.threads or os.cpu_count() or 1
    limit = stack.enter_context(memory_limit(f"raytier-{name}", load.limit))
    log = logs / f"{name}.log"
    if name == "raytier":
        one = stack.enter_context(side(name, sys.executable, "run_raytier.py", log, limit=limit))
        device = {"max_utilization": 1, "reserved_mb": 0} | ({"max_mb": options.max_mb} if options.max_mb else {})
        settings = {
            "tiers": {"device": device, "host": {"max_mb": 0}},
            "kv": {"expected_sequences": 1, "expected_context": 128},
            "scheduler": {"max_num_seqs": 1, "max_num_batched_tokens": 64},
            "compute": {"device": "cpu", "threads": threads},
            "compression": dict.fromkeys(("device", "nvme"), options.compression),
            "cache_dir": str(model / "cache"),  # rates are measured for this run
        }
        about = one.call("load", path=str(model), settings=settings)
    elif name.startswith("accelerate"):
        python = python_of("hf")
        one = stack.enter_context(
            side(name, python, "run_hf.py", log, limit=limit, environment={"OMP_NUM_THREADS": str(threads)})
        )
        layers = hf_layers(load) if name == "accelerate+kept" else 0
        about = one.call("load", path=str(model), threads=threads, resident_layers=layers, offload_dir=str(logs))
        console.print(f"{name}: {layers} of {load.shape.layers} layers in memory")
    else:
        python = python_of("llama")
        one = stack.enter_context(side(name, python, "run_llama.py", log, limit=limit))
        about = one.call(
            "load", path=str(model / "model.gguf"), context=256, sequences=1, threads=threads, batch_tokens=64
        )
    return Run(one, limit, about)


def results(runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
    table = {}
    for name, sides in IDS.items():
        if there := [runs[side] for side in sides if side in runs]:
            best = max(there, key=lambda run: run.rate)
            pairs = zip(runs["raytier"].rounds, best.rounds, strict=True)
            value = median(our.tokens_per_s / peer.tokens_per_s for our, peer in pairs)
            unit = f"x tokens/s of {best.side.name}"
            table[name] = {"value": round(value, 2), "gate": GATE, "goal": GOAL, "unit": unit}
    return table


def show(console: Console, load: Load, runs: dict[str, Run]) -> None:
    ours = runs["raytier"].about
    console.print(
        f"{load.shape.parameters / 1e9:.2f} B parameters, {load.shape.nbytes / 1e9:.2f} GB, limit "
        f"{load.limit / GIB:g} GiB; raytier: {ours['resident_bytes'] / 1e9:.2f} GB resident, ring "
        f"{ours['ring_bytes'] / 1e9:.2f} GB, {ours['streamed_bytes'] / 1e9:.2f} GB streamed per step"
    )
    table = Table(title="decoding at batch 1, median of the rounds (lowest to highest)")
    for column in ("side", "tokens/s", "step", "weights per second", "memory peak", "of it not reclaimable", "kills"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for name, run in runs.items():
        rates = [r.tokens_per_s for r in run.rounds]
        table.add_row(
            name,
            f"{run.rate:.3f} ({min(rates):.3f} to {max(rates):.3f})",
            f"{1e3 / run.rate:.0f} ms",
            f"{run.rate * load.shape.nbytes / 1e9:.2f} GB/s",
            f"{run.limit.peak_bytes() / GIB:.2f} GiB",
            f"{run.limit.unreclaimable_bytes() / GIB:.2f} GiB",
            str(run.limit.kills()),
        )
    console.print(table)
    rows = Table()
    for column in ("id", "measured", "gate", "goal", ""):
        rows.add_column(column)
    for name, row in results(runs).items():
        rows.add_row(name, str(row["value"]), f"at least {row['gate']}", f"at least {row['goal']}", row["unit"])
    console.print(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="T1: offloaded decoding against accelerate and llama.cpp.")
    parser.add_argument("--quick", action="store_true", help="a 2.2 GB model under 1.875 GiB, one round, short windows")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rounds", type=int, help="five, at least, for a result that counts (quick: 1)")
    parser.add_argument("--threads", type=int, help="CPU threads of every side (all cores)")
    parser.add_argument(
        "--compression",
        default="coded-exponents",
        choices=["none", "zstd-planes", "coded-exponents"],
        help="of raytier's weights on the device and on disk, without loss",
    )
    parser.add_argument("--max-mb", type=float, help="raytier's tiers.device.max_mb (its own choice)")
    parser.add_argument("--only", action="append", choices=list(ENVIRONMENTS), help="this peer alone")
    parser.add_argument("--dir", default="/var/tmp", help="directory on the disk to measure, not a tmpfs")
    arguments = parser.parse_args()
    console = Console(width=130)
    load = QUICK if arguments.quick else FULL
    console.print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} CPUs at the start")
    wanted = arguments.only or load.peers
    for line in missing(*dict.fromkeys(ENVIRONMENTS[name] for name in wanted)):
        console.print(f"left out: {line}")
    names = ["raytier", *(name for name in wanted if python_of(ENVIRONMENTS[name]) is not None)]
    needed, total = len(names) * load.limit + GIB, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > total:
        raise SystemExit(f"{len(names)} sides of {load.limit / GIB:g} GiB do not fit into this machine: see --only")
    with ExitStack() as stack:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
        model = stack.enter_context(random_model(load.shape, arguments.dir))
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raytier-t1-")))
        files = [model / "model.safetensors"]
        if "llama" in names:
            free, needed = shutil.disk_usage(model).free, load.shape.nbytes + GIB
            if free < needed:
                raise SystemExit(
                    f"{arguments.dir} has {free / GIB:.1f} GiB free, the GGUF file needs {needed / GIB:.1f}"
                )
            files.append(gguf(model))
        for file in files:
            drop_from_cache(file)
        try:
            runs = {name: start(stack, console, name, load, model, logs, arguments) for name in names}
            for number in range(arguments.rounds or (1 if arguments.quick else 5)):
                for name in names if number % 2 else names[::-1]:
                    run = runs[name]
                    steps = load.steps["raytier" if name == "raytier" else "peer"]
                    run.rounds.append(run.side.decode(1, PROMPT, load.warm_up, steps, seed=number))
        except NoMemoryLimit as error:
            raise SystemExit(
                f"no memory limit can be set here, and without one there is nothing to measure: {error}"
            ) from None
        except SideError as error:
            raise SystemExit(str(error)) from None
        show(console, load, runs)
    console.print(f"load average {os.getloadavg()[0]:.2f} at the end")
    if arguments.json:
        print(json.dumps(results(runs)))


if __name__ == "__main__":
    main()
