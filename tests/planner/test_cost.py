"""C1, A2: predicted seconds per step, and what reading and computing take from each other."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raytier.checkpoint.manifest import KVLayerSpec, ModelManifest
from raytier.hardware.rates import Overlap, Rates
from raytier.planner.cost import (
    CALL_SECONDS,
    CALL_SEQUENCE_SECONDS,
    StepLoad,
    Sweep,
    contend,
    describe_sweep,
    predict,
    predict_first_token,
    predict_step,
    sweep_of,
    sweep_seconds,
)
from raytier.planner.placement import plan_weights
from raytier.planner.plan import Prediction, Tier
from raytier.planner.sizing import ALIGNMENT_SLACK, Ring, token_bytes
from tests.planner.models import CPU_NODE, FULL_RATES, GPU_RATES, RATES, configuration, llama

RING = Ring(4, 3 * 2**20, 500)


def resident(manifest: ModelManifest, *, packed: bool = False) -> Sweep:
    tiers = {p.name: Tier.DEVICE for p in manifest.parameters}
    return describe_sweep(manifest, tiers, "cpu", Ring(), packed=packed)


def streamed(manifest: ModelManifest, tier: Tier = Tier.NVME) -> Sweep:
    """Every matrix on `tier`."""
    tiers = {p.name: tier if len(p.shape) > 1 else Tier.DEVICE for p in manifest.parameters}
    return describe_sweep(manifest, tiers, "cpu", RING)


def calls(step: Prediction) -> float:
    """What the engine and the call of the device cost in a prediction."""
    return CALL_SECONDS + step.batch * CALL_SEQUENCE_SECONDS


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
    body = manifest.nbytes - manifest.by_name[manifest.embedding].nbytes
    for batch in (1, 8):
        step = predict_step(resident(manifest), RATES, batch, 100)
        assert step.io_seconds == step.attention_seconds == 0
        assert step.compute_seconds == pytest.approx(body / RATES.matrix_rate(batch), rel=1e-3)
        assert step.overhead_seconds == pytest.approx(calls(step))
        assert step.seconds == pytest.approx(step.compute_seconds + step.overhead_seconds)
        assert step.tokens_per_second == pytest.approx(batch / step.seconds)


def test_packed_rates_count_for_resident_matrices_that_are_packed_only() -> None:
    manifest = llama()
    plain, packed = (resident(manifest, packed=p) for p in (False, True))
    ratio = (
        predict_step(packed, FULL_RATES, 1, 1).compute_seconds / predict_step(plain, FULL_RATES, 1, 1).compute_seconds
    )
    assert ratio == pytest.approx(8 / 12, rel=1e-3)  # norms are not packed
    difference = (
        predict_step(plain, FULL_RATES, 1, 1).overhead_seconds - predict_step(packed, FULL_RATES, 1, 1).overhead_seconds
    )
    assert difference == pytest.approx((8 * 7 + 1) * 4e-5)
    tied = llama(tied=True)
    head = resident(tied, packed=True).units[-1]
    assert (head.packed_bytes, head.plain_bytes) == (0, tied.by_name[tied.head].nbytes)
    tiers = {p.name: Tier.HOST for p in manifest.parameters}
    assert all(u.packed_bytes == 0 for u in describe_sweep(manifest, tiers, "cpu", Ring(), packed=True).units)


def test_attention_reads_the_context_up_to_the_window() -> None:
    manifest = llama(layers=2)
    token = manifest.kv_token_bytes
    step = predict_step(resident(manifest), FULL_RATES, 8, 500)
    assert step.attention_seconds == pytest.approx(8 * 500 * token / 5e9)
    windowed = replace(manifest, kv_layers=(KVLayerSpec(4, 32, 32, 100), manifest.kv_layers[1]))
    step = predict_step(resident(windowed), FULL_RATES, 8, 500)
    assert step.attention_seconds == pytest.approx(8 * (100 + 500) * token / 2 / 5e9)


def test_calls_of_layers_steps_sequences_and_logits_add_up() -> None:
    manifest = llama(layers=4)
    for batch in (1, 8):
        step = predict_step(resident(manifest), FULL_RATES, batch, 1)
        layers = 4 * (FULL_RATES.layer_seconds + (batch - 1) * FULL_RATES.layer_sequence_seconds)
        layers += (4 * 7 + 1) * FULL_RATES.matrix_seconds
        around = FULL_RATES.step_seconds + batch * FULL_RATES.step_sequence_seconds
        logits = batch * manifest.vocab_size / 1e9
        assert step.overhead_seconds == pytest.approx(calls(step) + layers + around + logits)
        parts = step.compute_seconds + step.attention_seconds + step.overhead_seconds
        assert step.seconds == pytest.approx(parts)


def test_everything_on_disk_costs_the_disk() -> None:
    manifest = llama()
    sweep = streamed(manifest)
    matrices = sum(p.nbytes for p in manifest.parameters if len(p.shape) > 1)
    embedding = manifest.by_name[manifest.embedding]
    assert sweep.streamed_bytes == matrices - embedding.nbytes
    row = embedding.nbytes // manifest.vocab_size + ALIGNMENT_SLACK
    step = predict_step(sweep, RATES, 8, 1)
    assert step.io_seconds == pytest.approx((sweep.streamed_bytes + 8 * row) / 1e9)
    assert step.seconds == pytest.approx(step.io_seconds, rel=0.01)


def test_the_ramdisk_is_read_at_its_own_rate() -> None:
    manifest = llama()
    sweep, disk = streamed(manifest, Tier.RAMDISK), streamed(manifest)
    assert sweep.streamed_bytes == disk.streamed_bytes
    fast = replace(RATES, ramdisk_read_bytes_per_s=4e9)
    seconds = predict_step(sweep, fast, 1, 1).io_seconds
    assert seconds == pytest.approx(predict_step(disk, fast, 1, 1).io_seconds / 4)
    # Never taken to be faster than the disk when nobody has measured it.
    assert predict_step(sweep, RATES, 1, 1).io_seconds == pytest.approx(4 * seconds)


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
    assert predict_step(describe_sweep(manifest, tiers, "cpu", ring), RATES, 1, 1).io_seconds == 0
    step = predict_step(describe_sweep(manifest, tiers, "cuda", ring), GPU_RATES, 1, 1)
    moved = sum(p.nbytes for p in manifest.parameters if p.layer is not None)
    assert step.io_seconds == pytest.approx(moved / 24e9)


def test_a_gpu_computes_while_calls_are_made() -> None:
    manifest = llama(layers=4)
    tiers = {p.name: Tier.DEVICE for p in manifest.parameters}
    slow_calls = replace(GPU_RATES, layer_seconds=1e-3)
    step = predict_step(describe_sweep(manifest, tiers, "cuda", Ring()), slow_calls, 1, 1)
    assert step.seconds == pytest.approx(4 * 1e-3 + calls(step), rel=0.01)


# --- reading beside computing ----------------------------------------------------------------------------------------


def fluid(io: float, work: float, overlap: Overlap) -> float:
    """Both go on in small time slices, slowed while the other one goes on too."""
    slice_, clock = (io + work) / 20_000, 0.0
    while io > 0 or work > 0:
        both = io > 0 and work > 0
        io -= slice_ * (overlap.reading if both else 1)
        work -= slice_ * (overlap.computing if both else 1)
        clock += slice_
    return clock


@pytest.mark.parametrize("overlap", [Overlap(), Overlap(0.9, 0.8), Overlap(0.5, 0.5), Overlap(0.6, 0.1)])
@pytest.mark.parametrize(("io", "work"), [(4.0, 1.0), (1.0, 1.0), (1.0, 4.0), (0.0, 1.0), (1.0, 0.0)])
def test_contention_is_that_of_two_activities_side_by_side(overlap: Overlap, io: float, work: float) -> None:
    slowed_io, slowed_work = contend([io / 2] * 2, [work / 4] * 4, overlap)
    assert max(sum(slowed_io), sum(slowed_work)) == pytest.approx(fluid(io, work, overlap), rel=1e-3)
    assert sum(slowed_io) >= io
    assert sum(slowed_work) >= work


def test_contention_lengthens_a_streamed_step_and_leaves_a_resident_one_alone() -> None:
    manifest = llama()
    crowded = replace(RATES, overlap=Overlap(0.8, 0.7))
    assert predict_step(streamed(manifest), crowded, 32, 1).seconds > 1.01 * (
        predict_step(streamed(manifest), RATES, 32, 1).seconds
    )
    assert predict_step(resident(manifest), crowded, 32, 1) == predict_step(resident(manifest), RATES, 32, 1)


# --- prompts ---------------------------------------------------------------------------------------------------------


def test_a_prompt_that_takes_several_steps_costs_several_sweeps() -> None:
    sweep = streamed(llama())
    whole = predict_first_token(sweep, RATES, 128)
    assert whole == pytest.approx(predict(sweep, RATES, StepLoad(0, 0, 128)).seconds)
    assert predict_first_token(sweep, RATES, 128, 32) == pytest.approx(4 * whole, rel=0.05)
    assert predict_first_token(sweep, RATES, 128, 512) == whole
    assert predict_first_token(resident(llama()), RATES) > predict_step(resident(llama()), RATES, 8, 1).seconds


def test_a_finished_plan_is_predicted_as_it_was_when_it_was_made() -> None:
    manifest = llama()
    for device_mb in (7, 12, None):
        plan = plan_weights(manifest, CPU_NODE, FULL_RATES, configuration(device_mb=device_mb))
        sweep = sweep_of(manifest, plan)
        assert (
            tuple(predict_step(sweep, FULL_RATES, p.batch, plan.context) for p in plan.predictions) == plan.predictions
        )
        assert sweep.streamed_bytes == plan.streamed_bytes


def test_tokens_of_a_prompt_attend_to_all_before_them_and_pass_through_every_layer() -> None:
    manifest = llama(layers=4)
    sweep = resident(manifest)
    rates = replace(RATES, prompt_flops=1e9, prompt_bytes_per_s=None)

    def attention(prompt: int, start: int, by: Rates = rates, of: Sweep = sweep) -> float:
        return predict(of, by, StepLoad(0, 0, prompt, start)).attention_seconds

    assert attention(100, 0) == pytest.approx(4 * 4 * 100 * 50 * 256 / 1e9)
    assert attention(100, 900) == pytest.approx(4 * 4 * 100 * 950 * 256 / 1e9)
    # In pieces or at once, a prompt has as many pairs of tokens.
    assert sum(attention(100, start) for start in range(0, 1000, 100)) == pytest.approx(attention(1000, 0))
    windowed = replace(manifest, kv_layers=(KVLayerSpec(4, 32, 32, 100),) * 4)
    assert attention(100, 900, of=resident(windowed)) == pytest.approx(4 * 4 * 100 * 100 * 256 / 1e9)
    passing = replace(RATES, prompt_bytes_per_s=1e9)
    assert attention(100, 900, passing) == pytest.approx(4 * 100 * token_bytes(manifest) / 1e9)
    assert predict(sweep, passing, StepLoad(8, 100)).attention_seconds == 0  # decodes alone
