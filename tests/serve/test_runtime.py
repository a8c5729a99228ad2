"""H3, H6, H7, I1, A6: the routes under /api, field by field, and what they refuse."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from raytier.errors import EngineDeadError, InvalidRequestError, ResourceNotAvailableError, TransferNotFoundError
from raytier.planner.plan import Tier
from raytier.serve.http import build_api
from tests.serve.conftest import MakeServed
from tests.serve.echo import MODEL, Served
from tests.serve.helpers import Exchange
from tests.serve.test_errors import error_of

UP = "model.layers.0.mlp.up_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"
MIB = 2**20


@pytest.fixture
def idle(make_served: MakeServed) -> Served:
    return make_served(max_queue=2)


@pytest.fixture
async def idle_http(idle: Served) -> Any:
    transport = httpx.ASGITransport(app=build_api(idle))
    async with httpx.AsyncClient(transport=transport, base_url="http://raytier", timeout=30) as client:
        yield client


def layer_id(served: Served, name: str) -> int:
    return [p.name for p in served.node.description.manifest.parameters].index(name)


async def moved(http: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    """The status of a transfer that has ended."""
    answer = await http.post("/api/layers/transfer", json=body)
    assert answer.status_code == 202, answer.text
    for _ in range(1000):
        status: dict[str, Any] = (await http.get(f"/api/layers/transfer/{answer.json()['transfer_id']}")).json()
        if status["status"] in ("completed", "failed"):
            return status
        await asyncio.sleep(0.005)
    raise AssertionError(status)


async def test_overview(http: httpx.AsyncClient) -> None:
    answer = (await http.get("/api")).json()
    assert answer["name"] == "raytier"
    assert answer["docs"] == "/api/docs"
    assert set(answer["routes"]) == {
        "GET /api/models",
        "POST /api/models/register",
        "POST /api/models/sleep",
        "POST /api/models/wake",
        "GET /api",
        "GET /api/status",
        "POST /api/models/load",
        "POST /api/models/unload",
        "GET /api/models/status",
        "POST /api/models/generate",
        "GET /api/layers",
        "GET /api/layers/{layer_id}",
        "POST /api/layers/transfer",
        "GET /api/layers/transfer/{transfer_id}",
        "GET /api/plan",
        "GET /api/kv",
    }
    assert all(answer["routes"].values())


async def test_status(http: httpx.AsyncClient, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    status = (await http.get("/api/status")).json()
    assert set(status) == {
        "server_status",
        "uptime_seconds",
        "model_status",
        "hardware_summary",
        "layer_transfer_queue_size",
        "prefetch_job_queue_size",
        "active_actors",
        "log_file_path",
    }
    assert status["server_status"] == "running"
    assert status["uptime_seconds"] > 0
    assert status["model_status"]["status"] == "loaded"
    assert (status["layer_transfer_queue_size"], status["prefetch_job_queue_size"]) == (0, 5)
    assert status["active_actors"][0] == {"name": "raytier:app:device:0", "role": "device", "pid": 1}
    hardware = status["hardware_summary"]
    assert hardware["inventory"]["cpus"] >= 1
    assert hardware["rates"]["disk_read_bytes_per_s"] == 1e9
    device, host = hardware["tiers"]
    assert (device["tier"], device["used_bytes"], device["capacity_bytes"]) == ("device", 80, 64 * MIB)
    assert (host["tier"], host["used_bytes"], host["free_bytes"]) == ("host", 40, 60)

    def gone(timeout_s: float) -> None:
        raise EngineDeadError("the DeviceActor is gone")

    monkeypatch.setattr(served.node, "status", gone)
    status = (await http.get("/api/status")).json()
    assert (status["server_status"], status["hardware_summary"]["tiers"]) == ("unavailable", [])


async def test_status_without_a_model(idle_http: httpx.AsyncClient) -> None:
    status = (await idle_http.get("/api/status")).json()
    assert status["server_status"] == "running"
    assert status["model_status"]["status"] == "no_model_loaded"
    assert status["hardware_summary"]["rates"] is None
    assert (await idle_http.get("/health")).status_code == 200


async def test_model_status(idle: Served, idle_http: httpx.AsyncClient) -> None:
    async def status(**query: str) -> dict[str, Any]:
        answer: dict[str, Any] = (await idle_http.get("/api/models/status", params=query)).json()
        return answer

    idle.node.read_gate.clear()
    before = await status()
    manifest = idle.node.description.manifest
    assert before == {
        "model_name": MODEL,
        "model_path": manifest.model_dir,
        "architecture": "LlamaForCausalLM",
        "tokenizer_name": MODEL,
        "num_managed_layers": len(manifest.parameters),
        "compute_device": "cpu",
        "status": "no_model_loaded",
        "progress": None,
        "error_message": None,
    }
    answer = await idle_http.post("/api/models/load", json={"model_name_or_path": MODEL})
    assert answer.status_code == 202
    assert set(answer.json()) == {"message", "model"}
    await idle.eventually(lambda: idle.node.model)
    loading = await status(model=MODEL)
    assert loading["status"] == "loading"
    left = loading["progress"].pop("seconds_left")
    assert 0 < left < 60
    assert loading["progress"] == {"bytes_loaded": 250, "bytes_total": 1000}
    idle.node.read_gate.set()
    await idle.eventually(lambda: idle.control.state() == "loaded")
    assert (await status())["progress"] is None
    error_of(await idle_http.get("/api/models/status", params={"model": "other"}), 404)


async def test_load_and_unload(idle: Served, idle_http: httpx.AsyncClient) -> None:
    load, unload = "/api/models/load", "/api/models/unload"
    error_of(await idle_http.post(unload), 409)
    error = error_of(await idle_http.post(load, json={"model_name_or_path": "other"}), 404)
    assert MODEL in error["message"]
    assert error["code"] == "model_not_found"
    error = error_of(await idle_http.post(load, json={"model_name_or_path": MODEL, "compute_device": "cuda"}), 400)
    assert "compute.device" in error["message"]
    assert error["param"] == "compute_device"

    body = {"model_name_or_path": "/models/llama", "compute_device": "cpu", "hf_token": "hf_secret"}
    answer = await idle_http.post(load, json=body)
    assert answer.status_code == 202
    assert "secret" not in answer.text
    await idle.eventually(lambda: idle.control.state() == "loaded")
    assert "already" in (await idle_http.post(load, json=body)).json()["message"]
    answer = await idle_http.post(unload, json={"model": MODEL, "mode": "cancel"})
    assert answer.status_code == 200
    assert answer.json()["model"]["status"] == "no_model_loaded"
    assert idle.node.model is None


async def test_a_token_is_never_shown(idle_http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture) -> None:
    error = error_of(await idle_http.post("/api/models/load", json={"model_name_or_path": "m", "hf_token": 12345}), 422)
    assert error["param"] == "hf_token"
    assert "12345" not in error["message"] + caplog.text


async def test_generation_without_a_model(idle: Served, idle_http: httpx.AsyncClient) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "dog"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "dog"}], "stream": True}),
        ("/api/models/generate", {"prompt": "dog"}),
    ):
        error = error_of(await idle_http.post(path, json=body), 409)
        assert "POST /api/models/load" in error["message"]
        assert error["type"] == "conflict_error"
    for path in ("/api/layers", "/api/layers/0", "/api/plan", "/api/kv"):
        assert "not loaded" in error_of(await idle_http.get(path), 409)["message"]
    body = {"layer_id": 1, "destination_device": "host"}
    error_of(await idle_http.post("/api/layers/transfer", json=body), 409)
    assert (await idle_http.get("/v1/models")).json()["data"][0]["id"] == MODEL


async def test_a_request_waits_for_a_load(idle: Served, idle_http: httpx.AsyncClient) -> None:
    idle.node.load_gate.clear()
    assert (await idle_http.post("/api/models/load", json={"model_name_or_path": MODEL})).status_code == 202
    waiting = [asyncio.ensure_future(idle_http.post("/v1/completions", json={"prompt": "dog"})) for _ in range(2)]
    await idle.eventually(lambda: idle.control.of(None).waiting == 2)
    error_of(await idle_http.post("/v1/completions", json={"prompt": "dog"}), 429)
    idle.node.load_gate.set()
    for answer in await asyncio.gather(*waiting):
        assert answer.json()["choices"][0]["text"] == "dog"


async def test_a_load_that_fails_reaches_who_waits(idle: Served, idle_http: httpx.AsyncClient) -> None:
    idle.node.load_gate.clear()
    idle.node.load_error = ResourceNotAvailableError("5 GiB are missing")
    await idle_http.post("/api/models/load", json={"model_name_or_path": MODEL})
    waiting = asyncio.ensure_future(idle_http.post("/v1/completions", json={"prompt": "dog"}))
    await idle.eventually(lambda: idle.control.of(None).waiting)
    idle.node.load_gate.set()
    assert "5 GiB are missing" in error_of(await waiting, 503)["message"]
    status = (await idle_http.get("/api/models/status")).json()
    assert (status["status"], status["error_message"]) == ("error", "5 GiB are missing")


async def test_unloading_with_requests_in_flight(app: FastAPI, http: httpx.AsyncClient, served: Served) -> None:
    """drain lets them end; cancel ends them with an error; neither takes new ones."""
    for mode in ("drain", "cancel", "drain"):
        executor = served.executor
        executor.gate.clear()
        running = Exchange(app, "/v1/completions", {"prompt": "one two"})
        await served.until(lambda stats: stats.running)
        unloading = asyncio.ensure_future(http.post("/api/models/unload", json={"mode": mode}))
        await served.eventually(lambda: served.control.state() == "unloading")
        error_of(await http.post("/v1/completions", json={"prompt": "dog"}), 409)
        error_of(await http.post("/api/models/load", json={"model_name_or_path": MODEL}), 409)
        await asyncio.sleep(0.05)
        executor.gate.set()
        assert (await unloading).status_code == 200
        await running.task
        answer = json.loads(running.body)
        if mode == "drain":
            assert answer["choices"][0]["text"] == "one two"
        else:
            assert running.status == 503
            assert "unloaded" in answer["error"]["message"]
        await served.load()


async def test_generate(http: httpx.AsyncClient) -> None:
    answer = (await http.post("/api/models/generate", json={"prompt": "one two three", "max_new_tokens": 50})).json()
    assert set(answer) == {"prompt", "generated_text", "model_name", "tokens_generated", "generation_time_seconds"}
    assert (answer["prompt"], answer["generated_text"]) == ("one two three", "one two three")
    assert answer["model_name"] == MODEL
    assert answer["generation_time_seconds"] > 0
    short = {"prompt": "one two three", "max_new_tokens": 1, "temperature": 0, "top_p": 0.5, "top_k": 3}
    assert (await http.post("/api/models/generate", json=short)).json()["tokens_generated"] == 1


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/api/models/generate", {}, "prompt"),
        ("/api/models/generate", {"prompt": ""}, "prompt"),
        ("/api/models/generate", {"prompt": "a", "max_new_tokens": 0}, "max_new_tokens"),
        ("/api/models/generate", {"prompt": "a", "max_new_tokens": 8193}, "max_new_tokens"),
        ("/api/models/generate", {"prompt": "a", "temperature": 2.1}, "temperature"),
        ("/api/models/generate", {"prompt": "a", "temperature": float("nan")}, "temperature"),
        ("/api/models/generate", {"prompt": "a", "top_p": 0}, "top_p"),
        ("/api/models/generate", {"prompt": "a", "top_k": "5"}, "top_k"),
        ("/api/models/generate", {"prompt": "a", "seeed": 1}, "seeed"),
        ("/api/models/load", {}, "model_name_or_path"),
        ("/api/models/load", {"model_name_or_path": "a", "compute_device": "tpu"}, "compute_device"),
        ("/api/models/unload", {"mode": "now"}, "mode"),
        ("/api/layers/transfer", {"layer_id": 1}, "destination_device"),
        ("/api/layers/transfer", {"destination_device": "host"}, "layer_id"),
        ("/api/layers/transfer", {"layer_id": 1, "layer_index": 1, "destination_device": "host"}, "layer_id"),
        ("/api/layers/transfer", {"layer_id": 1, "destination_device": "host", "priority": 0}, "priority"),
        ("/api/layers/transfer", {"layer_id": 1, "destination_device": "host", "priority": 11}, "priority"),
        ("/api/layers/transfer", {"layer_id": 1, "destination_device": "host", "priority": True}, "priority"),
    ],
)
async def test_bad_fields_are_422_and_named(http: httpx.AsyncClient, path: str, body: Any, param: str) -> None:
    answer = await http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})
    error = error_of(answer, 422)
    assert error["param"] == param
    assert param in error["message"]


async def test_layers(http: httpx.AsyncClient, served: Served) -> None:
    layers = (await http.get("/api/layers")).json()
    parameters = served.node.description.manifest.parameters
    assert [(each["id"], each["name"]) for each in layers] == [(i, p.name) for i, p in enumerate(parameters)]
    up = layers[layer_id(served, UP)]
    assert up == {
        "id": layer_id(served, UP),
        "name": UP,
        "layer_index": 0,
        "original_size_mb": 768 * 256 * 2 / MIB,
        "current_size_mb": 768 * 256 * 2 / MIB,
        "current_device": "cpu",
        "gpu_id": None,
        "quantization_type": "source",
        "compression_type": "none",
        "access_count": 7,
        "last_access_timestamp": 1.5e9,
    }
    assert layers[0]["layer_index"] is None
    for which in (up["id"], UP):
        assert (await http.get(f"/api/layers/{which}")).json() == up
    for which in ("999", "model.layers.9.up", "-1"):
        error = error_of(await http.get(f"/api/layers/{which}"), 404)
        assert which in error["message"]


async def test_layers_by_decoder_layer(http: httpx.AsyncClient, served: Served) -> None:
    await moved(http, layer_index=1, destination_device="nvme")
    first, second, rest = (await http.get("/api/layers", params={"group": "layer"})).json()
    assert [each["layer_index"] for each in (first, second, rest)] == [0, 1, None]
    assert first["num_parameters"] == second["num_parameters"] == 9
    assert set(first["size_mb_by_tier"]) == {"device"}
    assert set(second["size_mb_by_tier"]) == {"device", "nvme"}
    assert sum(second["size_mb_by_tier"].values()) == second["current_size_mb"]
    layers = (await http.get("/api/layers")).json()
    groups = first["original_size_mb"] + second["original_size_mb"] + rest["original_size_mb"]
    assert groups == pytest.approx(sum(each["original_size_mb"] for each in layers))
    error_of(await http.get("/api/layers", params={"group": "expert"}), 422)


async def test_transfers(http: httpx.AsyncClient, served: Served) -> None:
    """All of D5 that can be seen over HTTP: the answer, the status, the new place, the old room given back."""
    number = layer_id(served, UP)
    body = {"layer_id": number, "destination_device": "cpu", "priority": 2}
    answer = await http.post("/api/layers/transfer", json=body)
    assert answer.status_code == 202
    assert set(answer.json()) == {"transfer_id", "message", "layer_id", "source", "destination", "priority"}
    assert answer.json()["layer_id"] == number
    assert (answer.json()["source"], answer.json()["destination"], answer.json()["priority"]) == ("device", "host", 2)
    status = await served.runtime.transfer_status(answer.json()["transfer_id"], wait=True)
    assert (status.status, status.reason, status.source, status.destination) == ("completed", None, "device", "host")
    assert (status.layer_id, status.layer_index) == (number, 0)
    assert status.nbytes == 768 * 256 * 2
    assert served.loaded.host.held == {UP: status.nbytes}
    placed = (await http.get("/api/plan")).json()["placements"][number]
    assert (placed["tier"], placed["planned_tier"]) == ("host", "device")

    again = await moved(http, layer_id=UP, destination_device="host")
    assert (again["status"], again["nbytes"]) == ("completed", 0)
    assert again["reason"] == f"{UP} was in host already"

    whole = await moved(http, layer_index=0, destination_device="nvme")
    assert (whole["status"], whole["layer_id"], whole["layer_index"]) == ("completed", None, 0)
    assert whole["source"] == "device, host"
    assert served.loaded.host.held == {}
    assert (await http.get(f"/api/layers/{NORM}")).json()["current_device"] == "cpu", "norms stay"
    assert (await http.get(f"/api/layers/{UP}")).json()["current_device"] == "nvme"


async def test_a_transfer_that_fails(http: httpx.AsyncClient, served: Served) -> None:
    """The reason is said, the parameter stays where it was, and nothing that was obtained for it is kept."""
    served.loaded.host.capacity = 1000
    full = await moved(http, layer_id=UP, destination_device="host")
    assert (full["status"], full["source"], full["nbytes"], full["seconds"]) == ("failed", "device", 0, None)
    assert "no room in host: 1000 bytes" in full["reason"]
    served.loaded.host.capacity = MIB
    served.loaded.move_error = ResourceNotAvailableError("the device is full")
    assert (await moved(http, layer_id=UP, destination_device="host"))["reason"] == "the device is full"
    served.loaded.move_error = ZeroDivisionError("a bug")
    assert (await moved(http, layer_id=UP, destination_device="host"))["reason"] == "ZeroDivisionError: a bug"
    assert served.loaded.host.held == {}
    assert served.loaded.mover.tier_of[UP] is Tier.DEVICE


@pytest.mark.parametrize(
    ("target", "destination", "status", "said"),
    [
        ({"layer_id": 10**6}, "host", 404, "ids 0 to"),
        ({"layer_id": "nothing"}, "host", 404, "no parameter"),
        ({"layer_index": 2}, "host", 404, "layers 0 to 1"),
        ({"layer_id": NORM}, "host", 400, "cannot leave the device"),
        ({"layer_id": UP}, "moon", 400, "no destination; known: cpu or host"),
        ({"layer_id": UP}, "host:0", 400, "no destination"),
        ({"layer_id": UP}, "gpu:0", 400, "there is no gpu:0; device:0 is the compute process"),
        ({"layer_id": UP}, "device:1", 400, "device:0 alone"),
        ({"layer_id": UP}, "ramdisk", 400, "set tiers.ramdisk.enabled"),
    ],
)
async def test_transfers_that_make_no_sense(
    http: httpx.AsyncClient, target: dict[str, Any], destination: str, status: int, said: str
) -> None:
    body = {**target, "destination_device": destination}
    error = error_of(await http.post("/api/layers/transfer", json=body), status)
    assert said in error["message"]
    assert error["param"] in ("layer_id", "layer_index", "destination_device")


async def test_a_full_transfer_queue_is_503(http: httpx.AsyncClient, served: Served) -> None:
    """Two may wait here, one is under way; the most urgent goes first."""
    served.loaded.move_gate.clear()
    order: list[str] = []

    async def post(layer: int, priority: int) -> httpx.Response:
        body = {"layer_index": layer, "destination_device": "nvme", "priority": priority}
        return await http.post("/api/layers/transfer", json=body)

    first = (await post(0, 5)).json()["transfer_id"]
    await served.eventually(lambda: served.node.transfers.counts().processing == 1)
    late, early = (await post(1, 5)).json()["transfer_id"], (await post(0, 1)).json()["transfer_id"]
    refused = await post(1, 1)
    error_of(refused, 503)
    assert int(refused.headers["retry-after"]) >= 1
    assert (await http.get("/api/status")).json()["layer_transfer_queue_size"] == 3
    assert (await http.get(f"/api/layers/transfer/{first}")).json()["status"] == "processing"
    assert (await http.get(f"/api/layers/transfer/{late}")).json()["status"] == "pending"
    for name, transfer in (("first", first), ("late", late), ("early", early)):
        served.node.transfers.future(transfer).add_done_callback(lambda _, name=name: order.append(name))
    served.loaded.move_gate.set()
    await served.runtime.transfer_status(late, wait=True)
    assert order == ["first", "early", "late"]
    error_of(await http.get("/api/layers/transfer/unknown"), 404)
    with pytest.raises(TransferNotFoundError):
        await served.runtime.transfer_status("unknown", wait=True)


async def test_unloading_fails_what_waits(http: httpx.AsyncClient, served: Served) -> None:
    served.loaded.move_gate.clear()
    ids = [(await served.runtime.transfer_layer(layer_index=i, destination="nvme")).transfer_id for i in (0, 1)]
    await served.eventually(lambda: served.node.transfers.counts().processing == 1)
    gate, unloading = served.loaded.move_gate, asyncio.ensure_future(served.control.unload(None))
    await served.eventually(lambda: served.node.transfers.get(ids[1]).finished)
    assert not unloading.done(), "it waits for the one that is under way"
    gate.set()
    await unloading
    statuses = [(await http.get(f"/api/layers/transfer/{each}")).json() for each in ids]
    assert [each["status"] for each in statuses] == ["completed", "failed"]
    assert "unloaded" in statuses[1]["reason"]


async def test_plan(http: httpx.AsyncClient, served: Served) -> None:
    plan = (await http.get("/api/plan", params={"model": MODEL})).json()
    planned = served.loaded.plan
    assert [each["name"] for each in plan["placements"]] == [each.name for each in planned.placements]
    assert all(each["reason"] for each in plan["placements"])
    assert plan["devices"][0]["budget_bytes"] == 64 * MIB
    assert [each["batch"] for each in plan["predictions"]] == [1, 8, 32]
    assert plan["predictions"][0]["tokens_per_second"] == pytest.approx(1 / plan["predictions"][0]["seconds"])
    assert plan["first_token_seconds"] > 0
    assert isinstance(plan["warnings"], list)
    assert sum(plan["bytes_by_tier"].values()) == served.node.description.manifest.nbytes
    assert plan["bytes_by_tier"]["nvme"] == 0


async def test_openapi_says_what_is_answered(http: httpx.AsyncClient) -> None:
    schema = (await http.get("/api/openapi.json")).json()
    ok = {
        ("/api", "get"): ("200", "Overview"),
        ("/api/status", "get"): ("200", "ServerStatus"),
        ("/api/models/load", "post"): ("202", "OperationAnswer"),
        ("/api/models/unload", "post"): ("200", "OperationAnswer"),
        ("/api/models/status", "get"): ("200", "ModelStatus"),
        ("/api/models/generate", "post"): ("200", "GenerateAnswer"),
        ("/api/layers/{layer_id}", "get"): ("200", "Layer"),
        ("/api/layers/transfer", "post"): ("202", "TransferAnswer"),
        ("/api/layers/transfer/{transfer_id}", "get"): ("200", "TransferStatus"),
        ("/api/plan", "get"): ("200", "PlanAnswer"),
    }
    for (path, method), (status, name) in ok.items():
        responses = schema["paths"][path][method]["responses"]
        content = responses[status]["content"]["application/json"]["schema"]
        assert content == {"$ref": f"#/components/schemas/{name}"}, path
        for other, response in responses.items():
            if other != status:
                assert response["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse"), (
                    path,
                    other,
                )
    transfer = schema["components"]["schemas"]["TransferRequest"]["properties"]
    assert (transfer["priority"]["minimum"], transfer["priority"]["maximum"], transfer["priority"]["default"]) == (
        1,
        10,
        5,
    )


async def test_what_python_gets_wrong_is_refused_as_over_http(served: Served) -> None:
    with pytest.raises(InvalidRequestError, match="either a parameter or a decoder layer"):
        await served.runtime.transfer_layer(destination="host")
    with pytest.raises(InvalidRequestError, match="no destination"):
        await served.runtime.transfer_layer(UP)
    with pytest.raises(InvalidRequestError, match="priority"):
        await served.runtime.transfer_layer(UP, "host", 11)
