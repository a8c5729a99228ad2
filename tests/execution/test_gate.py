"""D5: changes wait for the end of a sweep and for nothing else."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from raytier.execution.gate import SweepGate


def test_an_idle_gate_applies_at_once_and_passes_results_and_errors_on() -> None:
    gate = SweepGate()
    assert gate.between(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        gate.between(lambda: 1 // 0)
    with pytest.raises(KeyError), gate.sweep():
        raise KeyError("a sweep that fails")
    assert gate.between(lambda: 8) == 8  # and lets changes in afterwards


def test_a_change_waits_for_the_sweep_under_way() -> None:
    gate = SweepGate()
    order = []
    with ThreadPoolExecutor(1) as others:
        with gate.sweep():
            change = others.submit(gate.between, lambda: order.append("change"))
            time.sleep(0.05)
            assert not change.done()
            order.append("sweep")
        change.result(10)
    assert order == ["sweep", "change"]


def test_changes_get_in_between_sweeps_without_a_pause_and_never_during_one() -> None:
    gate = SweepGate()
    stop = threading.Event()
    sweeping = False
    overlaps = changes = 0

    def sweep() -> None:
        nonlocal sweeping
        while not stop.is_set():
            with gate.sweep():
                sweeping = True
                time.sleep(0.0005)
                sweeping = False

    def change() -> None:
        nonlocal overlaps, changes
        overlaps += sweeping
        changes += 1

    with ThreadPoolExecutor(4) as threads:
        sweeper = threads.submit(sweep)
        askers = [threads.submit(lambda: [gate.between(change) for _ in range(100)]) for _ in range(3)]
        for asker in askers:
            asker.result(60)
        stop.set()
        sweeper.result(10)
    assert (changes, overlaps) == (300, 0)
