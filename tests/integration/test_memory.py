"""D6, D7: 340 MB of weights through a quarter of that, in reads of megabytes: tokens, counters, anonymous memory."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
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
from tests.integration.offline import check_ledger, check_streamed, closing, greedy, quarter, swept_bytes
from tests.local_engine import local_engine
from tests.models import random_prompts, save_model, transformers_greedy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

COUNT = 5
VOCAB = 8192
PROMPTS = random_prompts(3, 40, vocab=VOCAB)
GREEDY = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=COUNT, ignore_eos=True)
SETTINGS: dict[str, Any] = {
    "kv": {"max_blocks": 17, "expected_sequences": 2, "expected_context": 128},
    "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 64},
}


def tiers(manifest: ModelManifest, io_mb: int) -> dict[str, Any]:
    """A quarter of the weights on the device, nothing in the host pool, reads of up to `io_mb`."""
    return {"device": {"max_mb": quarter(manifest)}, "host": {"max_mb": 0}, "nvme": {"io_mb": io_mb, "io_threads": 2}}


@pytest.fixture(scope="module")
def large_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    path = tmp_path_factory.mktemp("models") / "large"
    return save_model(
        path,
        "llama",
        tokenizer_dir,
        fill=lambda parameter: parameter.normal_(std=0.05),
        vocab_size=VOCAB,
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )


@pytest.fixture(scope="module")
def wanted(large_dir: Path) -> list[list[int]]:
    return transformers_greedy(large_dir, PROMPTS, COUNT)


@pytest.fixture(scope="module")
def manifest(large_dir: Path) -> ModelManifest:
    return describe_model(str(large_dir)).manifest


def anonymous(pid: int) -> int:
    """Anonymous memory of a process in bytes; 0 when it has ended."""
    try:
        found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


class Watch:
    """Largest anonymous memory of a process from `start` on, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.footprint = self.peak = self.looks = 0
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, pid: int) -> None:
        self.footprint = anonymous(pid)
        self._thread = threading.Thread(target=self._run, args=(pid,), daemon=True)
        self._thread.start()

    def _run(self, pid: int) -> None:
        while not self._end.is_set():
            self.peak = max(self.peak, anonymous(pid))
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

    monkeypatch.setattr("raytier.actors.group.plan_weights", plan_then_load)
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
    with (
        watched(monkeypatch) as watch,
        closing(LLM(str(large_dir), tiers=tiers(manifest, 4), cache_dir=cache_dir, **SETTINGS)) as (llm, _),
    ):
        assert watch.running
        assert greedy(llm, PROMPTS, COUNT) == wanted
        check_streamed(llm, manifest)
        check_ledger(llm, PROMPTS, COUNT)
        plan, stats, device = llm.plan, llm.stats(), llm.status().device

    assert manifest.nbytes > 300e6
    assert plan.host_bytes == 0
    assert plan.streamed_bytes == swept_bytes(manifest, plan) > manifest.nbytes * 0.7
    assert stats.total.bytes_read / stats.total.reads > 2 * MIB, "most reads have the full 4 MB"

    budget = plan.devices[0].budget_bytes
    assert budget <= manifest.nbytes // 4
    held = device.resident_bytes + device.ring_bytes
    assert held + device.kv_bytes <= budget
    layer = max(sum(p.nbytes for p in manifest.layer_parameters(index)) for index in range(manifest.num_layers))
    taken = watch.peak - watch.footprint
    assert watch.looks > 100
    assert held < taken <= budget + 2 * layer, f"{taken / MIB:.0f} MB taken, the budget has {budget / MIB:.0f}"


@pytest.mark.parametrize("io_mb", [4, 16])
def test_reads_of_any_size(large_dir: Path, manifest: ModelManifest, wanted: list[list[int]], io_mb: int) -> None:
    with local_engine(large_dir, tiers=tiers(manifest, io_mb), **SETTINGS) as local:
        outputs = local.engine.generate(PROMPTS, GREEDY)
        assert [list(o.token_ids) for o in outputs] == wanted
        local.check_bytes()
