"""Forms of parameters (B1, B4): layouts, exactness of the plain ones, error bounds of the quantised ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytier.codecs import forms
from raytier.codecs.forms import FORMS, INT4_GROUPS, Form, form_of, to_float
from raytier.codecs.native import compiler
from raytier.errors import ConfigurationError

QUANTISED = [name for name, form in FORMS.items() if form.dtype is None and not form.coded]


def _weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns), np.float32) * np.float32(0.02)


def _relative_error(name: str, weights: np.ndarray) -> float:
    form = FORMS[name]
    data = form.encode(weights.reshape(-1).view(np.uint8), "float32", weights.shape)
    assert data.nbytes == form.nbytes(weights.shape)
    return float(np.linalg.norm(form.decode(data, weights.shape) - weights) / np.linalg.norm(weights))


@given(st.lists(st.integers(0, 2**16 - 1), max_size=100), st.sampled_from(["bfloat16", "float16"]))
def test_plain_forms_keep_every_bit(bits: list[int], dtype: str) -> None:
    source = np.array(bits, np.uint16).view(np.uint8)
    same = "bf16" if dtype == "bfloat16" else "fp16"
    assert FORMS[same].encode(source, dtype, (len(bits),)).tobytes() == source.tobytes()
    wide = FORMS["fp32"].encode(source, dtype, (len(bits),))
    back = FORMS[same].encode(wide, "float32", (len(bits),))
    expected, found = to_float(source, dtype), to_float(back, dtype)
    assert np.array_equal(expected, found, equal_nan=True)
    finite = ~np.isnan(expected)
    assert np.array_equal(source.view(np.uint16)[finite], back.view(np.uint16)[finite])  # signs of zeros, too


@pytest.mark.parametrize(
    ("dtype", "exact"),
    [
        ("bfloat16", {"bf16", "bf16-coded", "fp32"}),
        ("float16", {"fp16", "fp32", "bf16-coded"}),
        ("float32", {"fp32", "bf16-coded"}),
    ],
)
def test_what_rounds(dtype: str, exact: set[str]) -> None:
    """Only bf16 weights are ever coded."""
    assert {name for name, form in FORMS.items() if not form.rounds(dtype)} == exact


@pytest.mark.parametrize(
    ("name", "bound"),
    [("int8", 0.01), ("int8-dynamic", 0.01), ("int4-32", 0.085), ("int4-64", 0.095), ("int4-128", 0.105)],
)
def test_errors_of_quantised_forms_are_bounded(name: str, bound: float) -> None:
    assert _relative_error(name, _weights(64, 512)) < bound


@pytest.mark.parametrize("group", INT4_GROUPS)
def test_int4_is_better_than_rounding_to_nearest(group: int) -> None:
    weights = _weights(32, 512)
    groups = weights.reshape(-1, group)
    low, high = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    step = (high - low) / 15
    nearest = np.rint((groups - low) / step) * step + low
    rounding = float(np.linalg.norm(nearest - groups) / np.linalg.norm(groups))
    assert _relative_error(f"int4-{group}", weights) < 0.95 * rounding


@pytest.mark.parametrize("group", INT4_GROUPS)
def test_the_kernel_fits_as_numpy_does(group: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    if compiler() is None:
        pytest.skip("no C compiler")
    groups = np.concatenate((_weights(8, 1024).reshape(-1, group), np.zeros((1, group), np.float32)))
    groups[3, 5] = 2.0
    forms.use_kernels(str(tmp_path_factory.getbasetemp() / "kernels"))
    errors = []
    for fit in (forms._fit_int4, forms._fit_int4_slowly):
        pairs, numbers = fit(groups)
        scale, least = to_float(pairs.reshape(-1), "bfloat16").reshape(-1, 2).T
        errors.append(np.linalg.norm(scale[:, None] * numbers + least[:, None] - groups, axis=1))
    assert np.allclose(errors[0], errors[1], rtol=0.02, atol=1e-7)


@pytest.mark.parametrize("name", QUANTISED)
def test_what_is_constant_or_zero_stays_so(name: str) -> None:
    weights = np.zeros((16, 128), np.float32)
    weights[1] = 0.5
    weights[2] = -3
    form = FORMS[name]
    data = form.encode(weights.reshape(-1).view(np.uint8), "float32", weights.shape)
    assert np.allclose(form.decode(data, weights.shape), weights, rtol=1e-6)


@pytest.mark.parametrize("name", QUANTISED)
def test_only_matrices_of_whole_blocks_are_quantised(name: str) -> None:
    form = FORMS[name]
    assert form.fits((16, 128))
    for shape in ((128,), (16, 100), (15, 128), (2, 16, 128)):
        assert not form.fits(shape)
        with pytest.raises(ValueError, match="no form"):
            form.encode(np.zeros(4, np.uint8), "float32", shape)


def test_an_unknown_precision_is_refused_with_those_that_exist() -> None:
    with pytest.raises(ConfigurationError, match=r"'int5'.*int4-64"):
        form_of("int5")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", [form for form in FORMS.values() if not form.coded], ids=lambda form: form.name)
def test_the_error_of_a_form_is_what_it_says(form: Form, dtype: str) -> None:
    drawn = (np.random.default_rng(1).standard_normal((256, 4096)) * 0.02).astype(np.float32)
    source = forms._from_float(drawn, dtype)
    weights = forms.to_float(source, dtype).reshape(drawn.shape)
    found = form.decode(form.encode(source, dtype, weights.shape), weights.shape)
    error = np.linalg.norm(found - weights) / np.linalg.norm(weights)
    assert error == pytest.approx(form.typical_error(dtype), rel=0.05, abs=1e-4)
