"""Operations of the block pool per second on one core, against vLLM's block pool in the same run.

Both replay the same trace (`peers/block_trace.py`): requests of 8 to 64 blocks, half of which begin with a part of one
of the last 200 requests; 64 run at a time. Each looks its hashes up, takes references to what is found, allocates the
rest, registers these under their hashes, and is freed when 64 others have come. The pool is full of cached blocks all
the time, so nearly every allocation gives one up. An operation is a block looked up, allocated or freed.

- pool.ops: operations per second, raytier over vLLM; the median of the rounds, which take turns.

Why it is fair: the same trace with the same hashes, calls as vLLM's own managers make them, each in the Python of its
own environment, one process at a time on one core; hashing is left out on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers.install import missing, python_of
from peers.side import Side
from rich.console import Console

RUNNING = 64


def main() -> None:
    parser = argparse.ArgumentParser(description="Operations of the block pool per second, against vLLM's.")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--blocks", type=int, default=8192, help="blocks of the pool")
    arguments = parser.parse_args()
    console = Console(width=120)
    console.print(f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} CPUs at the start")
    rounds, count = (3, 3000) if arguments.quick else (7, 10000)
    for line in missing("vllm"):
        console.print(line)
    peer = python_of("vllm")
    rates: dict[str, list[float]] = {"raytier": [], "vllm": []}
    with TemporaryDirectory() as logs:
        sides = {"raytier": Side("raytier", sys.executable, "run_pool_raytier.py", Path(logs) / "raytier.log")}
        try:
            if peer is not None:
                sides["vllm"] = Side("vllm", peer, "run_pool_vllm.py", Path(logs) / "vllm.log")
            for number in range(rounds):
                hits = set()
                for name, side in sides.items():
                    found = side.call("replay", blocks=arguments.blocks, count=count, running=RUNNING, seed=number)
                    rates[name].append(found["operations"] / found["seconds"])
                    hits.add(found["hits"])
                    console.print(f"{name:8} {rates[name][-1] / 1e6:.2f} M operations/s, {found['hits']:.0f} hits")
        finally:
            for side in sides.values():
                side.close()
    rows = {}
    if rates["vllm"]:
        ratio = median(a / b for a, b in zip(rates["raytier"], rates["vllm"], strict=True))
        console.print(f"pool.ops {ratio:.2f}")
        rows["pool.ops"] = {"value": round(ratio, 3), "gate": 1.0, "goal": None, "unit": "of vLLM's block pool"}
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
