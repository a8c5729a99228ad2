"""What cannot work is refused by the builder, within seconds, with one message: in Serve's status and by the CLI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import ray
import yaml
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ServeDeploySchema
from ray.util import placement_group, remove_placement_group
from safetensors.numpy import save_file
from typer.testing import CliRunner

from raytier.cli.main import app as cli
from raytier.errors import (
    BudgetError,
    CheckpointError,
    ConfigurationError,
    RaytierError,
    ResourceNotAvailableError,
    UnsupportedModelError,
)
from raytier.serve import build_app
from tests.integration.application import Application, eventually
from tests.models import save_model

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def foreign(path: Path, model_type: str, architecture: str) -> Path:
    """A checkpoint of a kind that raytier does not run."""
    path.mkdir()
    config = {"architectures": [architecture], "model_type": model_type, "hidden_size": 32, "num_hidden_layers": 2}
    (path / "config.json").write_text(json.dumps(config))
    save_file({"embeddings.weight": numpy.zeros((4, 32), numpy.float32)}, path / "model.safetensors")
    return path


@dataclass(frozen=True)
class Defect:
    """`args` of an application that cannot work, and what is said about it."""

    args: dict[str, Any]
    error: type[RaytierError]
    says: str


DEFECTS = ("bert", "mamba", "missing", "truncated", "budget", "key")


@pytest.fixture(scope="module")
def defects(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, tiny_dir: Path) -> dict[str, Defect]:
    root = tmp_path_factory.mktemp("defects")
    shards = {}
    for name in ("missing", "truncated"):
        save_model(root / name, "llama", tokenizer_dir, max_shard_size="40KB")
        shards[name] = sorted((root / name).glob("model-*.safetensors"))[1]
    shards["missing"].unlink()
    os.truncate(shards["truncated"], shards["truncated"].stat().st_size - 100)

    def args(path: Path, **sections: Any) -> dict[str, Any]:
        return {"models": [{"model_id": "m", "source_path": str(path)}], **sections}

    bert, mamba = foreign(root / "bert", "bert", "BertModel"), foreign(root / "mamba", "mamba", "MambaForCausalLM")
    small = {"device": {"max_mb": 0.5}, "host": {"max_mb": 0}}
    found = (
        Defect(args(bert), UnsupportedModelError, "an encoder or encoder-decoder model"),
        Defect(args(mamba), UnsupportedModelError, "recurrent"),
        Defect(args(root / "missing"), CheckpointError, shards["missing"].name),
        Defect(args(root / "truncated"), CheckpointError, shards["truncated"].name),
        Defect(args(tiny_dir, tiers=small), BudgetError, "raise tiers.device.max_mb to"),
        Defect(args(tiny_dir, tiers={"device": {"max_mbs": 1}}), ConfigurationError, "max_mbs: unknown key"),
    )
    return dict(zip(DEFECTS, found, strict=True))


def deploy(applications: dict[str, dict[str, Any]]) -> None:
    """What `serve run FILE` and `serve deploy` do with a file of these applications."""
    config = {
        "applications": [
            {"name": name, "route_prefix": f"/{name}", "import_path": "raytier.serve:build_app", "args": args}
            for name, args in applications.items()
        ]
    }
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config), _blocking=False)


@pytest.fixture
def declared(serve_port: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """`deploy`, undone afterwards."""
    yield deploy
    names = [name for name, app in serve.status().applications.items() if name != "tiny"]
    deploy({})
    eventually(lambda: not set(names) & set(serve.status().applications))


@contextmanager
def everything_taken_but(cpus: float) -> Iterator[None]:
    """Leave `cpus` of the cluster's CPUs free. What Ray says is free lags behind, so it is checked on both sides."""

    def free() -> float:
        return float(ray.available_resources().get("CPU", 0.0))

    groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    placed = sum(bundle.get("CPU", 0.0) for group in groups for bundle in group["bundles"].values())
    unplaced = ray.cluster_resources()["CPU"] - placed
    eventually(lambda: abs(free() - unplaced) < 1e-6)
    held = placement_group([{"CPU": round(unplaced - cpus, 4)}])
    try:
        assert held.wait(30)
        eventually(lambda: abs(free() - cpus) < 1e-6)
        yield
    finally:
        remove_placement_group(held)


@pytest.mark.parametrize("name", DEFECTS)
def test_the_builder_and_the_command_say_the_same(
    serve_port: int, defects: dict[str, Defect], name: str, tmp_path: Path
) -> None:
    defect = defects[name]
    with pytest.raises(defect.error) as refused:
        build_app(defect.args)
    message = str(refused.value)
    assert defect.says in message
    assert message.count("\n") <= 3

    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump({"applications": [{"args": defect.args}]}))
    result = CliRunner().invoke(cli, ["plan", "m", "--config", str(file)])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", f"Error: {message}\n")


def test_the_status_of_serve_says_it_too(
    declared: Callable[[dict[str, Any]], None], defects: dict[str, Defect]
) -> None:
    """The message and nothing else, and at once: Serve tries a builder four times unless it is told not to."""
    names = ("bert", "truncated", "key")
    began = time.monotonic()
    declared({name: defects[name].args for name in names})
    # `build_app` relies on this to know what it may replace.
    assert {serve.status().applications[name].status for name in names} == {ApplicationStatus.DEPLOYING}
    statuses = eventually(
        lambda: (s := serve.status().applications) and all(s[n].status == "DEPLOY_FAILED" for n in names) and s, 120
    )
    assert time.monotonic() - began < 60
    for name in names:
        head, _, message = statuses[name].message.partition("\n")
        assert head == f"Deploying app '{name}' failed with exception:"
        with pytest.raises(defects[name].error) as refused:
            build_app(defects[name].args)
        assert message == str(refused.value)


def test_the_command_ends_with_one() -> None:
    command = [sys.executable, "-m", "raytier.cli", "plan", "/does/not/exist"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == "Error: /does/not/exist: no such directory; give the directory that holds config.json\n"


def test_a_cluster_without_room_is_refused(
    served: Application, app_args: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """C6: never a hang, and the bundle is named. What an application itself holds counts when it is deployed anew."""
    with everything_taken_but(0.3):
        began = time.monotonic()
        with pytest.raises(ResourceNotAvailableError, match=r"1 \(device\) needs 0.5 CPU, .* has 0.2 left of 0.3"):
            build_app(app_args)
        assert time.monotonic() - began < 30

        status = serve.status()
        status.applications["tiny"].status = ApplicationStatus.DEPLOYING
        monkeypatch.setattr(serve, "status", lambda: status)
        build_app(app_args)
