"""D7, D6: 300 MB of weights through 120 MB of memory, in reads of megabytes: tokens, counters, anonymous memory."""

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
from raytier.config import MIB
from raytier.engine.sampling_params import SamplingParams
from raytier.planner.placement import plan_weights
from tests.local_engine import local_engine
from tests.models import random_prompts, save_model, transformers_greedy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

COUNT = 5
VOCAB = 8192
PROMPTS = random_prompts(3, 40, vocab=VOCAB)
GREEDY = SamplingParams(temperature=0, top_p=1, top_k=0, max_tokens=COUNT, ignore_eos=True)
DEVICE_MB = 120
SETTINGS: dict[str, Any] = {
    "tiers": {"device": {"max_mb": DEVICE_MB}, "host": {"max_mb": 0}, "nvme": {"io_mb": 4}},
    "kv": {"max_blocks": 33, "expected_sequences": 2, "expected_context": 256},
    "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 64},
}


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


def anonymous(pid: int) -> int:
    """Anonymous memory of a process in bytes."""
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


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


def test_a_large_model_in_little_memory(
    ray_session: None,
    large_dir: Path,
    wanted: list[list[int]],
    cache_dir: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with (
        watched(monkeypatch) as watch,
        LLM(str(large_dir), compute={"threads": 2}, cache_dir=cache_dir, **SETTINGS) as llm,
    ):
        assert watch.running
        outputs = llm.generate(PROMPTS, temperature=0, ignore_eos=True, max_tokens=COUNT)
        stats, status, plan = llm.stats(), llm.status(), llm.plan
    assert [list(o.token_ids) for o in outputs] == wanted

    size = sum(file.stat().st_size for file in large_dir.glob("*.safetensors"))
    assert size > 300e6
    assert plan.host_bytes == 0
    assert plan.streamed_bytes > size / 2
    row = 1024 * 4
    rows = stats.total.bytes_streamed - stats.steps * plan.streamed_bytes
    assert rows % row == 0
    assert rows // row <= stats.total.num_tokens
    assert stats.total.bytes_read / stats.total.reads > 2 * MIB, "most reads have the full 4 MB"

    manifest = describe_model(str(large_dir)).manifest
    layer = max(sum(p.nbytes for p in manifest.layer_parameters(index)) for index in range(manifest.num_layers))
    allowed = DEVICE_MB * MIB + 2 * layer
    taken = watch.peak - watch.footprint
    assert watch.looks > 100
    print(f"{taken / MIB:.0f} MB of anonymous memory, {allowed / MIB:.0f} MB allowed")  # noqa: T201
    assert taken <= allowed, f"{taken / MIB:.0f} MB, {allowed / MIB:.0f} allowed"
    assert taken > status.device.resident_bytes + status.device.ring_bytes, "the watch saw what the device holds"


@pytest.mark.parametrize("io_mb", [4, 16])
def test_reads_of_any_size(large_dir: Path, wanted: list[list[int]], io_mb: int) -> None:
    tiers = SETTINGS["tiers"] | {"nvme": {"io_mb": io_mb, "io_threads": 2}}
    with local_engine(large_dir, **SETTINGS | {"tiers": tiers}) as local:
        outputs = local.engine.generate(PROMPTS, GREEDY)
        assert [list(o.token_ids) for o in outputs] == wanted
        local.check_bytes()
