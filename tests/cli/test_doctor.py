"""A1, A2, I4: `raytier doctor`, and its machine file as `raytier plan` reads it."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from raytier.cli import doctor as module
from raytier.cli.main import app
from raytier.hardware.inventory import Disk, NodeInventory
from raytier.hardware.machine import Machine
from tests.planner.models import FULL_RATES

GIB = 2**30


def run(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A node with two disks and a limit, and what was asked of the measuring."""
    calls: list[dict[str, Any]] = []

    def inventory(paths: list[str]) -> NodeInventory:
        disks = tuple(
            Disk(path, "tmpfs", 3 * GIB, 4 * GIB, "shm", True)
            if path == "/dev/shm"
            else Disk(path, "nfs" if "net" in path else "ext4", 80 * GIB, 100 * GIB, path[-4:], "net" not in path)
            for path in paths
        )
        return NodeInventory("box", 8, 32 * GIB, 20 * GIB, 24 * GIB, shm_free=3 * GIB, disks=disks, huge_pages="never")

    def rates(console: Any, path: str, dtype: str, config: Any, kind: str, cpus: int, *, refresh: bool) -> Any:
        calls.append({"path": path, "dtype": dtype, "paths": config.tiers.nvme.paths, "refresh": refresh})
        return replace(FULL_RATES, other_cores=0.7 if refresh else 0.0)

    monkeypatch.setattr(module, "take_inventory", inventory)
    monkeypatch.setattr(module, "machine_rates", rates)
    monkeypatch.setattr(module, "_disk_rates", lambda disk: (0.25e9, 0.125e9))
    return calls


def test_what_there_is_how_fast_it_is_and_what_to_mend(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    for name in ("fast", "net0"):
        (tmp_path / name).mkdir()
    result = run("doctor", "--dir", str(tmp_path / "fast"), "--dir", str(tmp_path / "net0"))
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    for part in ("box, 8 CPUs", "cgroup limit 24", "disk read", "1.00 GB/s", "packed 12.00 GB/s", "yes, it pays"):
        assert part in text
    assert "0.25 GB/s" in text  # the other disk, measured on its own
    for warning in ("limits memory", "transparent huge pages are off", "does not support O_DIRECT"):
        assert warning in text
    assert "other work" not in text
    assert [(call["path"], call["dtype"], call["refresh"]) for call in asked] == [
        (str(tmp_path / "fast"), "bfloat16", False)
    ]
    assert "other work used 0.7 cores" in " ".join(run("doctor", "--measure").stdout.split())
    assert asked[-1]["refresh"]


def test_directories_of_a_configuration_are_looked_at(asked: list[dict[str, Any]], tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    tiers = f"tiers: {{nvme: {{paths: [{tmp_path}/tier1, {tmp_path}/tier2]}}, ramdisk: {{enabled: true}}}}"
    models = "models: [{model_id: m, source_path: /models/there}]"
    config.write_text(f"applications: [{{args: {{{models}, {tiers}, cache_dir: {tmp_path}/cache}}}}]")
    result = run("doctor", "--config", str(config), "--json")
    assert result.exit_code == 0, result.output
    paths = [disk["path"] for disk in json.loads(result.stdout)["inventory"]["disks"]]
    assert paths == [
        "/models/there",
        f"{tmp_path}/tier1",
        f"{tmp_path}/tier2",
        "/dev/shm",
        f"{tmp_path}/cache",
        "/dev/shm",
    ]
    assert asked[0]["paths"] == (f"{tmp_path}/tier1", f"{tmp_path}/tier2")


def test_the_machine_file_is_what_plan_reads(
    asked: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raytier.cli import plan
    from tests.planner.models import llama

    machine = tmp_path / "machine.json"
    machine.write_text(run("doctor", "--json").stdout)
    assert Machine.from_json(machine.read_text()).rates == FULL_RATES
    monkeypatch.setattr(plan, "_describe", lambda directory, entry, config: (llama(), config))
    content = json.loads(run("plan", str(tmp_path), "--machine", str(machine), "--json").stdout)
    assert content["machine"] == json.loads(machine.read_text())
    assert content["plan"]["devices"][0]["packed"]
    assert content["budgets"]["device_capacity"] < 20 * GIB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dir", "/does/not/exist"], "/does/not/exist is not a directory"),
        (["--config", "/does/not/exist"], "cannot be read"),
    ],
)
def test_what_is_not_there_is_named(asked: list[dict[str, Any]], arguments: list[str], message: str) -> None:
    result = run("doctor", *arguments)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.output


def test_on_this_machine(tmp_path: Path) -> None:
    """Everything real: measured with a bar, cached, shown again at once."""
    from raytier.execution import rates
    from raytier.hardware import disk_rates

    config = tmp_path / "serve.yaml"
    models = "models: [{model_id: demo, source_path: 'builtin:demo'}]"
    config.write_text(f"applications: [{{args: {{{models}, compute: {{device: cpu}}, cache_dir: {tmp_path}/cache}}}}]")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_PROBE_BYTES", "_REGION"):
            patch.setattr(disk_rates, name, 16 * 2**20)
        patch.setattr(rates, "_TOTAL_BYTES", 16 * 2**20)
        patch.setattr(rates, "measure_steps", partial(rates.measure_steps, seconds=0.01))
        patch.setattr(rates, "LoadMeter", lambda: type("Idle", (), {"other_cores": 0.0})())
        first = run("doctor", "--config", str(config), "--dir", str(tmp_path), "--json")
        assert first.exit_code == 0, first.output
        machine = Machine.from_json(first.stdout)
        assert machine.rates is not None and machine.rates.disk_write_bytes_per_s is not None
        assert machine.inventory.cpus >= 1
        patch.setattr(rates, "_measure", lambda *args: pytest.fail("measured twice"))
        again = run("doctor", "--config", str(config), "--dir", str(tmp_path))
        assert again.exit_code == 0, again.output
        assert "linear layers, 64 rows" in again.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "serve.yaml"]
