"""`raytier.LLM`: the same tokens wherever the weights are, exact counters, one call per step, nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.actor import ActorMethod

from raytier import LLM
from raytier.checkpoint.describe import describe_model
from raytier.checkpoint.manifest import ModelManifest, Role
from raytier.config import MIB, parse_config
from raytier.engine.step import StepBatch
from raytier.errors import (
    BudgetError,
    CheckpointError,
    ConfigurationError,
    EngineDeadError,
    InvalidRequestError,
    ModelLoadingError,
    ResourceNotAvailableError,
)
from raytier.hardware.inventory import take_inventory
from raytier.hardware.rates import DEFAULT_RATES
from raytier.planner.placement import plan_weights
from raytier.planner.plan import Tier, WeightPlan
from tests.integration.application import eventually, has_torch, is_alive, ours, pid_of, repr_of
from tests.models import random_prompts, transformers_greedy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PROMPTS = random_prompts(5, 33, 12)
COUNT = 10
KV = {"max_blocks": 17, "expected_sequences": 2, "expected_context": 64}
SCHEDULER = {"max_num_seqs": 8, "max_num_batched_tokens": 64}


@contextmanager
def closing(llm: LLM) -> Iterator[tuple[LLM, dict[str, Any]]]:
    """The LLM and its actors by role; closed afterwards, and nothing of it may be left."""
    app = llm.status().device.name.split(":")[1]
    actors = {role: ray.get_actor(f"raytier:{app}:{role}:0", "raytier") for role in ("device", "host", "disk", "kv")}
    pids = {role: pid_of(actor) for role, actor in actors.items()}
    try:
        yield llm, actors
    finally:
        llm.close()
    del actors
    nothing_is_left(pids.values())
    with pytest.raises(EngineDeadError):
        llm.generate([[1, 2]], max_tokens=1)
    with pytest.raises(EngineDeadError, match="have ended"):
        llm.status()
    llm.close()


def nothing_is_left(pids: Any = ()) -> None:
    """No actor, no placement group of an LLM, none of these processes."""
    eventually(lambda: not any(is_alive(pid) for pid in pids))
    eventually(lambda: not [a for a in ray.util.list_named_actors(all_namespaces=True) if ":llm-" in a["name"]])
    ours = lambda group: group["state"] != "REMOVED" and "SERVE" not in group["name"]  # noqa: E731
    eventually(lambda: not [g for g in ray.util.placement_group_table().values() if ours(g)])


def generate(llm: LLM) -> list[list[int]]:
    return [list(c.token_ids) for c in llm.generate(PROMPTS, temperature=0, ignore_eos=True, max_tokens=COUNT)]


def swept_bytes(manifest: ModelManifest, plan: WeightPlan) -> int:
    """Parameter bytes that every step streams from disk: all that is there but an embedding, of which rows are read."""
    on_disk = [p for p in manifest.parameters if plan.tier_of[p.name] is Tier.NVME]
    return sum(p.nbytes for p in on_disk if p.role is not Role.EMBEDDING or manifest.tied)


def check_streamed(llm: LLM, manifest: ModelManifest) -> None:
    """Every byte that steps streamed is in the counters, of the engine and of the actors."""
    stats, swept = llm.stats(), swept_bytes(manifest, llm.plan)
    embedding = manifest.by_name[manifest.embedding]
    row = embedding.nbytes // embedding.shape[0] if llm.plan.tier_of[embedding.name] is Tier.NVME else 0
    rows = stats.total.bytes_streamed - stats.steps * swept
    assert (rows % row == 0 and stats.steps <= rows // row <= stats.total.num_tokens) if row else rows == 0
    assert stats.total.bytes_read >= stats.total.bytes_streamed
    status = eventually(lambda: (s := llm.status()) and s.disk.bytes_read == stats.total.bytes_read and s)
    assert status.disk.reads == stats.total.reads
    assert status.disk.errors == 0
    assert status.device.bytes_read >= stats.total.bytes_read, "prefetches for the next step come on top"


def check_ledger(llm: LLM) -> None:
    """The ledger saw blocks come and go, and holds none."""
    steps = llm.stats().steps
    kv = eventually(lambda: (s := llm.status().kv) and not s.used_blocks and s.allocations and s)
    assert kv.active_sequences == 0
    assert kv.failures == 0
    assert kv.allocations == sum(-(-(len(prompt) + COUNT - 1) // 16) for prompt in PROMPTS)
    (engine,) = kv.engines.values()
    assert engine.leased_blocks == kv.total_blocks == llm.plan.devices[0].kv_blocks - 1
    assert engine.last_step <= steps, "one report per step at most"


@pytest.fixture(scope="module")
def wanted(layered_dir: Path) -> list[list[int]]:
    tokens = transformers_greedy(layered_dir, PROMPTS, COUNT)
    assert len({tuple(each) for each in tokens}) == len(PROMPTS)
    return tokens


@pytest.fixture(scope="module")
def manifest(layered_dir: Path) -> ModelManifest:
    return describe_model(str(layered_dir)).manifest


@pytest.fixture
def make_llm(ray_session: None, layered_dir: Path, cache_dir: str) -> Callable[..., LLM]:
    def make(**tiers: Any) -> LLM:
        return LLM(
            str(layered_dir), tiers=tiers, kv=KV, scheduler=SCHEDULER, compute={"threads": 1}, cache_dir=cache_dir
        )

    return make


def quarter(manifest: ModelManifest) -> float:
    """A quarter of the weights, in MB: what a device gets that holds weights, ring, KV and activations in it."""
    return manifest.nbytes / 4 / MIB


def test_resident_with_one_call_per_actor_and_step(
    make_llm: Callable[..., LLM], manifest: ModelManifest, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(make_llm(device={"max_mb": 64}, host={"max_mb": 0})) as (llm, actors):
        calls: Counter[str] = Counter()
        submit = ActorMethod._remote

        def counted(method: Any, *args: Any, **kwargs: Any) -> Any:
            calls[method._method_name] += 1
            return submit(method, *args, **kwargs)

        monkeypatch.setattr(ActorMethod, "_remote", counted)
        assert generate(llm) == wanted
        steps = llm.stats().steps
        assert steps >= COUNT
        assert calls.pop("step") == steps
        eventually(lambda: calls["record"])  # the last one comes after the tokens
        assert 0 < calls.pop("report") <= steps
        assert 0 < calls.pop("record") <= steps
        assert not calls, "what else is called while steps run?"
        monkeypatch.undo()

        assert llm.plan.nvme_bytes == llm.plan.host_bytes == 0
        status = llm.status()
        assert status.device.steps == steps
        assert status.device.resident_bytes >= manifest.nbytes
        assert (status.device.host_bytes, status.device.ring_bytes, status.host.capacity) == (0, 0, 0)
        check_streamed(llm, manifest)
        check_ledger(llm)

        assert repr_of(actors["device"]) == "DeviceActor(cpu, 1 threads)"
        assert repr_of(actors["host"]) == "HostPoolActor(0 MiB)"
        assert repr_of(actors["disk"]).startswith("DiskTierActor(")
        assert repr_of(actors["kv"]) == f"KVBlockActor({status.kv.total_blocks + 1} blocks of 16 tokens)"
        assert {role: has_torch(pid_of(actor)) for role, actor in actors.items()} == {
            "device": True,
            "host": False,
            "disk": False,
            "kv": False,
        }

        with pytest.raises(InvalidRequestError, match="temperature"):
            llm.generate("Hello", temperature=-1)
        again = ray.get(actors["device"].status.remote()).steps
        with pytest.raises(RuntimeError, match="one call per step"):
            ray.get(actors["device"].step.remote(StepBatch("layered", llm.engine.config.epoch, again, ())))


def test_a_quarter_in_memory(make_llm: Callable[..., LLM], manifest: ModelManifest, wanted: list[list[int]]) -> None:
    with closing(make_llm(device={"max_mb": quarter(manifest)}, host={"max_mb": 0})) as (llm, _):
        assert generate(llm) == wanted
        assert llm.plan.host_bytes == 0
        assert llm.plan.streamed_bytes > manifest.nbytes * 0.75
        check_streamed(llm, manifest)
        check_ledger(llm)
        device = llm.status().device
        held = device.resident_bytes + device.ring_bytes + device.kv_bytes
        assert held <= llm.plan.devices[0].budget_bytes <= manifest.nbytes // 4


def test_the_rest_in_the_host_pool(
    make_llm: Callable[..., LLM], manifest: ModelManifest, wanted: list[list[int]]
) -> None:
    """Host memory is the device's own on a CPU node: used where it lies, in an arena that both map."""
    with closing(make_llm(device={"max_mb": quarter(manifest)}, host={"max_mb": 64})) as (llm, actors):
        assert generate(llm) == wanted
        assert llm.plan.host_bytes > manifest.nbytes / 2
        assert llm.plan.nvme_bytes == 0
        check_streamed(llm, manifest)
        check_ledger(llm)
        status = llm.status()
        assert status.host.owners == {"layered": status.device.host_bytes}
        assert llm.plan.host_bytes <= status.device.host_bytes <= status.host.capacity
        for role, mapped in (("device", True), ("host", True), ("disk", False), ("kv", False)):
            assert ("memfd:raytier-host" in Path(f"/proc/{pid_of(actors[role])}/maps").read_text()) == mapped

        # A dead device ends a batch; `closing` then sees that nothing stays.
        before = llm.stats().generated_tokens
        with ThreadPoolExecutor() as pool:
            batch = pool.submit(llm.generate, PROMPTS, temperature=0, ignore_eos=True, max_tokens=60)
            eventually(lambda: llm.stats().generated_tokens > before, every=0)
            os.kill(status.device.pid, signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="DeviceActor died"):
                batch.result()
        with pytest.raises(EngineDeadError, match="device:0 is gone"):
            llm.status()


def test_the_plan_is_known_before(make_llm: Callable[..., LLM], layered_dir: Path, manifest: ModelManifest) -> None:
    """What the cap of a quarter means can be computed without an actor."""
    config = parse_config(
        {
            "models": [{"model_id": "layered", "source_path": str(layered_dir)}],
            "tiers": {"device": {"max_mb": quarter(manifest)}, "host": {"max_mb": 0}},
            "kv": KV,
            "scheduler": SCHEDULER,
        }
    )
    plan = plan_weights(manifest, take_inventory(), DEFAULT_RATES, config, kind="cpu")
    assert plan.streamed_bytes == swept_bytes(manifest, plan) > manifest.nbytes * 0.75


@pytest.mark.parametrize(
    ("model", "settings", "error", "message"),
    [
        ("tiny", {"tiers": {"device": {"max_mbs": 1}}}, ConfigurationError, "tiers.device.max_mbs: unknown key"),
        ("relative", {}, ConfigurationError, "must be an absolute path"),
        ("/does/not/exist", {}, CheckpointError, "/does/not/exist"),
        ("tiny", {"tiers": {"device": {"max_mb": 0.5}}}, BudgetError, "raise tiers.device.max_mb to"),
        ("tiny", {}, ModelLoadingError, "there is no disk; mount one"),
    ],
)
def test_what_fails_says_why_and_leaves_nothing(
    ray_session: None,
    tiny_dir: Path,
    cache_dir: str,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    settings: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    class NoDisk:
        """A DiskTierActor that cannot be made; only the last case comes as far as that. Local, so it travels alone."""

        def __init__(self, name: str) -> None:
            raise ResourceNotAvailableError("there is no disk; mount one")

        def open_model(self, manifest: ModelManifest) -> None: ...

    monkeypatch.setattr("raytier.actors.group.DiskTierActor", NoDisk)
    with pytest.raises(error, match=message) as raised:
        LLM(str(tiny_dir) if model == "tiny" else model, **{"cache_dir": cache_dir} | settings)
    assert "Traceback" not in str(raised.value)
    assert len(str(raised.value)) < 1500
    nothing_is_left()


SCRIPT = """
import json, os, sys
import psutil, ray
from raytier import LLM

def report(**what):
    print(json.dumps(what), flush=True)

try:
    LLM("/does/not/exist")
except Exception as error:
    report(error=type(error).__name__, ray=ray.is_initialized())
rules = [{"pattern": "mlp", "tier": "nvme"}]
with LLM("builtin:demo", placement={"rules": rules}, tiers={"host": {"max_mb": 0}}, cache_dir=sys.argv[1]) as llm:
    (said,) = llm.chat([{"role": "user", "content": "Who are you?"}], temperature=0, ignore_eos=True, max_tokens=4)
    report(tokens=said.completion_tokens, streamed=llm.stats().total.bytes_streamed, torch="torch" in sys.modules)
psutil.wait_procs(psutil.Process().children(recursive=True), timeout=20)
report(ray=ray.is_initialized(), children=[p.cmdline() for p in psutil.Process().children(recursive=True)])
"""


def test_a_script_without_a_cluster(cache_dir: str, short_tmp: Path) -> None:
    """H8: it starts a Ray of its own and ends it, this process loads no torch, and no file of raytier stays."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, cache_dir],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TMPDIR": str(short_tmp)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert run.returncode == 0, run.stderr
    failed, done, closed = (json.loads(line) for line in run.stdout.splitlines() if line.startswith("{"))
    assert failed == {"error": "CheckpointError", "ray": False}
    assert done["tokens"] == 4
    assert done["streamed"] > 0
    assert not done["torch"]
    assert closed == {"ray": False, "children": []}
    assert ours(short_tmp) == {"ray"}, "only Ray's logs stay"
