"""D6, D7: 340 MB of weights through a quarter of that, in reads of megabytes: tokens, counters, memory."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray

from raytier import LLM
from raytier.checkpoint.describe import describe_model
from raytier.checkpoint.manifest import ModelManifest
from raytier.config import MIB
from raytier.engine.sampling_params import SamplingParams
from raytier.planner.placement import plan_weights
from tests.integration.conftest import LARGE_VOCAB
from tests.integration.offline import check_ledger, check_streamed, closing, greedy, quarter, swept_bytes
from tests.local_engine import local_engine
from tests.models import random_prompts, transformers_greedy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

COUNT = 5
HOST_MB = 64
PROMPTS = random_prompts(3, 40, vocab=LARGE_VOCAB)
GREEDY = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=COUNT, ignore_eos=True)
SETTINGS: dict[str, Any] = {
    "kv": {"max_blocks": 17, "expected_sequences": 2, "expected_context": 128},
    "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 64},
}


def tiers(manifest: ModelManifest, io_mb: int) -> dict[str, Any]:
    """A quarter of the weights on the device, nothing in the host pool, reads of up to `io_mb`."""
    return {"device": {"max_mb": quarter(manifest)}, "host": {"max_mb": 0}, "nvme": {"io_mb": io_mb, "io_threads": 2}}


@pytest.fixture(scope="module")
def wanted(large_dir: Path) -> list[list[int]]:
    return transformers_greedy(large_dir, PROMPTS, COUNT)


@pytest.fixture(scope="module")
def manifest(large_dir: Path) -> ModelManifest:
    return describe_model(str(large_dir)).manifest


def taken(pid: int) -> int:
    """Anonymous memory of a process and the shared pages it has touched (the arena), in bytes; 0 when it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(number) * 1024 for number in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE))


class Watch:
    """Most memory that a process takes from `start` on, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.footprint = self.peak = self.looks = 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, pid: int) -> None:
        self.footprint = taken(pid)
        self._thread = threading.Thread(target=self._run, args=(pid,), daemon=True)
        self._thread.start()

    def _run(self, pid: int) -> None:
        while not self._end.is_set():
            self.peak = max(self.peak, taken(pid))
            self.looks += 1
            time.sleep(0.003)

    @property
    def running(self) -> bool:
        return self._thread is not None

    def stop(self) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join()


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Watch the DeviceActor from the moment in which the group plans: it is there and holds no model yet."""
    watch = Watch()

    def plan_then_load(*args: Any, **kwargs: Any) -> Any:
        names = [a["name"] for a in ray.util.list_named_actors(all_namespaces=True)]
        (name,) = (n for n in names if re.fullmatch(r"raytier:llm-\w+:device:0", n))
        watch.start(ray.get(ray.get_actor(name, "raytier").status.remote()).pid)
        return plan_weights(*args, **kwargs)

    monkeypatch.setattr("raytier.actors.node.plan_weights", plan_then_load)
    try:
        yield watch
    finally:
        watch.stop()


def test_a_quarter_in_memory(
    ray_session: None,
    large_dir: Path,
    manifest: ModelManifest,
    wanted: list[list[int]],
    cache_dir: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Within budget and two layers while it loads, serves, and moves layers between all tiers that there are."""
    budgets = tiers(manifest, 4) | {"host": {"max_mb": HOST_MB}}
    rules = [{"pattern": "gate_proj", "tier": "host"}]
    with (
        watched(monkeypatch) as watch,
        closing(LLM(str(large_dir), tiers=budgets, placement={"rules": rules}, cache_dir=cache_dir, **SETTINGS)) as (
            llm,
            _,
        ),
    ):
        assert watch.running
        assert greedy(llm, PROMPTS, COUNT) == wanted
        check_streamed(llm, manifest)
        check_ledger(llm, PROMPTS, COUNT)
        plan, stats, device = llm.plan, llm.stats(), llm.status().device
        before_moves = watch.peak
        with ThreadPoolExecutor() as pool:
            for layer in range(4):
                running = pool.submit(greedy, llm, PROMPTS, COUNT)
                for destination in ("nvme", "host", "device", "nvme", "device", "host"):
                    llm.transfer(layer=layer, destination=destination).result(60)
                assert running.result() == wanted
        moved = {p.name for p in llm.layers() if p.tier is not plan.tier_of[p.name]}
        arena = llm.status().host.touched

    assert manifest.nbytes > 300e6
    assert plan.streamed_bytes == swept_bytes(manifest, plan) > manifest.nbytes * 0.5
    assert stats.total.bytes_read / stats.total.reads > MIB, "large reads, between what lies elsewhere"
    assert moved

    budget = plan.devices[0].budget_bytes
    assert budget <= manifest.nbytes // 4
    held = device.resident_bytes + device.ring_bytes
    assert held + device.kv_bytes <= budget
    layer_bytes = max(sum(p.nbytes for p in manifest.layer_parameters(n)) for n in range(manifest.num_layers))
    assert watch.looks > 100
    assert arena <= HOST_MB * MIB
    for peak, what in ((before_moves, "loading and serving"), (watch.peak, "transfers")):
        used = peak - watch.footprint
        limit = budget + HOST_MB * MIB + 2 * layer_bytes
        assert held < used <= limit, f"{what}: {used / MIB:.0f} MB taken, {limit / MIB:.0f} allowed"


@pytest.mark.parametrize("io_mb", [4, 16])
def test_reads_of_any_size(large_dir: Path, manifest: ModelManifest, wanted: list[list[int]], io_mb: int) -> None:
    with local_engine(large_dir, tiers=tiers(manifest, io_mb), **SETTINGS) as local:
        outputs = local.engine.generate(PROMPTS, GREEDY)
        assert [list(o.token_ids) for o in outputs] == wanted
        local.check_bytes()
