"""G3: greedy, temperature, top-k, top-p; draws depend on nothing but (seed, sample, position)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from raytier.engine.step import SampleSpec
from raytier.execution.drawing import draw, uniform

SPEC = SampleSpec(temperature=1.0, top_p=1.0, top_k=0, seed=7, sample=0, position=0)


def draws(logits: torch.Tensor, spec: SampleSpec, count: int) -> list[int]:
    return [draw(logits[None], [replace(spec, position=i)])[0] for i in range(count)]


def test_greedy_is_argmax() -> None:
    logits = torch.randn(5, 100)
    assert draw(logits, [replace(SPEC, temperature=0)] * 5) == logits.argmax(-1).tolist()


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(6, 50)
    specs = [replace(SPEC, seed=i, position=3 * i, temperature=0.8, top_p=0.9, top_k=20) for i in range(6)]
    together = draw(logits, specs)
    assert together == [draw(logits[i : i + 1], specs[i : i + 1])[0] for i in range(6)]


def by_definition(logits: torch.Tensor, spec: SampleSpec) -> tuple[int, float]:
    """The draw from everything sorted, ties by the lower id; and how far it is from falling to a neighbour."""
    values = logits.double().numpy()
    order = np.lexsort((np.arange(len(values)), -values))
    weights = np.exp((values[order] - values.max()) / spec.temperature)
    near = np.abs(weights - spec.min_p).min() if spec.min_p > 0 else 1.0
    weights = weights[weights >= spec.min_p]
    if spec.top_k > 0:
        weights = weights[: spec.top_k]
    cumulative = np.cumsum(weights) / weights.sum()
    near = min(near, np.abs(cumulative - spec.top_p).min() if spec.top_p < 1 else 1.0)
    if spec.top_p < 1:
        cumulative = cumulative[: int(np.searchsorted(cumulative, spec.top_p)) + 1]
    point = uniform(spec) * cumulative[-1]
    near = min(near, np.abs(cumulative[:-1] - point).min() if len(cumulative) > 1 else 1.0)
    return int(order[min(int(np.searchsorted(cumulative, point, "right")), len(cumulative) - 1)]), float(near)


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 6.0])
@pytest.mark.parametrize("vocab", [5, 256, 257, 3000])
def test_draws_are_the_defined_ones(vocab: int, spread: float) -> None:
    """Peaked and flat distributions with many ties, drawn in one batch of every kind of request."""
    torch.manual_seed(vocab)
    kinds = [
        (0.7, 0.9, 0, 0.0),
        (1.0, 1.0, 0, 0.0),
        (1.5, 0.99, 0, 0.0),
        (0.8, 0.95, 50, 0.0),
        (1.0, 1.0, 700, 0.0),
        (1.0, 1.0, 1, 0.0),
        (2.0, 0.2, 0, 0.0),
        (1.0, 1.0, 0, 0.2),
        (1.3, 0.8, 0, 0.05),
        (0.9, 0.9, 40, 0.1),
        (1.0, 0.99, 0, 1e-4),
        (1.0, 1.0, 0, 1.0),
    ]
    specs = [
        replace(SPEC, temperature=t, top_p=p, top_k=k, min_p=m, position=i) for i in range(12) for t, p, k, m in kinds
    ]
    logits = (torch.randn(len(specs), vocab) * spread).bfloat16()
    drawn = draw(logits, specs)
    for row, spec, token in zip(logits, specs, drawn, strict=True):
        expected, near = by_definition(row, spec)
        # Masses are added up in another order: on the very border the neighbour is as right.
        assert token == expected or near < 1e-6
    assert drawn == [draw(logits[i : i + 1], specs[i : i + 1])[0] for i in range(len(specs))]


def test_equal_logits_go_by_the_lower_id() -> None:
    logits = torch.zeros(2, 1000)
    logits[1, 400:600] = 3
    greedy = [replace(SPEC, temperature=0)] * 2
    assert draw(logits, greedy) == [0, 400]
    limited = replace(SPEC, top_k=10)
    assert set(draws(logits[1], limited, 300)) == set(range(400, 410))


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_logits_that_cannot_be_compared_draw_something(top_p: float) -> None:
    logits = torch.randn(4, 2000)
    logits[0, 7] = torch.nan
    logits[1, 9] = torch.inf
    logits[2] = -torch.inf
    logits[3, 1:] = -torch.inf
    tokens = draw(logits, [replace(SPEC, top_p=top_p)] * 4)
    assert all(0 <= token < 2000 for token in tokens) and tokens[1] == 9 and tokens[3] == 0


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
