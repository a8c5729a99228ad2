"""E3, E4, I4: `raytier models` on a models.yaml; with a server: tests/integration/test_many_models.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from raytier.cli.main import app
from raytier.sources.registry import read_models

FILE = """# what we serve
models:
- model_id: demo
  source_type: local
  source_path: builtin:demo
  model_format: safetensors
- model_id: llama  # asked for by the lab
  source_type: huggingface
  source_path: org/llama
  model_format: safetensors
  custom_loader_params: {access_token: very-secret, shard: 3}
"""


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    path = tmp_path / "models.yaml"
    path.write_text(FILE)
    return path


def run(*words: str) -> Result:
    return CliRunner().invoke(app, ["models", *words], env={"COLUMNS": "200", "NO_SUCH_TOKEN": None})


def test_list_and_show(registry: Path) -> None:
    listed = run("list", "--registry", str(registry))
    assert listed.exit_code == 0, listed.output
    assert [line.split()[1::2] for line in listed.stdout.splitlines() if "builtin" in line] == [
        ["demo", "local", "builtin:demo", "-", "auto"]
    ]
    assert "org/llama" in listed.stdout
    shown = run("show", "org/llama", "--registry", str(registry))
    assert shown.exit_code == 0 and "model_id: llama" in shown.stdout and "shard: 3" in shown.stdout
    assert "very-secret" not in listed.output + shown.output


def test_register_adds_changes_and_keeps_the_rest(registry: Path) -> None:
    where = ("--registry", str(registry))
    words = ("register", "new", "org/new", "--source-type", "huggingface", "--set", "pinned=true")
    assert run(*words, *where).stdout == "new is registered\n"
    assert run(*words, *where).stdout == "new was registered so already\n"
    assert run(*words, "--set", "quantization_bits=8", *where).exit_code == 0
    entry = read_models(str(registry))[-1]
    assert (entry.model_id, entry.pinned, entry.quantization_bits) == ("new", True, 8)
    assert registry.read_text().startswith(FILE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["show", "other"], "'other' is not served here; served are: demo, llama"),
        (["register", "new", "relative/path"], "must be an absolute path"),
        (["register", "new", "/x", "--set", "pinned"], "FIELD=VALUE"),
        (["register", "new", "/x", "--set", "pinned=["], "not YAML"),
        (["register", "new", "/x", "--set", "quantization_bits=5"], "quantization_bits"),
        (["register", "new", "/x", "--no-persist"], "--no-persist"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_changed(registry: Path, words: list[str], said: str) -> None:
    result = run(*words, "--registry", str(registry))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: ") and said in result.stderr
    assert registry.read_text() == FILE


def test_a_server_or_a_token_that_is_not_there() -> None:
    nobody = run("list", "--url", "http://127.0.0.1:9")
    assert nobody.exit_code == 1 and "is --url right?" in nobody.stderr
    assert "no NO_SUCH_TOKEN in the environment" in run("load", "demo", "--token-env", "NO_SUCH_TOKEN").stderr
