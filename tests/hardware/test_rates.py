"""A2: rates, what follows from them, and the cache of what was measured."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest

from raytier.errors import ConfigurationError
from raytier.hardware.inventory import NodeInventory
from raytier.hardware.machine import Machine
from raytier.hardware.rates import (
    DEFAULT_CUDA_RATES,
    DEFAULT_RATES,
    Overlap,
    RateKey,
    Rates,
    load_rates,
    store_rates,
)

RATES = Rates(3e9, ((1, 20e9), (8, 18e9), (64, 10e9), (512, 2e9)))
#: Every field is other than its default.
EVERYTHING = replace(
    RATES,
    host_to_device_bytes_per_s=25e9,
    source="assumed",
    packed_matrix_bytes_per_s=((1, 25e9), (64, 15e9)),
    disk_write_bytes_per_s=2e9,
    ramdisk_read_bytes_per_s=8e9,
    memory_copy_bytes_per_s=20e9,
    device_to_host_bytes_per_s=24e9,
    attention_bytes_per_s=9e9,
    logits_per_s=1e9,
    layer_seconds=3e-4,
    layer_sequence_seconds=2e-5,
    step_seconds=1e-3,
    step_sequence_seconds=1e-5,
    prompt_bytes_per_s=2e9,
    prompt_flops=2e11,
    matrix_seconds=6e-5,
    packed_matrix_seconds=2e-5,
    overlap=Overlap(0.9, 0.8),
    ramdisk_overlap=Overlap(0.7, 0.6),
    other_cores=0.5,
)


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


def test_packing_pays_where_it_is_faster_over_all_row_counts() -> None:
    def pays(*factors: float) -> bool:
        points = tuple((n, rate * f) for (n, rate), f in zip(RATES.matrix_bytes_per_s, factors, strict=True))
        return replace(RATES, packed_matrix_bytes_per_s=points).packed_pays

    assert not RATES.packed_pays
    assert pays(1.2, 1.2, 1.2, 1.2)
    assert pays(0.95, 1.3, 1.3, 1.0)
    assert not pays(1.01, 1.01, 1.0, 1.0)
    assert not pays(0.8, 1.1, 1.1, 1.0)
    packed = replace(RATES, packed_matrix_bytes_per_s=((1, 30e9), (512, 3e9)))
    assert packed.matrix_rate(1, packed=True) == 30e9
    assert packed.matrix_rate(1) == RATES.matrix_rate(1, packed=True) == 20e9


def test_slower_reads() -> None:
    slow = replace(RATES, ramdisk_read_bytes_per_s=8e9).with_slower_reads(0.5)
    assert (slow.disk_read_bytes_per_s, slow.ramdisk_read_bytes_per_s) == (1.5e9, 4e9)
    assert RATES.with_slower_reads(1.0) == RATES


def test_cache_round_trip_per_key(tmp_path: Path) -> None:
    key = RateKey(str(tmp_path), "bfloat16", "cpu", 2)
    assert load_rates(str(tmp_path), key) is None
    store_rates(str(tmp_path), key, EVERYTHING)
    store_rates(str(tmp_path), RateKey(str(tmp_path), "float32", "cpu", 2), DEFAULT_RATES)
    assert load_rates(str(tmp_path), key) == EVERYTHING
    assert load_rates(str(tmp_path), RateKey(str(tmp_path), "bfloat16", "cpu", 4)) is None
    assert load_rates(str(tmp_path), RateKey(str(tmp_path), "bfloat16", "cuda")) is None
    assert load_rates(str(tmp_path), replace(key, ramdisk="/dev/shm")) is None
    assert load_rates(str(tmp_path), replace(key, nvme_paths=(str(tmp_path), "/dev/shm"))) is None
    assert load_rates(str(tmp_path), replace(key, path=str(tmp_path / "not" / "made" / "yet"))) == EVERYTHING
    assert os.listdir(tmp_path) == ["rates.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 0, "rates": {}}', '{"version": 2, "rates": 3}'])
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


def test_rates_measured_beside_other_work_are_known_as_such() -> None:
    assert EVERYTHING.busy
    assert not RATES.busy


def test_machine_file() -> None:
    node = NodeInventory("n", 4, 16, 8)
    machine = Machine(node, EVERYTHING)
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
