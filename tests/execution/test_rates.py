"""A2, first version: the matrix rate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raytier.execution import rates as module
from raytier.execution.rates import measure_bus, measure_matrix, node_rates


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHAPE", (256, 512))
    monkeypatch.setattr(module, "_TOTAL_BYTES", 2**20)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_matrix_rate_per_row_count(dtype: str) -> None:
    threads = torch.get_num_threads()
    rates = measure_matrix(dtype, 1, rows=(1, 16), seconds=0.02)
    assert [rows for rows, _ in rates] == [1, 16]
    assert all(rate > 0 for _, rate in rates)
    assert torch.get_num_threads() == threads


def test_node_rates_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(50_000))
    cache = str(tmp_path / "cache")
    first = node_rates(str(file), dtype="bfloat16", threads=1, cache_dir=cache)
    assert first.source == "measured"
    assert first.host_to_device_bytes_per_s is None
    monkeypatch.setattr(module, "measure_matrix", lambda *args, **kwargs: pytest.fail("measured twice"))
    assert node_rates(str(file), dtype="bfloat16", threads=1, cache_dir=cache) == first


@pytest.mark.gpu
def test_gpu_rates() -> None:
    assert measure_bus(seconds=0.05) > 1e9
    (_, rate), *_ = measure_matrix("bfloat16", 1, seconds=0.05, device="cuda")
    assert rate > 1e9
