"""Linear layers compute on weights of every form what they would on the plain weight that it stands for (B2, G2)."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from raytier.codecs import coded
from raytier.codecs.forms import FORMS
from raytier.execution import cpu_kernels, cpu_matmul, linears
from raytier.execution.formed import FormedWeight
from raytier.execution.threads import num_threads

BF16 = torch.bfloat16
NAMES = [name for name, form in FORMS.items() if form.dtype is None and name != "int8-dynamic"]
ROWS = [1, 2, 3, 4, 5, 8, 9, 16, 17, 32, 33, 64, 65, 130]


@pytest.fixture
def kernels(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = str(tmp_path_factory.getbasetemp() / "kernels")
    monkeypatch.setattr(cpu_kernels, "_library", None)
    if not cpu_kernels.use(cache) or not cpu_kernels.library().forms or not coded.use_kernels(cache):
        pytest.skip("no AVX512 VBMI2 here, or no C compiler")


def formed(name: str, weight: torch.Tensor) -> FormedWeight:
    dtype = str(weight.dtype).removeprefix("torch.")
    data = FORMS[name].encode(weight.contiguous().view(torch.uint8).numpy().reshape(-1), dtype, weight.shape)
    return FormedWeight(FORMS[name], torch.from_numpy(data), tuple(weight.shape), weight.dtype)


def close(result: torch.Tensor, hidden: torch.Tensor, weight: FormedWeight, bias: torch.Tensor | None) -> None:
    """Up to one rounding of every weight and of the result."""
    plain = weight.rows(0, weight.shape[0]).double() if weight.form.coded else _exact(weight)
    expected = linear(hidden.double(), plain, None if bias is None else bias.double())
    magnitude = linear(hidden.double().abs(), plain.abs())
    eps = torch.finfo(hidden.dtype).eps
    assert result.dtype is hidden.dtype and result.shape == expected.shape
    assert bool(((result.double() - expected).abs() <= eps * (expected.abs() + magnitude)).all())


def _exact(weight: FormedWeight) -> torch.Tensor:
    return torch.from_numpy(weight.form.decode(weight.data.numpy(), weight.shape)).double()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("threads", [1, 2])
@torch.inference_mode()
def test_same_result_by_kernels(kernels: None, name: str, rows: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    for outputs, inputs in ((16, 128), (208, 640)):
        weight = (torch.randn(outputs, inputs, generator=generator) * 0.03).to(BF16)
        weight[2, 3], weight[outputs - 1, inputs - 1], weight[5] = 40.0, 1e-30, 0.0
        hidden = torch.randn(rows, inputs, generator=generator).to(BF16)
        bias = torch.randn(outputs, generator=generator).to(BF16)
        given = formed(name, weight)
        assert cpu_matmul.computes_on(given)
        with num_threads(threads):
            for added in (None, bias):
                close(linears.apply(hidden, given, added), hidden, given, added)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "bf16-coded"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16])
@torch.inference_mode()
def test_same_result_without_kernels(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "_library", None)
    weight = (torch.randn(48, 256, generator=torch.Generator().manual_seed(0)) * 0.03).to(dtype)
    hidden, bias = torch.randn(1, 7, 256).to(dtype), torch.randn(48).to(dtype)
    given = formed(name, weight)
    for part in (2 << 20, 1):  # in one part, and in as many as there can be
        monkeypatch.setattr(linears, "_PART_BYTES", part)
        close(linears.apply(hidden, given, bias), hidden, given, bias)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("inputs", [128, 640])
@torch.inference_mode()
def test_activations_in_8_bits(kernels: None, rows: int, inputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By kernels, by torch, and as the definition says: sums of products of integers, but for the last rounding."""
    generator = torch.Generator().manual_seed(rows)
    weight = (torch.randn(96, inputs, generator=generator) * 0.03).to(BF16)
    hidden = torch.randn(rows, inputs, generator=generator).to(BF16)
    bias = torch.randn(96, generator=generator).to(BF16)
    hidden[0] *= 100
    if rows > 2:
        hidden[2] = 0
    given = formed("int8-dynamic", weight)
    numbers, scales = given.integers()
    scale = hidden.float().abs().amax(1, keepdim=True) / 127
    quantised = (hidden.float() * torch.where(scale > 0, 1 / scale, 0)).round()
    assert int(quantised.abs().max()) == 127
    exact = (quantised.double() @ numbers.double().t()) * (scale * scales).double()
    for added in (None, bias):
        expected = exact if added is None else exact + added.double()
        for patch in ({}, {"_library": None}):
            with monkeypatch.context() as context:
                for name, value in patch.items():
                    context.setattr(cpu_kernels, name, value)
                result = linears.apply(hidden, given, added)
            assert bool(((result.double() - expected).abs() <= 2**-8 * expected.abs() + 1e-6 * exact.abs()).all())


@torch.inference_mode()
def test_coded_weights_give_what_plain_ones_give(kernels: None) -> None:
    """The same products in fp32, summed in the same order, where both are computed by dot products (B4)."""
    weight = (torch.randn(64, 512, generator=torch.Generator().manual_seed(1)) * 0.03).to(BF16)
    weight[3, 70], weight[4, 5] = 1e30, 1e-38
    given, hidden = formed("bf16-coded", weight), torch.randn(2, 512).to(BF16)
    assert torch.equal(given.rows(0, 64), weight) and torch.equal(cpu_matmul.decode(given, 0, 64), weight)
    difference = (linears.apply(hidden, given) - linears.apply(hidden, weight)).float().abs()
    assert bool((difference <= 2**-7 * linears.apply(hidden, weight).float().abs()).all())


@torch.inference_mode()
def test_infinities_and_nans_come_through(kernels: None) -> None:
    weight = torch.full((16, 128), 0.5, dtype=BF16)
    weight[1, 5], weight[2, 9] = float("inf"), float("nan")
    given = formed("bf16-coded", weight)
    for rows in (1, 8, 40, 100):
        result = linears.apply(torch.ones(rows, 128, dtype=BF16), given)
        assert bool((result[:, 1] == float("inf")).all()) and bool(result[:, 2].isnan().all())
        assert bool((result[:, 3:] == 64).all())


@torch.inference_mode()
def test_activations_far_apart_keep_their_small_parts(kernels: None) -> None:
    """A large activation costs those of its own 64 columns bits, and no others."""
    weight = (torch.randn(32, 256, generator=torch.Generator().manual_seed(2)) * 0.03).to(BF16)
    hidden = torch.randn(1, 256).to(BF16)
    hidden[0, 7] = 1000.0
    for name in ("int8", "int4-64"):
        given = formed(name, weight)
        close(linears.apply(hidden, given), hidden, given, None)


@torch.inference_mode()
def test_a_layer_computes_with_what_is_bound() -> None:
    module = nn.Linear(128, 32, bias=True, dtype=torch.float32).requires_grad_(False)
    linears.adopt(module)
    plain = module.weight
    hidden = torch.randn(3, 128)
    assert torch.equal(module(hidden), linear(hidden, plain, module.bias))
    module.formed = formed("int8", plain)
    close(module(hidden), hidden, module.formed, module.bias)
    assert module.bound is module.formed
    module.formed = None
    assert torch.equal(module(hidden), linear(hidden, plain, module.bias))
