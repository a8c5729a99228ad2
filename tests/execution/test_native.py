"""Kernels of our own compute what torch does, are compiled once, and where there are none torch computes (T10)."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from raytier.execution import linears, native
from raytier.execution.native import Features, load_kernels
from raytier.execution.threads import num_threads

#: Rows at every border: dot products, one, two and four tiles, and what torch computes.
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65]


@pytest.fixture
def kernels(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> linears._Kernels:
    """Kernels of this test's own."""
    cache = tmp_path_factory.getbasetemp() / "kernels"
    monkeypatch.setattr(linears, "_kernels", linears._Kernels())
    if not linears.use_kernels(str(cache)):
        pytest.skip("no AVX512_BF16 here, or no C compiler")
    return linears._kernels


def close_to_exact(result: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    exact = linear(hidden.double(), weight.double(), None if bias is None else bias.double())
    # Products and sums in fp32, in any order, and one rounding.
    magnitude = linear(hidden.double().abs(), weight.double().abs())
    slack = 2**-8 * exact.abs() + 2**-20 * magnitude
    assert result.shape == exact.shape and result.dtype is torch.bfloat16
    assert bool(((result.double() - exact).abs() <= slack).all())


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (48, 64), (80, 96), (112, 4096), (1008, 160)])
@pytest.mark.parametrize("threads", [1, 2])
@torch.inference_mode()
def test_same_result(kernels: linears._Kernels, rows: int, outputs: int, inputs: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    hidden, weight = (torch.randn(n, inputs, generator=generator).to(torch.bfloat16) for n in (rows, outputs))
    bias = torch.randn(outputs, generator=generator).to(torch.bfloat16)
    with num_threads(threads):
        for added in (None, bias):
            close_to_exact(linears.apply(hidden, weight, added), hidden, weight, added)


@pytest.mark.parametrize("rows", range(1, 9))
@torch.inference_mode()
def test_dot_products_alone(kernels: linears._Kernels, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without tiles."""
    monkeypatch.setattr(kernels, "_tiles", False)
    hidden, weight = (torch.randn(n, 96).to(torch.bfloat16) for n in (rows, 80))
    bias = torch.randn(80).to(torch.bfloat16)
    close_to_exact(linears.apply(hidden, weight, bias), hidden, weight, bias)


@torch.inference_mode()
def test_what_the_kernels_are_not_made_for_is_torchs(
    kernels: linears._Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_call", None)  # would fail
    for rows, outputs, inputs, dtype in [
        (65, 16, 32, torch.bfloat16),
        (2, 17, 32, torch.bfloat16),
        (2, 16, 33, torch.bfloat16),
        (0, 16, 32, torch.bfloat16),
        (2, 16, 32, torch.float32),
        (2, 16, 32, torch.float16),
    ]:
        hidden, weight = torch.randn(rows, inputs).to(dtype), torch.randn(outputs, inputs).to(dtype)
        assert torch.equal(linears.apply(hidden, weight), linear(hidden, weight))
    hidden, weight = torch.randn(2, 32).to(torch.bfloat16), torch.randn(32, 16).to(torch.bfloat16).t()
    assert torch.equal(linears.apply(hidden, weight), linear(hidden, weight))


@torch.inference_mode()
def test_inputs_need_not_be_contiguous_nor_weights_aligned(kernels: linears._Kernels) -> None:
    memory = torch.randn(64 * 96 + 7).to(torch.bfloat16)
    weight = memory[7:].view(64, 96)
    for hidden in (torch.randn(96, 6).t(), torch.randn(6, 192)[:, 96:], torch.randn(2, 3, 96), torch.randn(96)):
        hidden = hidden.to(torch.bfloat16)
        close_to_exact(linears.apply(hidden, weight), hidden, weight, None)


@torch.inference_mode()
def test_infinities_and_nans_come_through(kernels: linears._Kernels) -> None:
    for rows in (1, 40):
        hidden, weight = torch.ones(rows, 32).to(torch.bfloat16), torch.ones(16, 32).to(torch.bfloat16)
        weight[3, 5], weight[4, 6] = torch.inf, torch.nan
        result = linears.apply(hidden, weight)
        assert bool((result[:, 3] == torch.inf).all()) and bool(result[:, 4].isnan().all())
        assert bool((result[:, 5:] == 32).all())


@torch.inference_mode()
def test_a_linear_layer_adopts_them_and_its_subclasses_do_not(kernels: linears._Kernels) -> None:
    class Special(nn.Linear):
        pass

    plain, special = nn.Linear(32, 16, dtype=torch.bfloat16), Special(32, 16)
    for module in (plain, special, nn.ReLU()):
        linears.adopt(module)
    assert type(special) is Special
    hidden = torch.randn(3, 32).to(torch.bfloat16)
    close_to_exact(plain(hidden), hidden, plain.weight, plain.bias)


def test_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx512_bf16" not in native._cpu_flags():
        pytest.skip("no AVX512_BF16 here")
    loaded = load_kernels(str(tmp_path))
    assert loaded is not None
    (library,) = (tmp_path / "kernels").iterdir()
    assert loaded[1] & Features.DOT_BF16
    monkeypatch.setattr(native.subprocess, "run", None)  # would fail
    before = library.stat().st_mtime_ns
    assert load_kernels(str(tmp_path)) is not None and library.stat().st_mtime_ns == before


@pytest.mark.parametrize("compiler", ["", "/nowhere/cc", "false"])
def test_without_a_compiler_torch_computes_and_the_log_says_why(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "_cpu_flags", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setattr(linears, "_kernels", linears._Kernels())
    if compiler:
        monkeypatch.setenv("CC", compiler)
    else:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert not linears.use_kernels(str(tmp_path))
    assert "no kernels of our own" in caplog.text
    assert not list(tmp_path.glob("kernels/*"))
    hidden, weight = torch.randn(2, 32).to(torch.bfloat16), torch.randn(16, 32).to(torch.bfloat16)
    assert torch.equal(linears.apply(hidden, weight), linear(hidden, weight))


def test_a_user_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_cpu_flags", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    assert "apt-get install gcc" in (native.why_none() or "")
    (tmp_path / "gcc").touch(mode=0o755)
    assert native.why_none() is None


def test_another_processor_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_cpu_flags", frozenset)
    assert native.why_none() is None
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert load_kernels(str(tmp_path)) is None
    assert not list(tmp_path.iterdir())
