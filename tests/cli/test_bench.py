"""C5, I4: `raytier bench` on real actors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from raytier.cli.main import app


def run(*args: str) -> Result:
    return CliRunner().invoke(app, ["bench", *args])


@pytest.mark.parametrize("batch", ["", "0", "1,two", "-3"])
def test_batches_are_checked_before_anything_is_loaded(batch: str) -> None:
    result = run("builtin:demo", "--batch", batch)
    assert result.exit_code == 1
    assert "separated by commas" in " ".join(result.stderr.split())


def test_a_missing_model_is_an_error() -> None:
    result = run("/does/not/exist")
    assert result.exit_code == 1
    assert "/does/not/exist" in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.integration
def test_prediction_beside_measurement(tmp_path: Path, ray_session: None) -> None:
    config = tmp_path / "serve.yaml"
    models = "models: [{model_id: demo, source_path: 'builtin:demo'}]"
    compute = "compute: {device: cpu, threads: 1}"
    config.write_text(f"applications: [{{args: {{{models}, {compute}, cache_dir: {tmp_path}/cache}}}}]")
    options = ("demo", "--config", str(config), "--batch", "1,3", "--context", "24", "--seconds", "0.1")
    result = run(*options, "--device-mb", "8", "--host-mb", "0", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [step["batch"] for step in found["steps"]] == [1, 3]
    assert found["streamed_bytes_per_step"] > 0
    for step in found["steps"]:
        assert 8 <= step["context"] <= 40
        assert step["seconds"] > 0 and step["predicted_seconds"] > 0
        assert step["tokens_per_second"] == pytest.approx(step["batch"] / step["seconds"])
        # Every streamed parameter byte of every step was counted, and the few rows of the embedding.
        assert step["streamed_bytes_per_second"] * step["seconds"] == pytest.approx(
            found["streamed_bytes_per_step"], rel=0.01
        )
    assert found["first_token"]["prompt_tokens"] == 128
    assert found["first_token"]["seconds"] > 0

    table = run(*options)
    assert table.exit_code == 0, table.output
    text = " ".join(table.stdout.split())
    assert "predicted" in text and "measured" in text and "first token of a 128-token prompt" in text
