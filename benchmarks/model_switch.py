"""T6: from a request to a model that sleeps to its first token, over the limit; and what 20 switches leave in memory.

What runs: a Llama-shaped bf16 model of random weights (1.1 B parameters, 2.2 GB; `--quick` 0.15 B, 300 MB), made for
the run, under two ids of one models.yaml, behind `raytier.ModelManager` (the same actors as behind Serve; HTTP is not
part of the claim). The prefix cache is off, so every first token takes a prefill.

- T6.ram: the model sleeps with all of its weights in the host pool. A request of 64 tokens wakes it; seconds to the
  first token / the limit. The limit is the model's bytes copied from memory to memory, all cores, plus one prefill: a
  first token of the same prompt while the model is awake.
- T6.disk: the same with a host pool of nothing: the weights come from disk. The limit is a raw O_DIRECT read of the
  file (4 requests of 8 MiB in flight) into used buffers, plus one prefill.
- T6.growth: memory of all processes that this one has started (PSS, from /proc), after 20 switches between the two
  models / before, in percent. A switch: the one goes to sleep, a request wakes the other. Both have been awake and
  asleep twice before the first look.
- A cold load of the same model beside it: unloaded, its file out of the page cache, load and first token.

Why it is fair: raw rates, prefill, wake and cold load are measured in turn in every round, and ratios are of one
round, so a slower phase of a shared machine hits both sides; the median of the rounds counts. Neither limit counts the
first touch of new memory, which a wake cannot do without: its cost is shown.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import psutil
from cold_start import drop_from_cache, read_raw
from random_model import LLAMA_1B, LLAMA_QUICK, Shape, random_model
from rich.console import Console
from rich.table import Table

from raytier import ModelManager
from raytier.manager import LoadedModel

MIB = 2**20
PROMPT = [1 + 7 * i % 500 for i in range(64)]
SWITCHES = 20
#: Copied by one thread at a time.
PART = 8 * MIB


def copy_rates(nbytes: int, threads: int) -> tuple[float, float]:
    """Bytes per second of copies of `nbytes` bytes from memory to memory: to new memory, and to memory in use."""
    source = np.ones(nbytes, np.uint8)
    target = np.empty(nbytes, np.uint8)
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(2):
            began = time.perf_counter()
            list(pool.map(lambda at: np.copyto(target[at : at + PART], source[at : at + PART]), range(0, nbytes, PART)))
            rates.append(nbytes / (time.perf_counter() - began))
    return rates[0], rates[1]


def memory() -> int:
    """PSS of what this process has started, in bytes; the least of three looks, since Ray's own processes breathe."""
    looks = []
    for _ in range(3):
        time.sleep(0.5)
        total = 0
        for process in psutil.Process().children(recursive=True):
            try:
                lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            except OSError:  # it has ended
                continue
            total += next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        looks.append(total)
    return min(looks)


async def first_token(model: LoadedModel) -> float:
    """Seconds to the first token of a request, which wakes the model if it sleeps."""
    began = time.perf_counter()
    deltas = model.model_object.generate_stream(PROMPT, max_tokens=1, temperature=0, ignore_eos=True)
    async with aclosing(deltas):
        async for delta in deltas:
            if delta.token_ids:
                return time.perf_counter() - began
    raise SystemExit("a request ended without a token")


@dataclass(frozen=True)
class Round:
    """Seconds: of a wake to the first token, of a first token awake, of moving the bytes at the tier's rate (and, from
    RAM, into new memory), of a cold load."""

    wake: float
    prefill: float
    move: float
    new: float
    cold: float

    @property
    def ratio(self) -> float:
        return self.wake / (self.move + self.prefill)


def manager_of(directory: Path, shape: Shape, threads: int, host_mb: float) -> ModelManager:
    """A manager of the model in `directory` under two ids."""
    models = [
        f"- {{model_id: {name}, source_type: local, source_path: {directory / 'model'}, model_format: safetensors}}"
        for name in ("a", "b")
    ]
    file = directory / "models.yaml"
    file.write_text("\n".join(["models:", *models]) + "\n")
    settings: dict[str, Any] = {
        "tiers": {"device": {"max_mb": 1.25 * shape.nbytes / MIB + 512}, "host": {"max_mb": host_mb}},
        "kv": {"expected_sequences": 1, "expected_context": 256, "prefix_caching": False},
        "compute": {"device": "cpu", "threads": threads},
        "cache_dir": str(directory / "cache"),
    }
    return ModelManager(str(file), **settings)


def status_of(manager: ModelManager, model_id: str) -> str:
    return {each["model_id"]: each["status"] for each in manager.list_available_models()}[model_id]


async def wait_loaded(manager: ModelManager, model_id: str) -> None:
    while (status := status_of(manager, model_id)) == "loading":  # noqa: ASYNC110 - managers tell nobody
        await asyncio.sleep(0.01)
    if status != "loaded":
        raise SystemExit(f"the model is {status}")


async def measure(manager: ModelManager, directory: Path, shape: Shape, rounds: int, *, disk: bool) -> list[Round]:
    model, file = await manager.load_model("a"), directory / "model" / "model.safetensors"
    threads = os.cpu_count() or 1
    found = []
    for _ in range(rounds + 1):
        await first_token(model)
        await wait_loaded(manager, "a")
        prefill = median([await first_token(model) for _ in range(3)])
        await manager.sleep_model("a")
        if disk:
            drop_from_cache(file.parent)
            new = move = await asyncio.to_thread(read_raw, file, keep=False)
            drop_from_cache(file.parent)
        else:
            new, move = (shape.nbytes / rate for rate in await asyncio.to_thread(copy_rates, shape.nbytes, threads))
        wake = await first_token(model)
        await wait_loaded(manager, "a")
        await manager.unload_model("a")
        drop_from_cache(file.parent)
        began = time.perf_counter()
        await first_token(await manager.load_model("a"))
        cold = time.perf_counter() - began
        await wait_loaded(manager, "a")
        found.append(Round(wake, prefill, move, new, cold))
    await manager.unload_model("a")
    return found[1:]  # the first one starts threads, and compiles what is compiled once


async def growth(manager: ModelManager) -> tuple[int, int, float]:
    """Bytes of memory before and after the switches, and the median of their seconds."""
    models = {name: await manager.load_model(name) for name in ("a", "b")}
    for name in models:
        await wait_loaded(manager, name)
    await manager.sleep_model("b")
    seconds = []

    async def switch(number: int) -> None:
        awake, other = ("a", "b") if number % 2 == 0 else ("b", "a")
        began = time.perf_counter()
        await manager.sleep_model(awake)
        await first_token(models[other])
        seconds.append(time.perf_counter() - began)
        await wait_loaded(manager, other)

    for number in range(4):
        await switch(number)
    before = await asyncio.to_thread(memory)
    seconds.clear()
    for number in range(SWITCHES):
        await switch(number)
    return before, await asyncio.to_thread(memory), median(seconds)


def show(console: Console, shape: Shape, from_ram: list[Round], from_disk: list[Round]) -> None:
    table = Table(title=f"{shape.parameters / 1e9:.2f} B parameters, {shape.nbytes / 1e6:.0f} MB")
    for column in ("asleep in", "wake to first token", "bytes at the tier's rate", "one prefill", "over the limit"):
        table.add_column(column, justify="right")
    for name, rounds in (("RAM", from_ram), ("disk", from_disk)):
        wake, move, prefill = (median(getattr(r, field) for r in rounds) for field in ("wake", "move", "prefill"))
        low, high = min(r.wake for r in rounds), max(r.wake for r in rounds)
        table.add_row(
            name,
            f"{wake:.3f} s ({low:.3f} to {high:.3f})",
            f"{move:.3f} s ({shape.nbytes / move / 1e9:.2f} GB/s)",
            f"{prefill:.3f} s",
            f"{median(r.ratio for r in rounds):.2f}x",
        )
    console.print(table)
    cold = median(r.cold for r in [*from_ram, *from_disk])
    new = median(r.new for r in from_ram)
    console.print(f"a cold load to the first token: {cold:.3f} s; copying to new memory alone: {new:.3f} s")


async def run(arguments: argparse.Namespace, console: Console) -> dict[str, dict[str, Any]]:
    shape = LLAMA_QUICK if arguments.quick else LLAMA_1B
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    with random_model(shape, arguments.dir) as directory:
        model = directory / "model"
        model.mkdir()
        for path in list(directory.iterdir()):
            if path.is_file():
                path.rename(model / path.name)
        (directory / "cache").mkdir()
        async with manager_of(directory, shape, arguments.threads, 2.2 * shape.nbytes / MIB) as manager:
            from_ram = await measure(manager, directory, shape, rounds, disk=False)
            before, after, switch = await growth(manager)
        async with manager_of(directory, shape, arguments.threads, 0) as manager:
            from_disk = await measure(manager, directory, shape, rounds, disk=True)
    show(console, shape, from_ram, from_disk)
    console.print(
        f"memory before and after {SWITCHES} switches: {before / MIB:.0f} and {after / MIB:.0f} MiB; a switch takes "
        f"{switch:.3f} s (median)"
    )
    lower: dict[str, Any] = {"lower_is_better": True}
    over = {"gate": 1.5, "goal": 1.15, "unit": "x the limit", **lower}
    return {
        "T6.ram": {"value": round(median(r.ratio for r in from_ram), 2), **over},
        "T6.disk": {"value": round(median(r.ratio for r in from_disk), 2), **over},
        "T6.growth": {
            "value": round(100 * (after - before) / before, 2),
            "gate": 2,
            "goal": 0,
            "unit": f"% more memory after {SWITCHES} switches",
            **lower,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="T6: waking a model from RAM and from disk; growth over 20 switches.")
    parser.add_argument("--quick", action="store_true", help="a 300 MB model, three rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rounds", type=int, help="at least five for a result that counts")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads that compute")
    parser.add_argument("--dir", default="/var/tmp", help="directory on the disk to measure, not a tmpfs")
    arguments = parser.parse_args()
    console = Console(width=130)
    console.print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} CPUs at the start")
    results = asyncio.run(run(arguments, console))
    console.print(f"load average {os.getloadavg()[0]:.2f} at the end")
    for name, row in results.items():
        console.print(f"{name}: {row['value']} {row['unit']} (gate at most {row['gate']}, goal at most {row['goal']})")
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
