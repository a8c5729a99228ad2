"""H3, H6, H7, I4, E6, E7: models that come and go, layers that move, over HTTP, by handle and from the command line."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from ray import serve
from typer.testing import CliRunner, Result

from raytier.cli.main import app as cli
from raytier.errors import ConflictError, ModelNotFoundError, ParameterNotFoundError
from raytier.planner.plan import Tier
from raytier.serve import build_app
from tests.integration.application import GREEDY, Application, eventually, has_torch, is_alive
from tests.integration.conftest import LARGE_VOCAB
from tests.models import random_prompts, transformers_greedy

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

UP = "model.layers.1.mlp.up_proj.weight"
PROMPT = [5, 6, 7]


def raytier(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def where(http: httpx.Client, name: str) -> str:
    """Tier of a parameter, as the server tells."""
    placements = http.get("/api/plan").json()["placements"]
    return next(each["tier"] for each in placements if each["name"] == name)


@pytest.fixture
def http(served: Application) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url, timeout=60) as http:
        yield http


def test_status_names_what_is_there(served: Application, http: httpx.Client) -> None:
    served.generate(PROMPT, max_tokens=4)
    served.idle()
    status = http.get("/api/status").json()
    assert status["server_status"] == "running"
    assert status["model_status"]["status"] == "loaded"
    pids = served.pids()
    assert {each["role"]: each["pid"] for each in status["active_actors"]} == {
        role: pid for role, pid in pids.items() if role != "replica"
    }
    assert status["active_actors"][0]["name"].startswith("raytier:tiny:")
    assert Path(status["log_file_path"]).is_file()
    hardware = status["hardware_summary"]
    assert hardware["rates"]["disk_read_bytes_per_s"] > 0
    assert hardware["inventory"]["ram_total"] > 0
    tiers = {each["tier"]: each for each in hardware["tiers"]}
    assert set(tiers) == {"device", "host", "nvme"}
    assert tiers["host"]["used_bytes"] > 0
    assert tiers["nvme"]["bytes_read"] > 0
    by_handle = served.handle.status.remote().result(timeout_s=60)
    assert by_handle.model_status.model_dump() == status["model_status"]
    assert {each["path"] for each in hardware["inventory"]["disks"]} == {status["model_status"]["model_path"]}


def test_layers_and_plan_over_http_and_by_handle(served: Application, http: httpx.Client) -> None:
    steps = served.idle().steps
    served.generate(PROMPT, max_tokens=5)
    layers = http.get("/api/layers").json()
    by_handle = served.handle.layers.remote().result(timeout_s=60)
    assert [each.model_dump() for each in by_handle] == layers
    assert {each["access_count"] for each in layers} == {steps + 5}
    assert all(abs(each["last_access_timestamp"] - time.time()) < 60 for each in layers)
    assert next(each["current_device"] for each in layers if each["name"] == UP) == "nvme"
    plan = served.handle.plan.remote().result(timeout_s=60)
    assert plan.model_dump(mode="json") == http.get("/api/plan").json()
    assert plan.bytes_by_tier[Tier.NVME] == 4 * 48 * 32 * 4
    assert len(plan.predictions) == 3


def test_transfers_by_handle_and_from_the_command_line(served: Application, http: httpx.Client) -> None:
    wanted = served.generate(PROMPT, max_tokens=30)
    with ThreadPoolExecutor() as pool:
        running = pool.submit(served.generate, PROMPT, max_tokens=800)
        answer = served.handle.transfer_layer.remote(UP, "host", 1).result(timeout_s=60)
        assert (answer.source, answer.destination, answer.priority) == ("nvme", "host", 1)
        ended = served.handle.transfer_status.remote(answer.transfer_id, wait=True).result(timeout_s=60)
        assert (ended.status, ended.nbytes, ended.source) == ("completed", 48 * 32 * 4, "nvme")
        assert where(http, UP) == "host"

        done = raytier("transfer", "1", "nvme", "--url", served.url, "--wait", "--priority", "2")
        assert done.exit_code == 0, done.output
        assert "layer 1 is to be moved from device, host to nvme" in done.stdout
        assert re.search(r"completed: \S+ \wB in \S+ m?s", done.stdout)
        assert where(http, UP) == "nvme"
        queued = raytier("transfer", UP, "device:0", "--url", f"{served.url}/")
        assert queued.exit_code == 0
        transfer_id = re.search(r"\(transfer (\w+)\)", queued.stdout)
        assert transfer_id
        assert f"{served.url}/api/layers/transfer/{transfer_id[1]}" in queued.stdout
        served.handle.transfer_status.remote(transfer_id[1], wait=True).result(timeout_s=60)
        assert where(http, UP) == "device"
        assert running.result()[:30] == wanted
    again = raytier("transfer", UP, "device", "--url", served.url, "--wait")
    assert f"{UP} was in device already" in again.stdout

    for arguments, said in (
        (["99", "nvme"], "layers 0 to 3, not 99"),
        (["nonsense", "nvme"], "no parameter of tiny"),
        (["1", "moon"], "no destination"),
        (["1", "gpu:0"], "there is no gpu:0"),
        (["1", "ramdisk"], "tiers.ramdisk.enabled"),
        (["1", "nvme", "--priority", "11"], "priority"),
    ):
        refused = raytier("transfer", *arguments, "--url", served.url)
        assert (refused.exit_code, refused.stdout) == (1, "")
        assert refused.stderr.startswith("Error: ")
        assert said in refused.stderr
    with pytest.raises(ParameterNotFoundError):
        served.handle.transfer_layer.remote("nonsense", "nvme").result(timeout_s=60)

    for each in http.get("/api/plan").json()["placements"]:  # as the others of these tests expect it
        if each["tier"] != each["planned_tier"]:
            back = served.handle.transfer_layer.remote(each["id"], each["planned_tier"]).result(timeout_s=60)
            ended = served.handle.transfer_status.remote(back.transfer_id, wait=True).result(timeout_s=60)
            assert ended.status == "completed", ended.reason


def test_the_command_without_a_server(free_port: int) -> None:
    refused = raytier("transfer", "0", "nvme", "--url", f"http://127.0.0.1:{free_port}")
    assert refused.exit_code == 1
    assert "is --url right?" in refused.stderr


def pss(pids: dict[str, int]) -> dict[str, int]:
    """Proportional set sizes in bytes: what processes take of memory, shared pages shared out."""
    found = {}
    for role, pid in pids.items():
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        match = re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)
        assert match
        found[role] = int(match[1]) * 1024
    return found


@pytest.fixture(scope="module")
def bare(serve_port: int, large_dir: Path, cache_dir: str) -> Iterator[Application]:
    """An application that starts without a model; its weights will lie in three tiers."""
    args = {
        "models": [{"model_id": "large", "source_path": str(large_dir)}],
        "startup_model": None,
        "tiers": {"device": {"max_mb": 280}, "host": {"max_mb": 64}},
        "placement": {"rules": [{"pattern": "gate_proj", "tier": "host"}, {"pattern": "up_proj", "tier": "nvme"}]},
        "kv": {"max_blocks": 17, "expected_sequences": 2, "expected_context": 128},
        "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 64},
        "compute": {"threads": 1},
        "cache_dir": cache_dir,
    }
    handle = serve.run(build_app(args), name="bare", route_prefix="/bare")
    yield Application("bare", f"http://127.0.0.1:{serve_port}/bare", handle)
    serve.delete("bare")


def test_models_come_and_go(bare: Application, large_dir: Path) -> None:
    """No actor without a model (T13); then load, answer, unload, again and again, also with requests in flight."""
    prompt = random_prompts(9, vocab=LARGE_VOCAB)[0]
    wanted = transformers_greedy(large_dir, [prompt], 6)[0]
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 6, **GREEDY}

    with httpx.Client(base_url=bare.url, timeout=120) as http:

        def state() -> str:
            return str(http.get("/api/models/status").json()["status"])

        def load() -> None:
            answer = http.post("/api/models/load", json={"model_name_or_path": "large"})
            assert answer.status_code == 202, answer.text

        def unload(mode: str) -> httpx.Response:
            return http.post("/api/models/unload", json={"mode": mode})

        assert http.get("/health").status_code == 200
        assert state() == "no_model_loaded"
        refused = http.post("/v1/completions", json=body)
        assert refused.status_code == 409
        assert "POST /api/models/load" in refused.json()["error"]["message"]
        with pytest.raises(ConflictError, match="not loaded"):
            bare.handle.generate.remote(prompt).result(timeout_s=60)
        with pytest.raises(ModelNotFoundError, match="served are: large"):
            bare.handle.load_model.remote("other").result(timeout_s=60)
        status = http.get("/api/status").json()
        assert (status["server_status"], status["active_actors"]) == ("running", [])
        assert not [a for a in ray.util.list_named_actors(all_namespaces=True) if ":bare:" in a["name"]]

        # The first request waits for the load, and the actors come with it.
        load()
        answer = http.post("/v1/completions", json=body).json()
        assert bare.generate(prompt, max_tokens=6) == wanted
        assert answer["usage"]["completion_tokens"] == 6
        eventually(lambda: state() == "loaded")
        tiers = {each["tier"] for each in http.get("/api/plan").json()["placements"]}
        assert tiers == {"device", "host", "nvme"}
        assert unload("drain").json()["model"]["status"] == "no_model_loaded"

        pids = bare.pids()
        assert {role for role, pid in pids.items() if has_torch(pid)} == {"device"}
        before = pss(pids)
        status = bare.status()
        assert (status.host.ranges, status.host.touched, status.kv) == (0, 0, {})
        for mode, count in (("drain", 40), ("cancel", 240), ("drain", 40)):
            load()
            assert bare.generate(prompt, max_tokens=6) == wanted
            with ThreadPoolExecutor() as pool:
                running = pool.submit(http.post, "/v1/completions", json=body | {"max_tokens": count})
                eventually(lambda: bare.stats().running, every=0.01)
                assert sum(pss(pids).values()) - sum(before.values()) > 150e6, "the model can be seen"
                unloading = pool.submit(unload, mode)
                if state() == "unloading":  # else it was over by then
                    assert http.post("/v1/completions", json=body).status_code == 409
                assert unloading.result().status_code == 200
                ended = running.result()
            if mode == "drain":
                assert ended.json()["usage"]["completion_tokens"] == count
            else:
                assert ended.status_code == 503
                assert "was unloaded" in ended.json()["error"]["message"]
            assert state() == "no_model_loaded"
        assert bare.pids() == pids, "the actors stay"
        status = bare.status()
        assert (status.host.ranges, status.host.touched, status.kv) == (0, 0, {})
        assert (status.device.resident_bytes, status.device.kv_bytes, status.device.ring_bytes) == (0, 0, 0)
        after = pss(pids)
        growth = sum(after.values()) - sum(before.values())
        assert growth < 0.03 * sum(before.values()), {role: after[role] - before[role] for role in pids}


def test_a_model_whose_files_change_is_read_anew(bare: Application, large_dir: Path) -> None:
    """What is loaded is what lies there then; what is damaged is refused, said, and the server goes on."""
    file = large_dir / "model.safetensors"
    content = file.read_bytes()
    with httpx.Client(base_url=bare.url, timeout=120) as http:
        try:
            with file.open("r+b") as damaged:
                damaged.truncate(len(content) - 1000)
            http.post("/api/models/load", json={"model_name_or_path": "large"})
            answer = http.post("/v1/completions", json={"prompt": "a"})
            assert answer.status_code == 500
            assert "model.safetensors" in answer.json()["error"]["message"]
            status = http.get("/api/models/status").json()
            assert status["status"] == "error"
            assert "model.safetensors" in status["error_message"]
            assert http.get("/health").status_code == 503
        finally:
            file.write_bytes(content)
        assert http.post("/v1/completions", json={"prompt": "a"}).status_code == 409
        http.post("/api/models/load", json={"model_name_or_path": str(large_dir)})
        assert len(bare.generate(PROMPT, max_tokens=2)) == 2
        assert http.get("/health").status_code == 200
        device = bare.pids()["device"]
        assert http.post("/api/models/unload").status_code == 200
        assert is_alive(device)
