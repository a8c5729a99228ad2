"""C1: predicted seconds per step."""

from __future__ import annotations

import pytest

from raytier.planner.cost import describe_sweep, predict_first_token, predict_step, sweep_seconds
from raytier.planner.plan import Tier
from raytier.planner.sizing import ALIGNMENT_SLACK, Ring
from tests.planner.models import GPU_RATES, RATES, llama


def test_even_units_cost_the_larger_of_reading_and_computing() -> None:
    for io, compute in ((2.0, 1.0), (1.0, 2.0), (1.0, 1.0)):
        assert sweep_seconds([io] * 6, [compute] * 6, [10] * 6, 30) == pytest.approx(6 * max(io, compute))


def test_a_ring_of_one_unit_overlaps_nothing() -> None:
    assert sweep_seconds([2.0] * 6, [1.0] * 6, [10] * 6, 10) == pytest.approx(18)


def test_the_ring_smooths_uneven_units() -> None:
    io, compute, sizes = [0.0, 2.0] * 4, [1.0] * 8, [0, 20] * 4
    assert sweep_seconds(io, compute, sizes, 60) == pytest.approx(8)  # a sum of max(io, compute) would say 12


def test_what_is_resident_reads_nothing() -> None:
    assert sweep_seconds([0.0] * 3, [1.0, 2.0, 3.0], [0] * 3, 0) == pytest.approx(6)


def test_resident_step_is_weights_over_the_matrix_rate() -> None:
    manifest = llama()
    sweep = describe_sweep(manifest, {p.name: Tier.DEVICE for p in manifest.parameters}, "cpu", Ring())
    body = manifest.nbytes - manifest.by_name[manifest.embedding].nbytes
    for batch in (1, 8):
        step = predict_step(sweep, RATES, batch)
        assert step.io_seconds == 0
        assert (
            step.seconds
            == pytest.approx(step.compute_seconds)
            == pytest.approx(body / RATES.matrix_rate(batch), rel=1e-3)
        )
        assert step.tokens_per_second == pytest.approx(batch / step.seconds)
    assert predict_first_token(sweep, RATES) > predict_step(sweep, RATES, 8).seconds


def test_everything_on_disk_costs_the_disk() -> None:
    manifest = llama()
    tiers = {p.name: Tier.NVME if len(p.shape) > 1 else Tier.DEVICE for p in manifest.parameters}
    sweep = describe_sweep(manifest, tiers, "cpu", Ring(4, 3 * 2**20, 500))
    matrices = sum(p.nbytes for p in manifest.parameters if len(p.shape) > 1)
    embedding = manifest.by_name[manifest.embedding]
    assert sweep.streamed_bytes == matrices - embedding.nbytes
    row = embedding.nbytes // manifest.vocab_size + ALIGNMENT_SLACK
    step = predict_step(sweep, RATES, 8)
    assert step.io_seconds == pytest.approx((sweep.streamed_bytes + 8 * row) / 1e9)
    assert step.seconds == pytest.approx(step.io_seconds, rel=0.01)


def test_a_tied_pair_on_disk_streams_as_the_head_and_reads_rows() -> None:
    manifest = llama(tied=True)
    tiers = {p.name: Tier.NVME if p.name == manifest.embedding else Tier.DEVICE for p in manifest.parameters}
    sweep = describe_sweep(manifest, tiers, "cpu", Ring(3, 2**20, 1000))
    assert sweep.streamed_bytes == manifest.by_name[manifest.embedding].nbytes
    assert sweep.row_bytes > 0


def test_host_memory_is_in_place_on_a_cpu_and_crosses_the_bus_to_a_gpu() -> None:
    manifest = llama()
    tiers = {p.name: Tier.HOST if p.layer is not None else Tier.DEVICE for p in manifest.parameters}
    ring = Ring(4, 3 * 2**20)
    assert predict_step(describe_sweep(manifest, tiers, "cpu", ring), RATES, 1).io_seconds == 0
    step = predict_step(describe_sweep(manifest, tiers, "cuda", ring), GPU_RATES, 1)
    moved = sum(p.nbytes for p in manifest.parameters if p.layer is not None)
    assert step.io_seconds == pytest.approx(moved / 24e9)
