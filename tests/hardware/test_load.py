"""A2: other work is noticed while rates are measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

from raytier.hardware.load import LoadMeter

TICKS = os.sysconf("SC_CLK_TCK")


def write(path: Path, busy_seconds: float, stolen_seconds: float = 0) -> None:
    busy, stolen = int(busy_seconds * TICKS), int(stolen_seconds * TICKS)
    path.write_text(f"cpu  {busy} 0 0 99999 999 0 0 {stolen} 0 0\ncpu0 1 2 3\n")


def test_what_others_used_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "stat"
    write(path, 1000)
    meter = LoadMeter(str(path))
    time.sleep(0.1)
    write(path, 1000.5)  # half a second of work in about 0.1 s
    assert 0.5 < meter.other_cores <= 5.1
    before = meter.other_cores
    write(path, 1000.5, 100)  # taken by other virtual machines
    assert meter.other_cores > 10 * before


def test_own_work_is_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "stat"
    write(path, 1000)
    meter = LoadMeter(str(path))
    before = time.process_time()
    while (used := time.process_time() - before) < 0.2:
        pass
    write(path, 1000 + used)
    assert meter.other_cores < 0.3


def test_a_kernel_that_tells_nothing(tmp_path: Path) -> None:
    assert LoadMeter(str(tmp_path / "missing")).other_cores == 0.0
    (tmp_path / "odd").write_text("cpu")
    assert LoadMeter(str(tmp_path / "odd")).other_cores == 0.0


def test_the_real_file_can_be_read() -> None:
    meter = LoadMeter()
    time.sleep(0.05)
    assert 0 <= meter.other_cores < 1000
