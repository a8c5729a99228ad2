"""T4: what lossless compression of bf16 weights saves, what decoding costs, and what `compression: auto` makes of both.

What runs: the Llama-shaped bf16 model of random weights of `streaming.py` (2.2 GB; `--quick` 300 MB), whose weights are
normally distributed, as trained ones nearly are.

- T4.size: coded bytes (`zstd-planes`, heads of frames included) / bytes, of a sample of all its matrices.
- T4.decode: bytes per second into which one thread decodes them / into which plain zstd (level 1, same frames, same
  process, in turn with it) decodes the same weights. Only the decoders' time counts for both.
- T4.streamed, T4.throttled: tokens per second at batch 1 with `compression: auto` over without, everything of the
  layers but what half of the model's bytes hold on the device being streamed; on the machine's disk as it is, and with
  its reads throttled to 1 GB/s (cgroup v1, blkio) for the whole process tree.

Why it is fair: both sides decode the same memory with the same threads, in turn. Both models run in one application
each under the same budgets, and rounds alternate between them; the coded one has been converted before. The rates that
`auto` goes by are measured in the run, under the throttle where there is one. Medians over the rounds are reported.
Without the right to make a cgroup, T4.throttled is left out and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("RAY_worker_niceness", "0")

import numpy as np
import ray
from random_model import LLAMA_1B, LLAMA_QUICK, Shape, random_model
from rich.console import Console
from streaming import decode, steps_for

from raytier import LLM
from raytier.checkpoint.describe import describe_model
from raytier.codecs import planes
from raytier.codecs.codec import FRAME_BYTES, Codec, Decoder, Encoder
from raytier.codecs.planes import ELEMENTS

MIB = 2**20
THROTTLE = 1_000_000_000
_BLKIO = Path("/sys/fs/cgroup/blkio")
_SAMPLE_FRAMES = 24


def sample(model: Path) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    """Frames from all over the matrices of a model."""
    manifest = describe_model(str(model)).manifest
    extents = [e for p in manifest.parameters if len(p.shape) > 1 for e in p.extents if e.nbytes >= FRAME_BYTES]
    frames = []
    for extent in extents[:: max(1, len(extents) // _SAMPLE_FRAMES)]:
        with open(manifest.files[extent.file].path, "rb") as file:
            data = os.pread(file.fileno(), FRAME_BYTES, extent.offset + (extent.nbytes - FRAME_BYTES) // 2)
        frames.append(np.frombuffer(data, np.uint8))
    return frames


def measure_codecs(model: Path, cache_dir: str, rounds: int) -> tuple[float, list[tuple[float, float]]]:
    """Coded over plain bytes, and per round the decode rates of byte planes and of plain zstd, one thread."""
    planes.use_kernels(cache_dir)
    frames, element, decoder = sample(model), ELEMENTS["bfloat16"], Decoder()
    into = np.ones((len(frames), FRAME_BYTES), np.uint8)
    coded = {}
    for codec in (Codec("zstd-planes"), Codec("zstd", 1)):
        encoder = Encoder(codec, element)
        coded[codec] = [np.frombuffer(bytes(encoder.encode(frame)), np.uint8) for frame in frames]
    ratio = sum(map(len, coded[Codec("zstd-planes")])) / sum(map(len, frames))
    rates = []
    for _ in range(rounds):
        seconds = []
        for codec, parts in coded.items():
            began = time.perf_counter()
            for number, part in enumerate(parts):
                decoder.decode(codec, element, part, into[number])
            seconds.append(time.perf_counter() - began)
            assert all(np.array_equal(a, b) for a, b in zip(into, frames, strict=True)), "not what was coded"
        rates.append((into.nbytes / seconds[0], into.nbytes / seconds[1]))
    return ratio, rates


def start(model: Path, shape: Shape, cache: Path, compression: str) -> LLM:
    return LLM(
        str(model),
        tiers={
            "device": {"max_mb": shape.nbytes / 2 / MIB, "reserved_mb": 0, "max_utilization": 1},
            "host": {"max_mb": 0},
            "nvme": {"min_free_gb": 1},
        },
        compression={"nvme": compression},
        kv={"expected_sequences": 1, "expected_context": 128},
        scheduler={"max_num_seqs": 1, "max_num_batched_tokens": 128},
        compute={"device": "cpu"},
        cache_dir=str(cache),
    )


def streamed(model: Path, shape: Shape, cache: Path, rounds: int, seconds: float, group: Path | None) -> dict[str, Any]:
    """What `compare` finds on the disk as it is, and throttled where there is a group to throttle."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=100 * MIB)
    try:
        with start(model, shape, cache, "none") as plain:
            found = {"T4.streamed": compare(plain, model, shape, cache, rounds, seconds)}
            if group is not None:
                device = os.stat(model).st_dev
                limit = f"{os.major(device)}:{os.minor(device)} {THROTTLE}"
                (group / "blkio.throttle.read_bps_device").write_text(limit)
                (cache / "rates.json").unlink()  # measured again, under the throttle
                found["T4.throttled"] = compare(plain, model, shape, cache, rounds, seconds)
            return found
    finally:
        ray.shutdown()


def compare(plain: LLM, model: Path, shape: Shape, cache: Path, rounds: int, seconds: float) -> dict[str, Any]:
    """Tokens per second without and with `auto`, by round, and what `auto` chose."""
    with start(model, shape, cache, "auto") as auto:
        steps = {llm: steps_for(llm, 1, seconds) for llm in (plain, auto)}
        found: dict[LLM, list[float]] = {plain: [], auto: []}
        for number in range(rounds):
            for llm in (plain, auto) if number % 2 else (auto, plain):
                found[llm].append(1 / decode(llm, 1, steps[llm]).step_seconds)
        (rates,) = json.loads((cache / "rates.json").read_text())["rates"].values()
        return {
            "plain": found[plain],
            "auto": found[auto],
            "predicted": [llm.plan.predictions[0].tokens_per_second for llm in (plain, auto)],
            "chosen": ", ".join({p.codec for p in auto.plan.placements} - {"none"}) or "none",
            "disk": rates["disk_read_bytes_per_s"],
            "decode": rates["decode_bytes_per_s"],
        }


@contextmanager
def cgroup() -> Iterator[Path]:
    """A cgroup whose reads can be limited; OSError where none can be made."""
    group = _BLKIO / f"raytier-codecs-{os.getpid()}"
    group.mkdir()
    try:
        yield group
    finally:
        for _ in range(50):
            with suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def run_child(arguments: argparse.Namespace, model: Path, cache: Path, group: Path | None) -> dict[str, Any]:
    """`streamed` in a process tree of its own, in a cgroup."""
    command = [sys.executable, __file__, "--child", str(model), str(cache), str(group or "")]
    command += ["--rounds", str(arguments.rounds)] + (["--quick"] if arguments.quick else [])

    def enter() -> None:
        if group is not None:
            (group / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(command, preexec_fn=enter, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def gain(result: dict[str, Any]) -> float:
    return median(a / p for a, p in zip(result["auto"], result["plain"], strict=True))


def show(console: Console, name: str, result: dict[str, Any]) -> None:
    console.print(
        f"{name}: disk {result['disk'] / 1e9:.2f} GB/s, all cores decode {result['decode'] / 1e9:.2f}; auto "
        f"chose {result['chosen']}; tokens/s {median(result['plain']):.2f} without, {median(result['auto']):.2f} with "
        f"(predicted {result['predicted'][0]:.2f} and {result['predicted'][1]:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="T4: lossless compression of weights, and streaming with it.")
    parser.add_argument("--quick", action="store_true", help="a 300 MB model, shorter windows")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--rounds", type=int, help="default 5, with --quick 3; at least five for a result that counts")
    parser.add_argument("--dir", default="/var/tmp", help="directory on the disk to measure, not a tmpfs")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (3 if arguments.quick else 5)
    shape = LLAMA_QUICK if arguments.quick else LLAMA_1B
    seconds = 0.4 if arguments.quick else 3.0
    if arguments.child:
        model, cache = map(Path, arguments.child[:2])
        group = Path(arguments.child[2]) if arguments.child[2] else None
        print(json.dumps(streamed(model, shape, cache, arguments.rounds, seconds, group)))
        return
    console = Console(width=130)
    rows: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        model = stack.enter_context(random_model(shape, arguments.dir))
        cache = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="raytier-codecs-", dir=arguments.dir)))
        ratio, rates = measure_codecs(model, str(cache), 2 * arguments.rounds)
        ours, theirs = (median(rate[i] for rate in rates) for i in (0, 1))
        console.print(f"one thread decodes {ours / 1e9:.2f} GB/s of byte planes, {theirs / 1e9:.2f} GB/s of plain zstd")
        rows["T4.size"] = {"value": round(ratio, 4), "gate": 0.69, "goal": 0.68, "unit": "of bf16"}
        rows["T4.size"]["lower_is_better"] = True
        relative = median(a / b for a, b in rates)
        rows["T4.decode"] = {"value": round(relative, 3), "gate": 1.0, "goal": 1.3, "unit": "x plain zstd, per core"}
        try:
            group = stack.enter_context(cgroup())
        except OSError as error:
            group = None
            console.print(f"T4.throttled is left out: no cgroup of blkio can be made here ({error})")
        gates = {"T4.streamed": (0.97, 1.0), "T4.throttled": (1.15, 1.35)}
        for name, result in run_child(arguments, model, cache, group).items():
            show(console, name, result)
            gate, goal = gates[name]
            rows[name] = {"value": round(gain(result), 3), "gate": gate, "goal": goal}
            rows[name]["unit"] = "x tokens/s of no compression"
    for name, row in rows.items():
        bound = "at most" if row.get("lower_is_better") else "at least"
        console.print(f"{name}: {row['value']} (gate: {bound} {row['gate']}, goal {row['goal']}) {row['unit']}")
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
