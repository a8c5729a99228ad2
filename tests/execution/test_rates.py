"""A2: rates that only torch can measure, what disturbs them, and their cache."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from raytier.errors import TierError
from raytier.execution import rates as module
from raytier.execution.rates import LinearLayers, measure_bus, measure_copy, measure_matrix, measure_reading, node_rates
from raytier.execution.step_rates import StepRates, measure_steps
from raytier.hardware import disk_rates
from raytier.hardware.rates import Overlap, Rates

STEPS = StepRates(5e9, 1e9, 3e-4, 2e-5, 1e-3, 1e-5, 1e9, 1e11, 6e-5, 2e-5)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SHAPE", (256, 512))
    monkeypatch.setattr(module, "_TOTAL_BYTES", 2**20)
    monkeypatch.setattr(module, "_COPY_BYTES", 2**20)
    monkeypatch.setattr(module, "_READ_SECONDS", 0.02)
    monkeypatch.setattr(module, "measure_matrix", partial(measure_matrix, seconds=0.02))
    monkeypatch.setattr(module, "measure_copy", partial(measure_copy, seconds=0.01))
    monkeypatch.setattr(disk_rates, "_PROBE_BYTES", 16 * 2**20)
    monkeypatch.setattr(disk_rates, "_REGION", 16 * 2**20)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Cores that other work uses, as the meter says: the first value, which a test may change."""
    cores = [0.0]
    monkeypatch.setattr(module, "LoadMeter", lambda: type("Meter", (), {"other_cores": property(lambda _: cores[0])})())
    monkeypatch.setattr(module, "measure_steps", lambda *args, **kwargs: STEPS)
    return cores


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "weights"
    path.write_bytes(bytes(50_000))
    return str(path)


@pytest.fixture
def ramdisk() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        yield directory


def measured(file: str, cache: Path, **options: Any) -> Rates:
    return node_rates(file, dtype="bfloat16", threads=1, cache_dir=str(cache), **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@torch.inference_mode()
def test_matrix_rate_per_row_count_plain_and_packed(dtype: str) -> None:
    layers = LinearLayers(dtype)
    assert layers.nbytes == 256 * 512 * (2 if dtype == "bfloat16" else 4)
    plain = measure_matrix(layers, rows=(1, 16), seconds=0.02)
    assert [rows for rows, _ in plain] == [1, 16]
    assert all(rate > 0 for _, rate in plain)
    if layers.can_pack:
        layers.pack()
        assert all(module.weight.is_meta for module in layers._modules)  # only one copy is kept
        assert [rows for rows, _ in measure_matrix(layers, rows=(1, 16), seconds=0.02)] == [1, 16]


@torch.inference_mode()
def test_reading_beside_computing(file: str) -> None:
    rate, overlap = measure_reading([file], LinearLayers("bfloat16"), 0.05)
    assert rate > 0
    assert 0.05 <= overlap.reading <= 1
    assert 0.05 <= overlap.computing <= 1
    assert measure_reading([file], None, 0.02)[1] == Overlap()


def test_memory_copy() -> None:
    assert measure_copy(0.02) > 1e6


def test_everything_is_measured_once_reported_and_cached(
    file: str, tmp_path: Path, load: list[float], ramdisk: str
) -> None:
    cache, told = tmp_path / "cache", []
    threads = torch.get_num_threads()
    first = measured(file, cache, ramdisk=ramdisk, progress=lambda what, done: told.append((what, done)))
    assert first.source == "measured"
    assert first.layer_seconds == STEPS.layer_seconds
    assert first.host_to_device_bytes_per_s is None
    for value in (first.disk_write_bytes_per_s, first.ramdisk_read_bytes_per_s, first.memory_copy_bytes_per_s):
        assert value is not None and value > 0
    if LinearLayers("bfloat16").can_pack:
        assert first.packed_matrix_bytes_per_s is not None
    assert [done for _, done in told] == sorted(done for _, done in told)
    assert (told[0], told[-1]) == (("writing to disk", 0.0), ("done", 1.0))
    assert torch.get_num_threads() == threads
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".raytier")]
    assert os.listdir(ramdisk) == []

    told.clear()
    again = measured(file, cache, ramdisk=ramdisk, progress=lambda what, done: told.append((what, done)))
    assert again == first
    assert told == []
    assert measured(file, cache).ramdisk_read_bytes_per_s is None  # another question
    assert measured(file, cache, ramdisk=ramdisk, refresh=True) != first


def test_directories_of_the_disk_tier_are_written_and_read(file: str, tmp_path: Path, load: list[float]) -> None:
    tiers = [tmp_path / "a", tmp_path / "b"]
    for tier in tiers:
        tier.mkdir()
    reads: list[list[str]] = []
    real = module.measure_reading

    def reading(files: list[str], *rest: Any) -> tuple[float, Overlap]:
        reads.append([os.path.dirname(name) for name in files])
        return real(files, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "measure_reading", reading)
        measured(file, tmp_path / "cache", nvme_paths=[str(tier) for tier in tiers])
        measured(str(tmp_path), tmp_path / "cache")  # a directory: a file is made there for the purpose
    assert reads == [[str(tier) for tier in tiers], [str(tmp_path)]]
    assert [list(tier.iterdir()) for tier in tiers] == [[], []]


def test_a_disturbed_measurement_is_repeated_until_it_was_not(
    file: str, tmp_path: Path, load: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    load[0] = 1.0
    with caplog.at_level(logging.INFO):
        first = measured(file, cache)
    assert first.busy
    assert "other work used 1.0 cores" in caplog.text

    load[0] = 1.5  # more disturbed: what there is stays
    assert measured(file, cache) == first
    load[0] = 0.5  # less: that is better
    second = measured(file, cache)
    assert second.other_cores == 0.5
    caplog.clear()
    load[0] = 0.0
    with caplog.at_level(logging.INFO):
        third = measured(file, cache)
    assert not third.busy
    assert "measuring again" in caplog.text
    load[0] = 2.0
    assert measured(file, cache) == third


def test_a_missing_file_is_an_error(tmp_path: Path, load: list[float]) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(TierError, match="empty"):
        measured(str(tmp_path / "empty"), tmp_path / "cache")


def test_steps_of_the_real_code_path() -> None:
    threads = torch.get_num_threads()
    rates = Rates(1e9, ((1, 1e10), (512, 1e9)), packed_matrix_bytes_per_s=((1, 2e10),))
    found = measure_steps("bfloat16", 1, rates, seconds=0.3)
    assert torch.get_num_threads() == threads
    assert 1e-6 <= found.layer_seconds < 0.1
    assert 1e-6 <= found.step_seconds < 0.5
    assert 0 <= found.layer_sequence_seconds < found.layer_seconds * 32
    assert 1e7 < found.attention_bytes_per_s < 1e13
    assert 1e6 < found.logits_per_s < 1e12
    assert 1e6 < found.prompt_bytes_per_s < 1e12
    assert 1e8 < found.prompt_flops < 1e15
    assert 0 <= found.matrix_seconds < 0.1
    assert 0 <= found.packed_matrix_seconds < 0.1
    crawling = Rates(1e9, ((1, 1.0),), packed_matrix_bytes_per_s=((1, 1.0),))
    slow = measure_steps("bfloat16", 1, crawling, seconds=0.1)
    assert slow.matrix_seconds == slow.packed_matrix_seconds == 0  # all of it is the bytes
    assumed = measure_steps("bfloat16", 4, crawling, disturbed=True, seconds=0.1)
    assert assumed.matrix_seconds > assumed.packed_matrix_seconds > 0


def test_rates_are_of_the_calls_that_nothing_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    from raytier.execution import timing

    clock = [0.0]
    durations = iter([1.0] + [0.010, 0.080, 0.011, 0.080, 0.012, 0.080] * 50)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])

    def call() -> None:
        clock[0] += next(durations)

    assert timing.typical_seconds(call, 2.0) == pytest.approx(0.011)
    slow = iter([10.0] * 100)

    def crawl() -> None:
        clock[0] += next(slow)

    began = clock[0]
    assert timing.typical_seconds(crawl, 0.1) == 10.0
    assert clock[0] - began == 20.0  # a warm-up and one call, not five


@pytest.mark.gpu
def test_gpu_rates(file: str, tmp_path: Path) -> None:
    there, back = measure_bus(seconds=0.05)
    assert there > 1e9 and back > 1e9
    found = measured(file, tmp_path / "cache", kind="cuda")
    assert found.matrix_bytes_per_s[0][1] > 1e9
    assert found.packed_matrix_bytes_per_s is None
    assert replace(found, source="assumed").host_to_device_bytes_per_s
