"""Weights with coded exponents come back bit by bit (B4), and are smaller where that is possible (T4)."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytier.codecs import coded
from raytier.codecs.coded import DoesNotShrinkError, decode, encode
from raytier.codecs.forms import FORMS


@pytest.fixture(autouse=True, scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    if not coded.use_kernels(str(tmp_path_factory.getbasetemp() / "kernels")):
        pytest.skip("no AVX512 VBMI2 here, or no C compiler")


def _bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def _normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return _bf16(np.random.default_rng(seed).standard_normal((rows, columns)) * 0.03)


@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (48, 2048), (32, 11008)])
def test_normal_weights_take_seven_tenths(rows: int, columns: int) -> None:
    weights = _normal(rows, columns)
    data = encode(weights.reshape(-1).view(np.uint8), rows, columns)
    assert np.array_equal(decode(data, 0, rows, columns).view(np.uint16).reshape(rows, columns), weights)
    part = decode(data, 3, 5, columns).view(np.uint16).reshape(5, columns)
    assert np.array_equal(part, weights[3:8])
    if columns >= 2048:
        assert data.size < 0.71 * weights.nbytes


@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.sampled_from([16, 32]),
    blocks=st.integers(1, 6),
    strange=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 2**16 - 1)), max_size=200),
)
def test_every_bit_comes_back(seed: int, rows: int, blocks: int, strange: list[tuple[int, int]]) -> None:
    """NaN with any payload, infinities, zeros of both signs, numbers below the normal ones: wherever they are."""
    weights = _normal(rows, 64 * blocks, seed)
    for place, bits in strange:
        weights.reshape(-1)[place % weights.size] = bits
    try:
        data = encode(weights.reshape(-1).view(np.uint8), rows, 64 * blocks)
    except DoesNotShrinkError:
        return  # what is refused is stored as it is
    assert data.size <= weights.nbytes
    assert np.array_equal(decode(data, 0, rows, 64 * blocks).view(np.uint16).reshape(weights.shape), weights)


def test_what_is_random_is_refused() -> None:
    noise = np.random.default_rng(0).integers(0, 256, 2 * 64 * 512, np.uint8)
    with pytest.raises(DoesNotShrinkError, match="64 x 512"):
        encode(noise, 64, 512)


def test_as_a_form() -> None:
    form, weights = FORMS["bf16-coded"], _normal(16, 4096)
    assert not form.rounds("bfloat16") and form.nbytes(weights.shape) is None
    data = form.encode(weights.reshape(-1).view(np.uint8), "bfloat16", weights.shape)
    wide = (weights.astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(form.decode(data, weights.shape), wide)
    assert np.array_equal(form.encode(wide.reshape(-1).view(np.uint8), "float32", weights.shape), data)
