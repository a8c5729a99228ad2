"""C1, G1: the tokens of a step follow from the sweep's reading and the prefill rate."""

from __future__ import annotations

from dataclasses import replace

import pytest

from raytier.errors import BudgetError
from raytier.hardware.rates import Rates
from raytier.planner.cost import StepLoad, Sweep, describe_sweep, predict
from raytier.planner.placement import ACTIVATION_SHARE, plan_weights
from raytier.planner.plan import Tier
from raytier.planner.sizing import Ring
from raytier.planner.step_tokens import LEAST_TOKENS, MOST_TOKENS, TARGET_SECONDS, step_tokens
from tests.planner.models import CPU_NODE, FULL_RATES, RATES, configuration, llama

#: 1.1 B parameters, 2.2 GB.
MODEL = llama(layers=22, hidden=2048, intermediate=5632, vocab=32000, heads=32, kv_heads=4, context=4096)


def sweep(tier: Tier) -> Sweep:
    tiers = {p.name: tier if len(p.shape) > 1 else Tier.DEVICE for p in MODEL.parameters}
    return describe_sweep(MODEL, tiers, "cpu", Ring(3, 100 * 2**20, 8000) if tier is Tier.NVME else Ring())


def chosen(tier: Tier, rates: Rates, *, sequences: int = 8, context: int = 512, max_num_seqs: int = 32) -> int:
    return step_tokens(sweep(tier), rates, sequences=sequences, context=context, max_num_seqs=max_num_seqs)


def seconds(tier: Tier, rates: Rates, prompt: int, sequences: int = 8) -> float:
    """Of a step of `sequences` streams that reads the last `prompt` of 512 tokens."""
    return predict(sweep(tier), rates, StepLoad(sequences, 512, prompt, max(0, 512 - prompt))).seconds


def test_a_resident_model_stays_near_the_target() -> None:
    fast = replace(FULL_RATES, matrix_bytes_per_s=((1, 40e9), (64, 30e9), (512, 6e9)), packed_matrix_bytes_per_s=None)
    tokens = chosen(Tier.DEVICE, fast)
    assert 100 < tokens < 600
    assert seconds(Tier.DEVICE, fast, tokens - 8) == pytest.approx(TARGET_SECONDS, rel=0.02)


def test_a_large_resident_model_doubles_its_own_step_at_most() -> None:
    slow = replace(RATES, matrix_bytes_per_s=((1, 4e9), (64, 3e9), (512, 0.6e9)))
    decode = seconds(Tier.DEVICE, slow, 0)
    assert decode > TARGET_SECONDS
    assert seconds(Tier.DEVICE, slow, chosen(Tier.DEVICE, slow) - 8) == pytest.approx(2 * decode, rel=0.05)


def test_a_streamed_model_hides_as_much_as_it_can_behind_its_reading() -> None:
    tokens = chosen(Tier.NVME, RATES)
    decode = seconds(Tier.NVME, RATES, 0)
    assert decode == pytest.approx(sweep(Tier.NVME).streamed_bytes / 1e9, rel=0.02)
    assert seconds(Tier.NVME, RATES, tokens - 8) <= 1.06 * decode
    assert seconds(Tier.NVME, RATES, tokens) > 1.03 * decode
    slower = replace(RATES, disk_read_bytes_per_s=0.25e9)
    assert chosen(Tier.NVME, slower) > 2 * tokens


def test_bounds() -> None:
    instant = replace(RATES, matrix_bytes_per_s=((1, 1e15),))
    assert chosen(Tier.DEVICE, instant) == MOST_TOKENS
    crawling = replace(RATES, matrix_bytes_per_s=((1, 1e9), (2, 0.1e9)))
    assert chosen(Tier.DEVICE, crawling, sequences=2, max_num_seqs=2) == LEAST_TOKENS + 2
    assert chosen(Tier.DEVICE, crawling, max_num_seqs=300) == 300  # every sequence goes on in every step


def test_the_plan_uses_it_and_sets_aside_memory_for_as_many() -> None:
    config = configuration(scheduler={"max_num_seqs": 8}, kv={"expected_sequences": 8, "expected_context": 512})
    plan = plan_weights(MODEL, CPU_NODE, FULL_RATES, config)
    (device,) = plan.devices
    packed = describe_sweep(MODEL, plan.tier_of, "cpu", Ring(), packed=True)
    expected = step_tokens(packed, FULL_RATES, sequences=8, context=512, max_num_seqs=8)
    assert device.max_mixed_tokens == expected <= device.max_num_batched_tokens
    assert any(f"and {expected} where running streams wait" in note for note in plan.notes)
    asked = plan_weights(MODEL, CPU_NODE, FULL_RATES, configuration(scheduler={"max_num_batched_tokens": 777}))
    assert asked.devices[0].max_num_batched_tokens == asked.devices[0].max_mixed_tokens == 777


def test_activations_of_a_small_device_bound_it() -> None:
    manifest = llama()
    instant = replace(RATES, matrix_bytes_per_s=((1, 1e15),))
    config = configuration(device_mb=40, scheduler={"max_num_seqs": 4})
    (device,) = plan_weights(manifest, CPU_NODE, instant, config).devices
    assert device.activation_bytes <= ACTIVATION_SHARE * 40 * 2**20
    assert 16 < device.max_num_batched_tokens < MOST_TOKENS
    (large,) = plan_weights(manifest, CPU_NODE, instant, configuration(scheduler={"max_num_seqs": 4})).devices
    assert large.max_num_batched_tokens == MOST_TOKENS


def test_a_model_is_refused_only_when_the_fewest_tokens_do_not_fit() -> None:
    manifest = llama(hidden=512, intermediate=8192, layers=2, vocab=64)
    fewest = {"max_num_seqs": 1, "max_num_batched_tokens": 16}

    def refused(scheduler: dict[str, object], device_mb: float) -> bool:
        try:
            plan_weights(manifest, CPU_NODE, RATES, configuration(device_mb=device_mb, scheduler=scheduler))
        except BudgetError:
            return True
        return False

    low, high = 1.0, 200.0
    while high - low > 0.1:
        middle = (low + high) / 2
        low, high = (middle, high) if refused(fewest, middle) else (low, middle)
    assert 1.5 < low < high < 190
    assert refused({"max_num_seqs": 1}, low)
    assert not refused({"max_num_seqs": 1}, high)
    assert refused({"max_num_seqs": 1, "max_num_batched_tokens": 512}, high)
