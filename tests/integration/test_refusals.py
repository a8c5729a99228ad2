"""What cannot work is refused by the builder, within seconds, with one message: in Serve's status and by the CLI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from raytier.errors import BudgetError, ResourceNotAvailableError
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


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, tiny_dir: Path) -> dict[str, Any]:
    """Name of the defect -> (args of the application, what the message says)."""
    root = tmp_path_factory.mktemp("broken")
    for name in ("missing", "truncated"):
        save_model(root / name, "llama", tokenizer_dir, max_shard_size="40KB")
    shards = {name: sorted((root / name).glob("model-*.safetensors")) for name in ("missing", "truncated")}
    assert len(shards["missing"]) > 2
    shards["missing"][1].unlink()
    os.truncate(shards["truncated"][1], shards["truncated"][1].stat().st_size - 100)

    def args(path: Path, **sections: Any) -> dict[str, Any]:
        return {"models": [{"model_id": "m", "source_path": str(path)}], **sections}

    small = {"device": {"max_mb": 0.5}, "host": {"max_mb": 0}}
    return {
        "bert": (args(foreign(root / "bert", "bert", "BertModel")), "an encoder or encoder-decoder model"),
        "missing": (args(root / "missing"), shards["missing"][1].name),
        "truncated": (args(root / "truncated"), shards["truncated"][1].name),
        "budget": (args(tiny_dir, tiers=small), "raise tiers.device.max_mb to"),
        "key": (args(tiny_dir, tiers={"device": {"max_mbs": 1}}), "tiers.device.max_mbs: unknown key"),
    }


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
def declared(serve_port: int) -> Iterator[Callable[[dict[str, dict[str, Any]]], None]]:
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


def plan(args: dict[str, Any], directory: Path) -> tuple[int, str]:
    """Exit code and stderr of `raytier plan`."""
    file = directory / "serve.yaml"
    file.write_text(yaml.safe_dump({"applications": [{"args": args}]}))
    result = CliRunner().invoke(cli, ["plan", "m", "--config", str(file)])
    assert result.stdout == ""
    return result.exit_code, result.stderr


def test_serve_status_and_plan_say_the_same_one_thing(
    declared: Callable[[dict[str, dict[str, Any]]], None], broken: dict[str, Any], tmp_path: Path
) -> None:
    began = time.monotonic()
    declared({name: args for name, (args, _) in broken.items()})
    # `build_app` relies on this to know what it may replace.
    assert {serve.status().applications[name].status for name in broken} == {ApplicationStatus.DEPLOYING}
    statuses = eventually(
        lambda: (
            (s := serve.status().applications)
            and all(s[n].status == ApplicationStatus.DEPLOY_FAILED for n in broken)
            and s
        ),
        seconds=120,
    )
    assert time.monotonic() - began < 90, "five builders on two cores, most of which import transformers"
    for name, (args, says) in broken.items():
        head, _, message = statuses[name].message.partition("\n")
        assert head == f"Deploying app '{name}' failed with exception:"
        assert says in message
        assert "Traceback" not in message
        assert "raytier.errors" not in message
        assert message.count("\n") <= 3
        assert plan(args, tmp_path) == (1, f"Error: {message}\n")


def test_the_command_ends_with_one(tmp_path: Path) -> None:
    path = foreign(tmp_path / "mamba", "mamba", "MambaForCausalLM")
    command = [sys.executable, "-m", "raytier.cli", "plan", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr.startswith("Error: ")
    assert "recurrent" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_builder_called_from_python_raises_raytiers_errors(serve_port: int, broken: dict[str, Any]) -> None:
    with pytest.raises(BudgetError, match="raise tiers.device.max_mb to"):
        build_app(broken["budget"][0])


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
