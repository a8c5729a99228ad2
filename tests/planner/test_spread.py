"""C2: what leaves the device is spread evenly over the layers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raytier.planner.spread import choose, even_shares, spread

sizes = st.lists(st.integers(1, 1000), max_size=10)
layers = st.lists(st.tuples(sizes, st.integers(0, 2000)), min_size=1, max_size=12)


@given(sizes, st.integers(-5, 12_000))
def test_choose_reaches_what_is_wanted_without_superfluous_parameters(values: list[int], want: int) -> None:
    picked = choose(values, want)
    assert len(set(picked)) == len(picked)
    total = sum(values[i] for i in picked)
    assert total >= min(max(want, 0), sum(values))
    if total > max(want, 0):
        assert all(total - values[i] < want for i in picked)


@given(layers, st.integers(0, 60_000))
def test_shares_are_levelled(data: list[tuple[list[int], int]], target: int) -> None:
    free, fixed = [sum(s) for s, _ in data], [f for _, f in data]
    shares = even_shares(fixed, free, target)
    assert all(0 <= share <= most for share, most in zip(shares, free, strict=True))
    assert min(target, sum(free)) <= sum(shares) <= target + len(data)
    # Whoever gives something ends at the same level, unless it has given all.
    levels = {f + s for f, s, most in zip(fixed, shares, free, strict=True) if 0 < s < most}
    assert len(levels) <= 1


@given(layers, st.integers(0, 60_000))
def test_every_prefix_gives_its_shares_and_less_than_one_parameter_more(
    data: list[tuple[list[int], int]], target: int
) -> None:
    values, fixed = [s for s, _ in data], [f for _, f in data]
    chosen = spread(values, fixed, target)
    shares = even_shares(fixed, [sum(s) for s in values], target)
    largest = max((size for s in values for size in s), default=0)
    given_up = due = 0
    for layer, picked, share in zip(values, chosen, shares, strict=True):
        given_up += sum(layer[i] for i in picked)
        due += share
        assert due <= given_up < due + max(1, largest)


def test_identical_layers_alternate_between_two_patterns() -> None:
    chosen = spread([[4, 2, 1, 1]] * 8, [0] * 8, 8 * 3)
    streamed = [sum([4, 2, 1, 1][i] for i in picked) for picked in chosen]
    assert sum(streamed) == 24
    assert max(streamed) - min(streamed) <= 4
