"""Prefix hits in device, host and disk against recomputing (T7), and what a replay finds again (T8).

What runs: a Llama-shaped bf16 model of random weights (0.15 B parameters), resident on a CPU, through `raytier.LLM`,
one request at a time. Prefixes of 32 to 8192 tokens (`--quick` to 2048), each another text; time to first token as the
caller of the engine sees it.

For every length: computed anew; found on the device; then given up on the device and found in the host's memory; then
given up in both and found on disk. "load" is what happens when the engine is told to load, "auto" is what it chooses by
what it has measured.

- T7.host, T7.disk: time to first token of a load, over its limit: one decode step of this run and the bytes of the
  prefix at the measured rate of the tier (a plain copy of memory; O_DIRECT reads). Median over 512 tokens and more.
- T7.choice: "auto" over the better of "load" and "compute"; per length the median over the rounds, then of the tiers
  and lengths the worst.
- T8.found: prompts of four times the device's KV, three times in the same order: of the blocks that the third replay
  looks for, how many it finds.

Why it is fair: the same engine, model and prompts within a round; rates are measured on the same machine in this run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from random import Random
from statistics import median
from typing import Any

os.environ.setdefault("RAY_worker_niceness", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from random_model import LLAMA_QUICK, Shape, random_model
from rich.console import Console
from rich.table import Table

from raytier.engine.outputs import OutputDelta
from raytier.engine.sampling_params import SamplingParams
from raytier.kv.cache import KVCache
from raytier.kv.costs import KVCosts
from raytier.llm import LLM

ONE = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=1, ignore_eos=True)
FEW = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=9, ignore_eos=True)
TIERS = ("host", "disk")


def first_token(llm: LLM, prompt: list[int]) -> float:
    """Seconds until the first token."""
    arrived: SimpleQueue[OutputDelta] = SimpleQueue()
    began = time.perf_counter()
    llm.engine.submit(prompt, ONE, arrived.put)
    delta = arrived.get()
    seconds = time.perf_counter() - began
    if delta.error is not None:
        raise SystemExit(delta.error)
    return seconds


def give_up(llm: LLM, tier: str) -> None:
    """Leave nothing on the device, and for "disk" nothing in the host's memory, but what is there below."""
    wait_idle(llm)
    llm.engine.with_kv(lambda kv: kv.evict(kv.num_blocks))
    first_token(llm, [1])  # carries the orders out
    wait_idle(llm)
    if tier == "disk":
        llm.engine.with_kv(_forget_host)


def _forget_host(kv: KVCache) -> None:
    assert kv.lower is not None
    for index in kv.lower.host:
        index.clear()


def wait_idle(llm: LLM) -> None:
    while llm.engine.with_kv(lambda kv: kv.num_used or (kv.lower is not None and kv.lower.has_writes)):
        time.sleep(0.005)


def always_load(kv: KVCache) -> KVCosts | None:
    """Let the engine load whatever is found; the costs by which it chose until now."""
    assert kv.lower is not None
    costs = kv.costs
    kv.attach(kv.lower)
    return costs


def choose_by(costs: KVCosts | None, kv: KVCache) -> None:
    """Let it choose again."""
    assert kv.lower is not None
    kv.attach(kv.lower, costs)


def measure(llm: LLM, lengths: list[int], rounds: int, console: Console) -> dict[str, dict[str, Any]]:
    """T7: all lengths, `rounds` times."""
    rng, vocab = Random(0), llm.manifest.vocab_size
    seconds: dict[tuple[int, str, str], list[float]] = {}
    steps = []
    for number in range(rounds + 1):  # the first one warms up, and teaches the costs
        for length in lengths:
            prompt = [rng.randrange(1, vocab) for _ in range(length + 1)]
            cold = first_token(llm, prompt)
            warm = first_token(llm, prompt)
            began = time.perf_counter()
            llm.engine.generate([prompt], FEW)
            steps.append((time.perf_counter() - began) / 9)
            for tier in TIERS:
                found = {"compute": cold, "device": warm}
                for what in ("load", "auto"):
                    give_up(llm, tier)
                    if what == "load":
                        costs = llm.engine.with_kv(always_load)
                        found[what] = first_token(llm, prompt)
                        llm.engine.with_kv(partial(choose_by, costs))
                    else:
                        found[what] = first_token(llm, prompt)
                if number:
                    for what, value in found.items():
                        seconds.setdefault((length, tier, what), []).append(value)
    rates = {"host": llm.rates.memory_copy_bytes_per_s or 4e9, "disk": llm.rates.disk_read_bytes_per_s}
    step, rows = median(steps), []
    over: dict[str, list[float]] = {tier: [] for tier in TIERS}
    worst = 0.0
    table = Table(title=f"time to first token in ms; a decode step takes {step * 1e3:.1f}")
    for column in ("tokens", "tier", "compute", "device", "load", "auto", "limit", "load / limit", "auto / better"):
        table.add_column(column, justify="right")
    for length in lengths:
        for tier in TIERS:
            values = {what: median(seconds[length, tier, what]) for what in ("compute", "device", "load", "auto")}
            limit = step + length * llm.manifest.kv_token_bytes / rates[tier]
            chosen = values["auto"] / min(values["load"], values["compute"])
            if length >= 512:
                over[tier].append(values["load"] / limit)
            worst = max(worst, chosen)
            rows.append((length, tier, values, limit))
            texts = [f"{value * 1e3:.1f}" for value in (*values.values(), limit)]
            table.add_row(str(length), tier, *texts, f"{values['load'] / limit:.2f}", f"{chosen:.2f}")
    console.print(table)
    result = {f"T7.{tier}": row(median(over[tier]), 1.5, 1.15, "of its limit", lower=True) for tier in TIERS}
    result["T7.choice"] = row(worst, 1.10, 1.02, "of the better of load and compute", lower=True)
    return result


def replay(llm: LLM, console: Console) -> dict[str, dict[str, Any]]:
    """T8: four times the device's KV, three times."""
    llm.engine.with_kv(always_load)
    llm.engine.with_kv(lambda kv: kv.clear())
    rng, size = Random(1), llm.plan.devices[0].block_size
    blocks = 4 * llm.engine.with_kv(lambda kv: kv.num_blocks)
    length = 16 * size
    prompts = [[rng.randrange(1, llm.manifest.vocab_size) for _ in range(length + 1)] for _ in range(blocks // 16)]
    found = 0.0
    for number in range(3):
        before = llm.stats().kv
        llm.engine.generate(prompts, ONE)
        now = llm.stats().kv
        found = (now.hits - before.hits) / (len(prompts) * length)
        console.print(f"replay {number + 1}: {found:.1%} of {len(prompts)} prompts of {length} tokens found")
    return {"T8.found": row(found, 0.99, 1.0, "of the blocks, third replay")}


def row(value: float, gate: float, goal: float, unit: str, *, lower: bool = False) -> dict[str, Any]:
    more = {"lower_is_better": True} if lower else {}
    return {"value": round(value, 4), "gate": gate, "goal": goal, "unit": unit} | more


def start(model: Path, **kv: Any) -> LLM:
    return LLM(
        str(model),
        tiers={"device": {"max_mb": 2048}, "nvme": {"min_free_gb": 0}},
        kv={"disk_gb": 1, "disk_once": True, **kv},
        compute={"device": "cpu"},
        cache_dir=str(model / "cache"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Prefix hits on every tier (T7) and replays (T8).")
    parser.add_argument("--quick", action="store_true", help="prefixes up to 2048 tokens, fewer rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--dir", default="/var/tmp", help="directory on the disk to measure, not a tmpfs")
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} CPUs at the start")
    lengths = [32, 128, 512, 2048] if arguments.quick else [32, 128, 512, 1024, 2048, 4096, 8192]
    shape = Shape(**{**vars(LLAMA_QUICK), "context": max(lengths) + 64})
    with random_model(shape, arguments.dir) as model:
        blocks = (max(lengths) + 64) // 16 + 2
        with start(model, max_blocks=blocks, host_mb=768) as llm:
            result = measure(llm, lengths, 2 if arguments.quick else 5, console)
        with start(model, max_blocks=66, host_mb=16 if arguments.quick else 0) as llm:
            result |= replay(llm, console)
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
