"""G3, first version: greedy, temperature, top-k, top-p; draws depend on nothing but (seed, sample, position)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from raytier.engine.step import SampleSpec
from raytier.execution.sampler import sample, uniform

SPEC = SampleSpec(temperature=1.0, top_p=1.0, top_k=0, seed=7, sample=0, position=0)


def draws(logits: torch.Tensor, spec: SampleSpec, count: int) -> list[int]:
    return [sample(logits[None], [replace(spec, position=i)])[0] for i in range(count)]


def test_greedy_is_argmax() -> None:
    logits = torch.randn(5, 100)
    assert sample(logits, [replace(SPEC, temperature=0)] * 5) == logits.argmax(-1).tolist()


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(6, 50)
    specs = [replace(SPEC, seed=i, position=3 * i, temperature=0.8, top_p=0.9, top_k=20) for i in range(6)]
    together = sample(logits, specs)
    assert together == [sample(logits[i : i + 1], specs[i : i + 1])[0] for i in range(6)]


def test_uniform_is_counter_based() -> None:
    base = uniform(SPEC)
    assert 0 <= base < 1 and base == uniform(SPEC)
    others = [replace(SPEC, seed=8), replace(SPEC, sample=1), replace(SPEC, position=1), replace(SPEC, seed=2**63 - 1)]
    assert len({base, *map(uniform, others)}) == 5
    numbers = torch.tensor([uniform(replace(SPEC, position=i)) for i in range(4000)])
    assert abs(float(numbers.mean()) - 0.5) < 0.02 and abs(float(numbers.var()) - 1 / 12) < 0.005


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    counts = torch.bincount(torch.tensor(draws(logits, SPEC, 3000)), minlength=4) / 3000
    torch.testing.assert_close(counts, torch.tensor([0.5, 0.3, 0.15, 0.05]), atol=0.03, rtol=0)


def test_temperature_sharpens() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2]))
    probabilities = torch.tensor([0.5, 0.3, 0.2]) ** 2
    counts = torch.bincount(torch.tensor(draws(logits, replace(SPEC, temperature=0.5), 3000)), minlength=3) / 3000
    torch.testing.assert_close(counts, probabilities / probabilities.sum(), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("top_p", "top_k", "allowed"),
    [
        (0.5, 0, {1}),
        (0.51, 0, {1, 3}),
        (0.85, 0, {1, 3, 0}),
        (1.0, 2, {1, 3}),
        (1.0, 1, {1}),
        (1e-9, 0, {1}),
        (0.7, 3, {1, 3}),
    ],
)
def test_truncation(top_p: float, top_k: int, allowed: set[int]) -> None:
    """Probabilities 0.15, 0.5, 0.05, 0.3: the set is the smallest that reaches top_p within the top_k."""
    logits = torch.log(torch.tensor([0.15, 0.5, 0.05, 0.3], dtype=torch.float64))
    assert set(draws(logits, replace(SPEC, top_p=top_p, top_k=top_k), 400)) == allowed
