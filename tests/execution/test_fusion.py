"""What transformers' modules compute is found by what they execute, and computed by kernels (T10, T11)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.phi.modeling_phi import PhiAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RMSNorm

from raytier.execution import cpu_kernels, fusion


@pytest.fixture(autouse=True)
def kernels(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kernels, "_library", None)
    if not cpu_kernels.use(str(tmp_path_factory.getbasetemp() / "kernels")):
        pytest.skip("no AVX512_BF16 here, or no C compiler")


def test_copies_are_found_by_what_they_execute() -> None:
    assert fusion._copies(Qwen3RMSNorm.forward, llama.LlamaRMSNorm.forward)
    assert fusion._copies(MistralMLP.forward, llama.LlamaMLP.forward)
    assert not fusion._copies(GemmaRMSNorm.forward, llama.LlamaRMSNorm.forward), "it adds one to its weight"
    assert fusion._rotates(llama.LlamaAttention.forward) and fusion._rotates(Qwen3Attention.forward)
    assert not fusion._rotates(llama.LlamaMLP.forward)

    class Documented:
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            """It says more about itself, and does the same."""
            input_dtype = hidden_states.dtype
            hidden_states = hidden_states.to(torch.float32)
            variance = hidden_states.pow(2).mean(-1, keepdim=True)
            hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
            return self.weight * hidden_states.to(input_dtype)

    assert fusion._copies(Documented.forward, llama.LlamaRMSNorm.forward)
    assert not fusion._copies(Documented, llama.LlamaRMSNorm.forward)


def test_a_partial_rotation_stays_its_own() -> None:
    """Phi turns a part of each head: the function is Llama's, its arguments are not what the kernel is made for."""
    assert fusion._rotates(PhiAttention.forward)
    query, angle = torch.ones(1, 2, 3, 32, dtype=torch.bfloat16), torch.ones(1, 3, 16, dtype=torch.bfloat16)
    assert not cpu_kernels.fits_rotate(query, query, angle, angle)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.inference_mode()
def test_modules_compute_what_they_did(dtype: torch.dtype) -> None:
    config = llama.LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    torch.manual_seed(0)
    plain = nn.ModuleDict({"norm": llama.LlamaRMSNorm(64), "mlp": llama.LlamaMLP(config)}).to(dtype)
    ours = copy.deepcopy(plain)
    fusion.adopt(ours)
    assert all("forward" in ours[name].__dict__ for name in ours)
    hidden = torch.randn(1, 5, 64).to(dtype)
    for name in plain:
        result, expected = ours[name](hidden), plain[name](hidden)
        slack = 0 if dtype is torch.float32 else 2**-6 * expected.abs() + 2**-8
        assert bool(((result - expected).abs() <= slack).all())
        assert not torch.equal(result, 0 * result)


def test_the_module_that_defines_a_rotation_stays_as_it_is() -> None:
    before = llama.apply_rotary_pos_emb
    config = llama.LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    module = llama.LlamaAttention(config, 0)
    fusion.adopt(module)
    assert llama.apply_rotary_pos_emb is before
    assert module.forward.__func__.__globals__["apply_rotary_pos_emb"] is fusion._rotate


def test_another_activation_is_left_alone() -> None:
    config = llama.LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, hidden_act="gelu")
    module = llama.LlamaMLP(config)
    fusion.adopt(module)
    assert "forward" not in module.__dict__


def test_without_kernels_linear_layers_alone_are_adopted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu_kernels, "_library", None)
    module = llama.LlamaRMSNorm(32)
    fusion.adopt(module)
    assert "forward" not in module.__dict__
