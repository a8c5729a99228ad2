"""A2, first version: the disk rate, and the cache of what was measured."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import pytest

from raytier.errors import ConfigurationError, TierError
from raytier.hardware import rates as module
from raytier.hardware.inventory import NodeInventory
from raytier.hardware.machine import Machine
from raytier.hardware.rates import (
    DEFAULT_CUDA_RATES,
    DEFAULT_RATES,
    RateKey,
    Rates,
    load_rates,
    measure_disk_read,
    store_rates,
)

RATES = Rates(3e9, ((1, 20e9), (8, 18e9), (64, 10e9), (512, 2e9)))


def test_matrix_rate_is_interpolated_and_falls_beyond_the_last_point() -> None:
    assert RATES.matrix_rate(1) == 20e9
    assert RATES.matrix_rate(8) == pytest.approx(18e9)
    assert RATES.matrix_rate(512) == pytest.approx(2e9)
    assert RATES.matrix_rate(1024) == pytest.approx(1e9)
    values = [RATES.matrix_rate(n) for n in range(1, 2000)]
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("points", [(), ((8, 1.0), (1, 1.0)), ((1, 1.0), (1, 2.0))])
def test_rows_must_rise(points: tuple[tuple[int, float], ...]) -> None:
    with pytest.raises(ValueError, match="rows must rise"):
        Rates(1.0, points)


@pytest.mark.parametrize("size", [1, 4095, 4096, 10_000, 9 * 2**20 + 5])
def test_disk_rate_of_files_of_any_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    assert measure_disk_read(str(path), 0.02) > 0


def test_disk_rate_without_o_direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(100_000))
    real_open = os.open

    def refuse(name: str, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(name, flags, *rest)

    monkeypatch.setattr(module.os, "open", refuse)
    assert measure_disk_read(str(path), 0.02) > 0


def test_disk_rate_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(TierError, match="empty"):
        measure_disk_read(str(tmp_path / "empty"))
    with pytest.raises(TierError, match="missing"):
        measure_disk_read(str(tmp_path / "missing"))


def test_cache_round_trip_per_key(tmp_path: Path) -> None:
    key = RateKey(str(tmp_path), "bfloat16", "cpu", 2)
    assert load_rates(str(tmp_path), key) is None
    store_rates(str(tmp_path), key, RATES)
    store_rates(str(tmp_path), RateKey(str(tmp_path), "float32", "cpu", 2), DEFAULT_RATES)
    assert load_rates(str(tmp_path), key) == RATES
    assert load_rates(str(tmp_path), RateKey(str(tmp_path), "bfloat16", "cpu", 4)) is None
    assert load_rates(str(tmp_path), RateKey(str(tmp_path), "bfloat16", "cuda")) is None
    assert os.listdir(tmp_path) == ["rates.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 0, "rates": {}}', '{"version": 1, "rates": 3}'])
def test_a_damaged_cache_is_ignored_with_a_log_line(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    key = RateKey(str(tmp_path), "bfloat16")
    (tmp_path / "rates.json").write_text(content)
    with caplog.at_level(logging.WARNING):
        assert load_rates(str(tmp_path), key) is None
    assert "ignored" in caplog.text
    store_rates(str(tmp_path), key, RATES)
    assert load_rates(str(tmp_path), key) == RATES


def test_a_damaged_entry_is_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = RateKey(str(tmp_path), "bfloat16")
    store_rates(str(tmp_path), key, RATES)
    path = tmp_path / "rates.json"
    path.write_text(path.read_text().replace("3000000000.0", '"fast"'))
    assert load_rates(str(tmp_path), key) is None
    assert "disk_read_bytes_per_s" in caplog.text


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "taken").write_text("")
    store_rates(str(tmp_path / "taken"), RateKey(str(tmp_path), "bfloat16"), RATES)
    assert "not cached" in caplog.text


def test_machine_file() -> None:
    node = NodeInventory("n", 4, 16, 8)
    machine = Machine(node, RATES)
    assert Machine.from_json(machine.to_json()) == machine
    bare = Machine.from_json(Machine(node).to_json())
    assert bare.rates_for("cpu") == DEFAULT_RATES
    assert bare.rates_for("cuda") == DEFAULT_CUDA_RATES


@pytest.mark.parametrize(
    ("before", "after", "field"),
    [
        ("3000000000.0", "0", "machine.rates.disk_read_bytes_per_s"),
        ('"cpus": 4', '"cpus": "many"', "machine.inventory.cpus"),
        ('"measured"', '"guessed"', "machine.rates.source"),
        ('"inventory"', '"inventories"', "machine.inventories: unknown field"),
    ],
)
def test_machine_file_names_the_bad_field(before: str, after: str, field: str) -> None:
    text = Machine(NodeInventory("n", 4, 16, 8), RATES).to_json()
    assert before in text
    with pytest.raises(ConfigurationError, match=field):
        Machine.from_json(text.replace(before, after))
