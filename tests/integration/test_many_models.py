"""E6, F7: several models on the devices of one node, within one budget, that sleep, wake and take turns."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import Result
from ray import serve
from typer.testing import CliRunner

from raytier.cli.main import app as cli
from raytier.serve import build_app
from tests.integration.application import GREEDY, Application, eventually
from tests.models import random_prompts, save_model, transformers_greedy

#: Each model has 13 MB of weights.
SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 8,
    "num_key_value_heads": 1,
    "max_position_embeddings": 1024,
}
PROMPTS = random_prompts(5, 9, 17)
COUNT = 8


@pytest.fixture(scope="module")
def dirs(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> dict[str, Path]:
    """Three models of about the same size and of two families; the same seed, other shapes."""
    root = tmp_path_factory.mktemp("many")
    families = {"a": "llama", "b": "qwen2", "c": "llama"}
    return {
        name: save_model(
            root / name,
            family,
            tokenizer_dir,
            fill=lambda parameter: parameter.normal_(std=0.3),
            **{**SHAPE, "intermediate_size": 512 + 64 * number},
        )
        for number, (name, family) in enumerate(families.items())
    }


@pytest.fixture(scope="module")
def wanted(dirs: dict[str, Path]) -> dict[str, list[list[int]]]:
    return {name: transformers_greedy(path, PROMPTS, COUNT) for name, path in dirs.items()}


@pytest.fixture(scope="module")
def many(serve_port: int, dirs: dict[str, Path], cache_dir: str) -> Iterator[Application]:
    """Memory on the device for one and a half of them, and in the host pool for one."""
    nbytes = (dirs["a"] / "model.safetensors").stat().st_size / 2**20
    args = {
        "models": [{"model_id": name, "source_path": str(path)} for name, path in dirs.items()],
        "startup_model": None,
        "switching": {"on_request": "load", "switch_after_s": 2},
        "tiers": {"device": {"max_mb": 1.5 * nbytes}, "host": {"max_mb": 1.4 * nbytes}},
        "kv": {"expected_sequences": 2, "expected_context": 64},
        "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 32},
        "compute": {"threads": 1},
        "cache_dir": cache_dir,
    }
    handle = serve.run(build_app(args), name="many", route_prefix="/many")
    yield Application("many", f"http://127.0.0.1:{serve_port}/many", handle)
    serve.delete("many")


@pytest.fixture
def http(many: Application) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=many.url, timeout=120) as client:
        yield client


def state(http: httpx.Client, model: str) -> str:
    return str(http.get("/api/models/status", params={"model": model}).json()["status"])


def generate(many: Application, model: str, number: int) -> list[int]:
    result = many.handle.generate.remote(PROMPTS[number], model, max_tokens=COUNT, **GREEDY).result(timeout_s=120)
    return list(result.token_ids)


def test_they_answer_in_turn(many: Application, http: httpx.Client, wanted: dict[str, list[list[int]]]) -> None:
    """A request loads its model, others sleep where it needs their memory, and wake when they are asked for again."""
    for model in ("a", "b", "c", "a", "b"):
        assert [generate(many, model, number) for number in range(len(PROMPTS))] == wanted[model]
        eventually(lambda model=model: state(http, model) == "loaded")  # type: ignore[misc]
    listed = {card["id"]: card["status"] for card in http.get("/v1/models").json()["data"]}
    assert listed["b"] == "loaded" and "sleeping" in listed.values()
    status = many.status()
    budget = status.device.total("held_bytes")
    assert 0 < budget <= 1.5 * 14 * 2**20
    assert sum(status.host.owners.values()) <= status.host.capacity
    assert status.host.kept, "who sleeps has copies in the host pool"


def test_under_interleaved_load(many: Application, http: httpx.Client, wanted: dict[str, list[list[int]]]) -> None:
    """Two models at once where there is room for one and a half: all tokens are right, and nobody waits for ever."""
    with ThreadPoolExecutor(6) as pool:
        asked = [(model, number % len(PROMPTS)) for number in range(6) for model in ("a", "b")]
        answers = list(pool.map(lambda pair: generate(many, *pair), asked))
    assert answers == [wanted[model][number] for model, number in asked]


def test_from_the_command_line(many: Application, http: httpx.Client) -> None:
    """I4: `raytier models` over HTTP."""

    def run(*words: str) -> Result:
        return CliRunner().invoke(cli, ["models", *words, "--url", many.url], env={"COLUMNS": "300"})

    def said(*words: str) -> str:
        result = run(*words)
        assert result.exit_code == 0, result.output
        return result.stdout

    assert said("load", "a", "--wait").endswith("a is loaded\n")
    assert said("sleep", "a") == "a is asleep\n"
    assert state(http, "a") == "sleeping" and "status: sleeping" in said("show", "a")
    assert "a is being woken" in said("wake", "a")
    assert said("load", "a", "--wait", "--force-reload").endswith("a is loaded\n")
    assert said("unload", "a", "--cancel") == "a is unloaded\n"
    rows = {row[1]: row[7] for line in said("list").splitlines() if len(row := line.split()) > 8}
    assert rows["a"] == "no_model_loaded" == state(http, "a")
    assert said("register", "d", "builtin:demo", "--no-persist", "--set", "pinned=true") == "d is registered\n"
    assert http.get("/api/models/status", params={"model": "d"}).json()["status"] == "no_model_loaded"
    for words, message in (
        (["wake", "d"], "d is not loaded"),
        (["load", "nobody"], "'nobody' is not served here"),
        (["register", "d", "builtin:demo"], "nowhere to keep it"),
    ):
        refused = run(*words)
        assert refused.exit_code == 1 and refused.stderr.startswith("Error: ") and message in refused.stderr
    assert said("register", "broken", "/nothing/there", "--no-persist")
    failed = run("load", "broken", "--wait")
    assert failed.exit_code == 1 and "/nothing/there" in failed.stderr
    assert "its error is cleared" in said("unload", "broken")


@pytest.mark.parametrize("bits", [8, 4])
def test_quantisation_is_a_matter_of_each_model(
    many: Application, http: httpx.Client, bits: int, dirs: dict[str, Path]
) -> None:
    """B1, E5: `quantization_bits` of an entry, in an application that has no `precision`; with most of it on disk."""
    name = f"q{bits}"
    entry = {"model_id": name, "source_path": str(dirs["a"]), "quantization_bits": bits}
    assert http.post("/api/models/register", json={"model": entry, "persist": False}).status_code == 200
    quantised, plain = generate(many, name, 2), generate(many, "a", 2)
    assert len(quantised) == COUNT
    for model, wanted in ((name, {f"int{bits}" if bits == 8 else "int4-64"}), ("a", {"source"})):
        generate(many, model, 2)
        layers = http.get("/api/layers", params={"model": model}).json()
        matrices = [layer for layer in layers if "proj" in layer["name"]]
        assert {layer["quantization_type"] for layer in matrices} == wanted
        most = sum(layer["original_size_mb"] for layer in matrices) / (3 if model == name else 1)
        assert sum(layer["current_size_mb"] for layer in matrices) <= most
    assert generate(many, "a", 2) == plain, "the others are as they were"
    for model in (name, "a"):
        assert http.post("/api/models/unload", json={"model": model}).status_code == 200


def test_sleep_and_wake_by_hand(many: Application, http: httpx.Client, wanted: dict[str, list[list[int]]]) -> None:
    assert generate(many, "c", 0) == wanted["c"][0]
    eventually(lambda: state(http, "c") == "loaded")
    answer = http.post("/api/models/sleep", json={"model": "c"})
    assert (answer.status_code, answer.json()["model"]["status"]) == (200, "sleeping"), answer.text
    status = many.status()
    assert "c" not in status.device.models and "c" in status.device.asleep and "c" not in status.kv
    assert status.host.kept.get("c")
    refused = http.get("/api/layers", params={"model": "c"})
    assert refused.status_code == 409 and "wake it" in refused.json()["error"]["message"]
    before = status.disk.bytes_read
    answer = http.post("/api/models/wake", json={"model": "c"})
    assert answer.status_code == 202 and "is being woken" in answer.json()["message"]
    assert generate(many, "c", 1) == wanted["c"][1]
    eventually(lambda: state(http, "c") == "loaded")
    assert many.status().disk.bytes_read >= before
    for model in ("a", "b", "c"):
        if state(http, model) in ("loaded", "sleeping"):
            assert http.post("/api/models/unload", json={"model": model}).status_code == 200
    status = many.status()
    assert (status.device.models, status.device.asleep, status.kv) == ({}, (), {})
    assert (status.host.ranges, status.host.touched, status.host.kept) == (0, 0, {})
