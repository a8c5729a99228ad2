"""Kernels of our own compute what torch does, are compiled once, and where there are none torch computes (T10, T11)."""

from __future__ import annotations

import logging
import os
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import linear, silu
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from raytier.execution import cpu_kernels, linears, native
from raytier.execution.native import Features, load_kernels
from raytier.execution.threads import num_threads

BF16 = torch.bfloat16
#: Rows at every border: dot products, one, two and four tiles, and what torch computes.
ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65]


@pytest.fixture
def kernels(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> cpu_kernels._Library:
    """Kernels of this test's own."""
    cache = tmp_path_factory.getbasetemp() / "kernels"
    monkeypatch.setattr(cpu_kernels, "_library", None)
    if not cpu_kernels.use(str(cache)):
        pytest.skip("no AVX512_BF16 here, or no C compiler")
    assert cpu_kernels._library is not None
    return cpu_kernels._library


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
def test_same_result(kernels: cpu_kernels._Library, rows: int, outputs: int, inputs: int, threads: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    hidden, weight = (torch.randn(n, inputs, generator=generator).to(torch.bfloat16) for n in (rows, outputs))
    bias = torch.randn(outputs, generator=generator).to(torch.bfloat16)
    with num_threads(threads):
        for added in (None, bias):
            close_to_exact(linears.apply(hidden, weight, added), hidden, weight, added)


@pytest.mark.parametrize("rows", range(1, 9))
@torch.inference_mode()
def test_dot_products_alone(kernels: cpu_kernels._Library, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor without tiles."""
    monkeypatch.setattr(kernels, "tiles", False)
    hidden, weight = (torch.randn(n, 96).to(torch.bfloat16) for n in (rows, 80))
    bias = torch.randn(80).to(torch.bfloat16)
    close_to_exact(linears.apply(hidden, weight, bias), hidden, weight, bias)


@torch.inference_mode()
def test_what_the_kernels_are_not_made_for_is_torchs(
    kernels: cpu_kernels._Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "functions", {})  # would fail
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
def test_inputs_need_not_be_contiguous_nor_weights_aligned(kernels: cpu_kernels._Library) -> None:
    memory = torch.randn(64 * 96 + 7).to(torch.bfloat16)
    weight = memory[7:].view(64, 96)
    for hidden in (torch.randn(96, 6).t(), torch.randn(6, 192)[:, 96:], torch.randn(2, 3, 96), torch.randn(96)):
        hidden = hidden.to(torch.bfloat16)
        close_to_exact(linears.apply(hidden, weight), hidden, weight, None)


@torch.inference_mode()
def test_infinities_and_nans_come_through(kernels: cpu_kernels._Library) -> None:
    for rows in (1, 40):
        hidden, weight = torch.ones(rows, 32).to(torch.bfloat16), torch.ones(16, 32).to(torch.bfloat16)
        weight[3, 5], weight[4, 6] = torch.inf, torch.nan
        result = linears.apply(hidden, weight)
        assert bool((result[:, 3] == torch.inf).all()) and bool(result[:, 4].isnan().all())
        assert bool((result[:, 5:] == 32).all())


@torch.inference_mode()
def test_a_linear_layer_adopts_them_and_its_subclasses_do_not(kernels: cpu_kernels._Library) -> None:
    class Special(nn.Linear):
        pass

    plain, special = nn.Linear(32, 16, dtype=torch.bfloat16), Special(32, 16)
    for module in (plain, special, nn.ReLU()):
        linears.adopt(module)
    assert type(special) is Special
    hidden = torch.randn(3, 32).to(torch.bfloat16)
    close_to_exact(plain(hidden), hidden, plain.weight, plain.bias)


def test_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "avx512_bf16" not in native.cpu_flags():
        pytest.skip("no AVX512_BF16 here")
    loaded = load_kernels(str(tmp_path))
    assert loaded is not None
    (library,) = (tmp_path / "kernels").iterdir()
    assert loaded[1] & Features.DOT_BF16
    monkeypatch.setattr(subprocess, "run", None)  # would fail
    before = library.stat().st_mtime_ns
    assert load_kernels(str(tmp_path)) is not None and library.stat().st_mtime_ns == before


@pytest.mark.parametrize("compiler", ["", "/nowhere/cc", "false"])
def test_without_a_compiler_torch_computes_and_the_log_says_why(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.setattr(cpu_kernels, "_library", None)
    if compiler:
        monkeypatch.setenv("CC", compiler)
    else:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert not cpu_kernels.use(str(tmp_path))
    assert "no kernels of our own" in caplog.text
    assert not list(tmp_path.glob("kernels/*"))
    hidden, weight = torch.randn(2, 32).to(torch.bfloat16), torch.randn(16, 32).to(torch.bfloat16)
    assert torch.equal(linears.apply(hidden, weight), linear(hidden, weight))


def test_a_user_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_flags", lambda: frozenset({"avx512_bf16"}))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    assert "apt-get install gcc" in (native.why_none() or "")
    (tmp_path / "gcc").touch(mode=0o755)
    assert native.why_none() is None


def test_another_processor_needs_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "cpu_flags", frozenset)
    assert native.why_none() is None
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert load_kernels(str(tmp_path)) is None
    assert not list(tmp_path.iterdir())


def bf16(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(BF16)


def all_but_few_last_bits(result: torch.Tensor, expected: torch.Tensor, share: float = 0.005) -> None:
    """Equal, but where another order of summation or another exp falls on the other side of a rounding."""
    assert result.dtype is expected.dtype is BF16 and result.shape == expected.shape
    differ = result != expected
    assert float(differ.float().mean()) <= share
    assert bool(((result.double() - expected.double()).abs() <= 2**-7 * expected.double().abs()).all())


@pytest.mark.parametrize(("rows", "dim"), [(1, 2048), (3, 16), (5, 48), (33, 576)])
@pytest.mark.parametrize("threads", [1, 2])
@torch.inference_mode()
def test_rms_norm(kernels: cpu_kernels._Library, rows: int, dim: int, threads: int) -> None:
    module = LlamaRMSNorm(dim, eps=1e-5).to(BF16)
    module.weight = nn.Parameter(bf16(dim, seed=1))
    hidden = bf16(1, rows, dim, scale=3.0)
    with num_threads(threads):
        all_but_few_last_bits(cpu_kernels.rms_norm(hidden, module.weight, 1e-5), module(hidden), 0.02)


@torch.inference_mode()
def test_silu_mul(kernels: cpu_kernels._Library) -> None:
    gate, up = bf16(3, 5632, scale=6.0), bf16(3, 5632, seed=1)
    gate[0, :8] = torch.tensor([0.0, -0.0, 88.0, -88.0, -200.0, 3e38, torch.inf, torch.nan])
    up[0, :8] = 1.0
    result = cpu_kernels.silu_mul(gate, up)
    expected = silu(gate) * up
    assert bool(result[0, 7].isnan())
    all_but_few_last_bits(result.nan_to_num(7.0), expected.nan_to_num(7.0), 0.02)


@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "dim"), [(1, 4, 2, 32), (7, 8, 1, 64), (40, 3, 3, 96)])
@torch.inference_mode()
def test_rotation_is_that_of_transformers_to_the_bit(
    kernels: cpu_kernels._Library, tokens: int, heads: int, kv_heads: int, dim: int
) -> None:
    angles = torch.rand(1, tokens, dim // 2, generator=torch.Generator().manual_seed(3)) * 7
    cos, sin = (torch.cat((part, part), dim=-1).to(BF16) for part in (angles.cos(), angles.sin()))
    query = bf16(1, tokens, heads * dim).view(1, tokens, heads, dim).transpose(1, 2)
    key = bf16(1, tokens, kv_heads * dim, seed=1).view(1, tokens, kv_heads, dim).transpose(1, 2)
    assert cpu_kernels.fits_rotate(query, key, cos, sin)
    for result, expected in zip(
        cpu_kernels.rotate(query, key, cos, sin), apply_rotary_pos_emb(query, key, cos, sin), strict=True
    ):
        assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim"), [(4, 4, 32), (8, 4, 64), (12, 1, 128), (15, 3, 96), (32, 1, 256)]
)
@pytest.mark.parametrize("sinks", [False, True])
@torch.inference_mode()
def test_single_tokens_attend(kernels: cpu_kernels._Library, heads: int, kv_heads: int, dim: int, sinks: bool) -> None:
    """Against the definition in fp64, over one run, scattered runs, a single key and more keys than one chunk."""
    seen = [[(5, 1)], [(16, 40)], [(64, 16), (200, 16), (96, 3)], [(300, 255)], [(600, 256), (1000, 1)], [(1100, 700)]]
    slots = torch.tensor([5, 55, 98, 554, 1000, 1799, 7])
    rows = [1, 0, 3, 2, 6, 5]  # row 4 belongs to a longer span: written, not attended
    keys, values = bf16(kv_heads, 2000, dim, seed=1), bf16(kv_heads, 2000, dim, seed=2)
    query, key, value = bf16(7, heads, dim), bf16(1, kv_heads, 7, dim, seed=3), bf16(1, kv_heads, 7, dim, seed=4)
    ordered = slots.clone()
    for row, slot in zip([*rows, 4], slots, strict=True):
        ordered[row] = slot
    extra = bf16(heads, seed=5) if sinks else None
    result = cpu_kernels.attend(
        query, key, value, ordered, (keys, values), cpu_kernels.Spans.of(list(zip(rows, seen, strict=True))), 0.2, extra
    )
    assert torch.equal(keys[:, ordered], key[0]) and torch.equal(values[:, ordered], value[0])
    group = heads // kv_heads
    for row, runs in zip(rows, seen, strict=True):
        index = torch.cat([torch.arange(first, first + count) for first, count in runs])
        mine = query[row].double().view(kv_heads, group, dim)
        scores = torch.einsum("hgd,hld->hgl", mine, keys[:, index].double()) * 0.2
        if extra is not None:
            scores = torch.cat([scores, extra.double().view(kv_heads, group, 1)], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : len(index)]
        exact = torch.einsum("hgl,hld->hgd", weights, values[:, index].double())
        slack = 2**-8 * exact.abs() + 2**-16 * torch.einsum("hgl,hld->hgd", weights, values[:, index].double().abs())
        assert bool(((result[row].double().view_as(exact) - exact).abs() <= slack).all())


@torch.inference_mode()
def test_large_scores_do_not_overflow(kernels: cpu_kernels._Library) -> None:
    keys, values = torch.full((1, 64, 32), 100.0, dtype=BF16), torch.ones(1, 64, 32, dtype=BF16)
    keys[:, ::2] *= -1
    query = torch.full((1, 2, 32), 100.0, dtype=BF16)
    spans, new = cpu_kernels.Spans.of([(0, [(0, 64)])]), torch.ones(1, 1, 1, 32, dtype=BF16)
    result = cpu_kernels.attend(query, new, new, torch.tensor([0]), (keys, values), spans, 1.0, None)
    assert torch.equal(result, torch.ones_like(result))
