"""`raytier.LLM`: resident and in the host pool (with most of it on disk: test_memory.py), calls, errors, clean ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.actor import ActorMethod

from raytier import LLM
from raytier.actors.executor import RemoteExecutor
from raytier.checkpoint.describe import describe_model
from raytier.checkpoint.manifest import ModelManifest
from raytier.engine.step import StepBatch
from raytier.errors import (
    BudgetError,
    CheckpointError,
    ConfigurationError,
    EngineDeadError,
    GenerationError,
    InvalidRequestError,
    ModelLoadingError,
    ResourceNotAvailableError,
)
from tests.integration.application import eventually, has_torch, is_alive, ours, pid_of, repr_of
from tests.integration.offline import check_ledger, check_streamed, closing, greedy, nothing_is_left, quarter
from tests.models import random_prompts, transformers_greedy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

PROMPTS = random_prompts(5, 33, 12)
COUNT = 10
SETTINGS: dict[str, Any] = {
    "kv": {"max_blocks": 17, "expected_sequences": 2, "expected_context": 64},
    "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": 64},
    "compute": {"threads": 1},
}


@pytest.fixture(scope="module")
def wanted(layered_dir: Path) -> list[list[int]]:
    tokens = transformers_greedy(layered_dir, PROMPTS, COUNT)
    assert len({tuple(each) for each in tokens}) == len(PROMPTS)
    return tokens


@pytest.fixture(scope="module")
def manifest(layered_dir: Path) -> ModelManifest:
    return describe_model(str(layered_dir)).manifest


def test_a_quarter_on_the_device_and_the_rest_in_the_host_pool(
    ray_session: None,
    layered_dir: Path,
    cache_dir: str,
    manifest: ModelManifest,
    wanted: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Host memory is the device's own on a CPU node: used where it lies, in an arena that both map."""
    # Without a disk tier, which the planner prefers to host memory where its reads hide behind compute.
    tiers = {"device": {"max_mb": quarter(manifest)}, "host": {"max_mb": 64}, "nvme": {"enabled": False}}
    with closing(LLM(str(layered_dir), tiers=tiers, cache_dir=cache_dir, **SETTINGS)) as (llm, actors):
        calls: Counter[str] = Counter()
        submit = ActorMethod._remote

        def counted(method: Any, *args: Any, **kwargs: Any) -> Any:
            calls[method._method_name] += 1
            return submit(method, *args, **kwargs)

        monkeypatch.setattr(ActorMethod, "_remote", counted)
        assert greedy(llm, PROMPTS, COUNT) == wanted
        steps = llm.stats().steps
        assert steps >= COUNT
        eventually(lambda: calls["record"])  # the last one comes after the tokens
        assert 0 < calls.pop("report") <= steps
        assert 0 < calls.pop("record") <= steps
        assert not calls, "steps are no Ray calls; what else is called while they run?"
        monkeypatch.undo()

        assert llm.plan.host_bytes > manifest.nbytes / 2
        assert llm.plan.nvme_bytes == llm.stats().total.bytes_streamed == 0
        check_streamed(llm, manifest)
        check_ledger(llm, PROMPTS, COUNT)
        status = llm.status()
        assert status.device.resident_bytes + status.device.kv_bytes <= manifest.nbytes // 4
        assert status.host.owners == {"layered": status.device.host_bytes + status.device.kv_host_bytes}
        assert llm.plan.host_bytes <= status.device.host_bytes <= status.host.capacity

        assert repr_of(actors["device"]) == "DeviceActor(cpu, 1 threads)"
        assert repr_of(actors["host"]) == f"HostPoolActor({status.host.capacity / 2**20:.0f} MiB)"
        assert repr_of(actors["disk"]).startswith("DiskTierActor(")
        assert repr_of(actors["kv"]) == f"KVBlockActor(layered: {status.kv['layered'].total_blocks} blocks)"
        for role, actor in actors.items():
            pid = pid_of(actor)
            assert has_torch(pid) == (role == "device")
            arena = "memfd:raytier-host" in Path(f"/proc/{pid}/maps").read_text()
            assert arena == (role in ("device", "host"))

        with pytest.raises(InvalidRequestError, match="temperature"):
            llm.generate("Hello", temperature=-1)
        with pytest.raises(RuntimeError, match="each is sent once"):
            RemoteExecutor(actors["device"]).step(StepBatch("layered", llm.engine.config.epoch, steps, ()))

        # What dies is named, and `closing` sees that nothing stays.
        os.kill(status.host.pid, signal.SIGKILL)
        eventually(lambda: not is_alive(status.host.pid))
        with pytest.raises(EngineDeadError, match="host:0 is gone"):
            llm.status()
        check_sampling(llm)
        before = llm.stats().generated_tokens
        with ThreadPoolExecutor() as pool:
            batch = pool.submit(llm.generate, PROMPTS, temperature=0, ignore_eos=True, max_tokens=60)
            eventually(lambda: llm.stats().generated_tokens > before, every=0)
            os.kill(status.device.pid, signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="DeviceActor died"):
                batch.result()


def check_sampling(llm: LLM) -> None:
    """What only travels when it is asked for: samples, logprobs, grammars and their errors."""
    params: dict[str, Any] = {"temperature": 1.0, "seed": 3, "max_tokens": 9, "repetition_penalty": 1.2}
    results = llm.generate(PROMPTS[:2], n=2, logprobs=1, prompt_logprobs=0, ignore_eos=True, **params)
    assert [result.index for result in results] == [0, 1, 0, 1]
    for result, prompt in zip(results[::2], PROMPTS, strict=False):
        assert result.prompt_logprobs is not None
        assert [entry and entry.token_id for entry in result.prompt_logprobs] == [None, *prompt[1:]]
        assert [entry.token_id for entry in result.logprobs] == list(result.token_ids)
        assert all(entry.top[0][1] >= entry.logprob for entry in result.logprobs)
    for result in llm.generate(PROMPTS, structured_outputs={"regex": "[a-f]{2}"}, n=2, **params):
        assert re.fullmatch("[a-f]{2}", result.text) and result.finish_reason == "stop"
    with pytest.raises(InvalidRequestError, match="unclosed group"):
        llm.generate(PROMPTS, structured_outputs={"regex": "a("})
    with pytest.raises(GenerationError, match="leave no token"):
        llm.generate(PROMPTS, allowed_token_ids=[5], structured_outputs={"choice": ["zz"]})


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

        def __init__(self, *_: object) -> None:
            raise ResourceNotAvailableError("there is no disk; mount one")

    monkeypatch.setattr("raytier.actors.group.remote_disk_actor", lambda: ray.remote(NoDisk))
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

model, prompts, count, settings = json.loads(sys.argv[1])
try:
    LLM("/does/not/exist")
except Exception as error:
    report(error=type(error).__name__, ray=ray.is_initialized())
with LLM(model, **settings) as llm:
    results = llm.generate(prompts, temperature=0, ignore_eos=True, max_tokens=count)
    said = llm.chat([{"role": "user", "content": "Hello you"}], temperature=0, ignore_eos=True, max_tokens=4)
    report(
        tokens=[result.token_ids for result in results],
        chat=said[0].completion_tokens,
        streamed=llm.stats().total.bytes_streamed,
        resident=llm.status().device.resident_bytes,
        torch="torch" in sys.modules,
    )
psutil.wait_procs(psutil.Process().children(recursive=True), timeout=20)
report(ray=ray.is_initialized(), children=[p.cmdline() for p in psutil.Process().children(recursive=True)])
"""


def test_a_script_without_a_cluster(
    layered_dir: Path, cache_dir: str, short_tmp: Path, manifest: ModelManifest, wanted: list[list[int]]
) -> None:
    """H8, everything resident: it starts a Ray of its own and ends it, loads no torch, and leaves no file."""
    settings = SETTINGS | {"cache_dir": cache_dir, "tiers": {"device": {"max_mb": 64}, "host": {"max_mb": 0}}}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([str(layered_dir), PROMPTS, COUNT, settings])],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "TMPDIR": str(short_tmp)},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert run.returncode == 0, run.stderr
    failed, done, closed = (json.loads(line) for line in run.stdout.splitlines() if line.startswith("{"))
    assert failed == {"error": "CheckpointError", "ray": False}
    assert done["tokens"] == wanted
    assert done["chat"] == 4
    assert done["streamed"] == 0
    assert done["resident"] >= manifest.nbytes
    assert not done["torch"]
    assert closed == {"ray": False, "children": []}
    assert ours(short_tmp) == {"ray"}, "only Ray's logs stay"
