"""C5: `raytier plan`."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from raytier.cli import plan as module
from raytier.cli.main import app
from raytier.cli.render import groups, ranges
from raytier.hardware.machine import Machine
from raytier.planner.placement import plan_weights
from tests.planner.models import CPU_NODE, GPU_NODE, GPU_RATES, RAMDISK_RATES, RATES, configuration, llama

LLAMA_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}


@pytest.fixture
def cpu_machine(tmp_path: Path) -> str:
    path = tmp_path / "machine.json"
    path.write_text(Machine(CPU_NODE, RATES).to_json())
    return str(path)


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A directory that is described as a small Llama without importing torch."""
    monkeypatch.setattr(module, "_describe", lambda directory, entry, config: (llama(), config))
    (tmp_path / "model").mkdir()
    return str(tmp_path / "model")


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["plan", *args])


def test_tables(model: str, cpu_machine: str) -> None:
    result = run(model, "--machine", cpu_machine, "--device-mb", "15", "--host-mb", "0")
    assert result.exit_code == 0, result.output
    for text in ("cpu-node", "measured rates", "Budgets", "Device budget", "Placement", "Prediction", "through a ring"):
        assert text in result.stdout
    assert "first token of a 128-token prompt after" in " ".join(result.stdout.split())


def test_json_is_the_plan(model: str, cpu_machine: str) -> None:
    result = run(model, "--machine", cpu_machine, "--device-mb", "15", "--host-mb", "0", "--json")
    content = json.loads(result.stdout)
    expected = plan_weights(llama(), CPU_NODE, RATES, configuration(device_mb=15, scheduler={}, kv={}))
    assert content["plan"]["streamed_bytes"] == expected.streamed_bytes > 0
    assert content["plan"]["devices"][0]["ring_bytes"] == expected.devices[0].ring_bytes
    assert content["plan"]["predictions"][0]["tokens_per_second"] > 0
    assert content["resources"]["roles"][0] == "replica"
    assert content["budgets"]["device_bytes"] == 15 * 2**20
    assert Machine.from_json(json.dumps(content["machine"])) == Machine(CPU_NODE, RATES)


def test_a_refusal_is_one_error_and_no_traceback(model: str, cpu_machine: str) -> None:
    result = run(model, "--machine", cpu_machine, "--device-mb", "2", "--host-mb", "0")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("Error: /models/llama does not fit")
    assert "raise tiers.device.max_mb to" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("machine", "{", "machine is not JSON"),
        ("machine", '{"inventory": {}}', "machine.inventory.hostname: required"),
        ("machine", None, "cannot be read"),
        ("config", "- [", "is not YAML"),
        ("config", "a: 1", "no Serve configuration"),
        ("config", "applications: [{args: {tiers: {device: {max_mbs: 3}}}}]", "tiers.device.max_mbs: unknown key"),
    ],
)
def test_bad_files_are_named(
    model: str, cpu_machine: str, tmp_path: Path, name: str, content: str | None, message: str
) -> None:
    path = tmp_path / "bad"
    if content is not None:
        path.write_text(content)
    result = run(model, "--machine", cpu_machine, f"--{name}", str(path))
    assert result.exit_code == 1
    assert message in result.stderr


def test_a_missing_model_is_an_error(cpu_machine: str) -> None:
    result = run("/does/not/exist", "--machine", cpu_machine)
    assert result.exit_code == 1
    assert "/does/not/exist: no such directory" in result.stderr


def test_config_and_options_together(model: str, cpu_machine: str, tmp_path: Path) -> None:
    config = tmp_path / "serve.yaml"
    models = f"models: [{{model_id: mine, source_path: {model}}}]"
    kv = "kv: {expected_sequences: 2, expected_context: 64, block_size: 8}"
    config.write_text(
        f"applications:\n- args: {{{models}, startup_model: mine, {kv}, tiers: {{host: {{max_mb: 5}}}}}}\n"
    )
    for name in ("mine", model):
        result = run(name, "--config", str(config), "--machine", cpu_machine, "--device-mb", "12", "--json")
        content = json.loads(result.stdout)
        assert content["plan"]["devices"][0]["block_size"] == 8
        assert content["budgets"]["device_bytes"] == 12 * 2**20
        assert content["budgets"]["host_bytes"] == 5 * 2**20


def test_this_machine_is_measured_and_remembered(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from raytier.checkpoint.manifest import SourceFile
    from raytier.execution import rates
    from raytier.execution.step_rates import StepRates
    from raytier.hardware import disk_rates

    for name in ("_PROBE_BYTES", "_REGION"):
        monkeypatch.setattr(disk_rates, name, 16 * 2**20)
    monkeypatch.setattr(rates, "_TOTAL_BYTES", 16 * 2**20)
    monkeypatch.setattr(rates, "_READ_SECONDS", 0.02)
    steps = StepRates(5e9, 1e9, 3e-4, 2e-5, 1e-3, 1e-5, 1e9, 1e11, 6e-5, 2e-5)
    monkeypatch.setattr(rates, "measure_steps", lambda *args, **kwargs: steps)
    file = tmp_path / "weights"
    file.write_bytes(bytes(10_000))
    manifest = replace(llama(), files=(SourceFile(str(file), 10_000),))
    monkeypatch.setattr(module, "_describe", lambda directory, entry, config: (manifest, config))
    monkeypatch.setattr(rates, "measure_matrix", lambda *args, **kwargs: ((1, 7e9),))
    config = tmp_path / "serve.yaml"
    config.write_text(f"applications: [{{args: {{cache_dir: {tmp_path}/cache, compute: {{device: cpu}}}}}}]")

    monkeypatch.setattr(rates, "LoadMeter", lambda: type("Idle", (), {"other_cores": 0.0})())
    measured = run(model, "--config", str(config), "--json")
    first = json.loads(measured.stdout)["machine"]["rates"]
    assert first["source"] == "measured"
    assert first["matrix_bytes_per_s"] == [[1, 7e9]]
    assert json.loads(run(model, "--config", str(config), "--json").stdout)["machine"]["rates"] == first

    monkeypatch.setattr(rates, "measure_matrix", lambda *args, **kwargs: ((1, 9e9),))
    again = json.loads(run(model, "--config", str(config), "--json", "--measure").stdout)["machine"]["rates"]
    assert again["matrix_bytes_per_s"] == [[1, 9e9]]


def test_the_demo_model(cpu_machine: str) -> None:
    result = run("builtin:demo", "--machine", cpu_machine, "--json")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    assert {p["tier"] for p in content["plan"]["placements"]} == {"device"}
    assert content["plan"]["warnings"] == []


def test_a_config_alone_is_enough_for_seventy_billion_parameters(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_70B))
    machine = tmp_path / "gpu.json"
    machine.write_text(Machine(GPU_NODE, GPU_RATES).to_json())
    content: dict[str, Any] = json.loads(run(str(tmp_path), "--machine", str(machine), "--json").stdout)
    assert content["model"]["nbytes"] == 141_107_412_992
    assert content["plan"]["devices"][0]["kind"] == "cuda"
    assert content["plan"]["nvme_bytes"] == 0
    disk = json.loads(run(str(tmp_path), "--machine", str(machine), "--host-mb", "0", "--json").stdout)["plan"]
    assert disk["host_bytes"] == 0
    assert disk["predictions"][0]["seconds"] == pytest.approx(disk["streamed_bytes"] / 3.5e9, rel=0.02)


def test_tiers_that_are_used_or_left_out_are_shown(model: str, tmp_path: Path) -> None:
    machine = tmp_path / "machine.json"
    machine.write_text(Machine(CPU_NODE, RAMDISK_RATES).to_json())
    config = tmp_path / "serve.yaml"
    config.write_text("applications: [{args: {tiers: {ramdisk: {enabled: true, size_mb: 4, usable_percent: 100}}}}]")
    options = ("--config", str(config), "--device-mb", "12", "--host-mb", "0")
    text = " ".join(run(model, "--machine", str(machine), *options).stdout.split())
    assert "ramdisk" in text
    assert "from ramdisk and disk through a ring" in text
    assert "copied to the ramdisk" in text
    machine.write_text(Machine(CPU_NODE, replace(RAMDISK_RATES, ramdisk_read_bytes_per_s=0.5e9)).to_json())
    text = " ".join(run(model, "--machine", str(machine), *options).stdout.split())
    assert "the ramdisk tier is left out, it would not pay" in text
    assert "from disk through a ring" in text


def test_layers_placed_alike_are_one_row() -> None:
    manifest = llama()
    plan = plan_weights(manifest, CPU_NODE, RATES, configuration(device_mb=10))
    shown = groups(manifest, plan)
    assert shown[0].title == "embedding"
    assert shown[-2].title == "head"
    assert sum(len(group.parameters) for group in shown) == len(manifest.parameters)
    assert len(shown) < manifest.num_layers
    resident = groups(manifest, plan_weights(manifest, CPU_NODE, RATES, configuration()))
    assert [group.title for group in resident] == ["embedding", "8 layers: 0-7", "head", "other"]
    tied = llama(tied=True)
    assert groups(tied, plan_weights(tied, CPU_NODE, RATES, configuration()))[0].title == "embedding and head (tied)"


def test_ranges() -> None:
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert ranges(range(0, 20, 2)) == "0, 2, 4, ..., 18"
    assert ranges([]) == ""


def test_version_and_module_entry_point() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "raytier.cli", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.startswith("raytier ")


def test_planning_a_machine_file_needs_no_torch_until_a_model_is_described() -> None:
    code = "import sys, raytier.cli.main; print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
