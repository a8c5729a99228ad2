"""What transformers' modules compute is found by what they execute, and computed by kernels (T10, T11)."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral.modeling_mistral import MistralMLP
from transformers.models.phi.modeling_phi import PhiAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RMSNorm

from raytier.checkpoint.architecture import ATTENTION_NAME, decoder_layers
from raytier.checkpoint.manifest import KVLayerSpec
from raytier.codecs import coded
from raytier.codecs.forms import FORMS
from raytier.engine.step import SequenceChunk
from raytier.execution import cpu_kernels, cpu_layer, fusion, linears
from raytier.execution.attention import ForwardContext, forward_context
from raytier.execution.formed import FormedWeight
from raytier.execution.kv_store import KVStore


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


ARCHITECTURES = {
    "llama": (LlamaConfig, {}),
    "mistral": (MistralConfig, {"sliding_window": 24, "head_dim": 32}),
    "qwen2": (Qwen2Config, {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {"head_dim": 32}),
}


class Lane:
    """A model with its own KV, in one dtype, with kernels or without."""

    def __init__(self, model: nn.Module, store: KVStore) -> None:
        self.model, self.store = model, store

    @torch.inference_mode()
    def step(self, chunks: list[SequenceChunk]) -> torch.Tensor:
        ids = [token for chunk in chunks for token in chunk.token_ids]
        positions = [p for chunk in chunks for p in range(chunk.start, chunk.start + len(chunk.token_ids))]
        with forward_context(ForwardContext.build(self.store, chunks, torch.device("cpu"))):
            output = self.model(input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions]), use_cache=False)
        logits: torch.Tensor = output.logits[0]
        return logits.double()


@pytest.fixture(params=ARCHITECTURES)
def lanes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Lane]:
    """The same model and the same KV three times: by kernels, by torch, and in fp32."""
    kind, settings = ARCHITECTURES[request.param]
    config = kind(
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        max_position_embeddings=512,
        **settings,
    )
    torch.manual_seed(1)
    exact = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in exact.named_parameters():
            spread = torch.randn_like(parameter)
            parameter.copy_(
                (1 + 0.1 * spread if parameter.dim() == 1 and "bias" not in name else 0.1 * spread).bfloat16()
            )
    spec = KVLayerSpec(2, 32, 32)
    lanes = {}
    for name, dtype in (("kernels", torch.bfloat16), ("torch", torch.bfloat16), ("exact", torch.float32)):
        model = copy.deepcopy(exact).to(dtype)
        model.set_attn_implementation(ATTENTION_NAME)
        store = KVStore([spec] * 2, 200, 8, dtype, torch.device("cpu"))
        generator = torch.Generator().manual_seed(2)
        for tensor in (*store.keys, *store.values):
            tensor.copy_(torch.randn(tensor.shape, generator=generator).bfloat16())
        lanes[name] = Lane(model, store)
    fusion.adopt(lanes["kernels"].model)
    return lanes


@pytest.mark.parametrize("sequences", [1, 3, 8, 17, 33, 64, 65])
def test_decoder_layers_at_once(
    lanes: dict[str, Lane], sequences: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Logits and written KV are as near to exact ones as torch's are, for steps of single tokens and for mixed ones."""
    calls = []
    compute = cpu_layer.layer
    monkeypatch.setattr(cpu_layer, "layer", lambda *a: calls.append(1) or compute(*a))
    # Block tables of three blocks, scattered over the pool.
    tables = [tuple(1 + (i * 3 + j) * 71 % 197 for j in range(3)) for i in range(sequences)]
    single = [SequenceChunk(i, (i % 90,), 5 + i % 18, tables[i], False) for i in range(sequences)]
    mixed = [SequenceChunk(i, tuple(range(1 + 2 * (i == 1))), 5 + i % 16, tables[i], False) for i in range(sequences)]
    for chunks, fused in ((single, sequences <= cpu_kernels._library.most_rows), (mixed, False)):
        if chunks is mixed and sequences == 1:
            continue
        calls.clear()
        results = {}
        for name, lane in lanes.items():
            with monkeypatch.context() as patch:
                if name != "kernels":
                    patch.setattr(cpu_kernels, "_library", None)
                results[name] = lane.step(chunks)
        assert len(calls) == (2 if fused else 0)
        ours, theirs = ((results[name] - results["exact"]).norm() for name in ("kernels", "torch"))
        assert ours <= 1.2 * theirs
        for mine, exact in zip(lanes["kernels"].store.keys, lanes["exact"].store.keys, strict=True):
            assert float((mine.double() - exact.double()).norm() / exact.double().norm()) < 2e-2
        for lane in lanes.values():  # the next comparison begins with equal KV
            for tensors, source in (
                (lane.store.keys, lanes["exact"].store.keys),
                (lane.store.values, lanes["exact"].store.values),
            ):
                for tensor, wanted in zip(tensors, source, strict=True):
                    tensor.copy_(wanted)


def test_what_does_not_suit_runs_as_transformers_has_it(
    lanes: dict[str, Lane], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A weight in oneDNN's layout is on meta: the layer runs in parts."""
    model = lanes["kernels"].model
    monkeypatch.setattr(cpu_layer, "layer", None)  # would fail
    for layer in decoder_layers(model):
        if not linears.can_pack(layer.mlp.up_proj, torch.bfloat16):
            pytest.skip("oneDNN packs no bf16 here")
        linears.bind(layer.mlp.up_proj, linears.pack(layer.mlp.up_proj.weight))
        layer.mlp.up_proj._parameters["weight"] = torch.empty(192, 128, dtype=torch.bfloat16, device="meta")
    chunks = [SequenceChunk(0, (5,), 9, (1, 2, 3), False)]
    result, expected = (lanes[name].step(chunks) for name in ("kernels", "torch"))
    assert float((result - expected).norm() / expected.norm()) < 5e-2


@pytest.mark.parametrize("sequences", [1, 2, 3, 33])
@pytest.mark.parametrize("name", ["bf16-coded", "int8", "int4-64", "mixed"])
def test_decoder_layers_with_weights_of_other_forms(
    lanes: dict[str, Lane], name: str, sequences: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """As near to exact results as torch comes with the plain weights that the forms stand for."""
    if not cpu_kernels.library().forms or not coded.use_kernels(str(tmp_path_factory.getbasetemp() / "kernels")):
        pytest.skip("no AVX512 VBMI2 here")
    names = ("bf16-coded", "int8", "int4-32", "int4-64") if name == "mixed" else (name,)
    count = 0
    for path, module in lanes["kernels"].model.named_modules():
        if not isinstance(module, linears.Linear) or path == "lm_head":
            continue
        form, weight = FORMS[names[count % len(names)]], module.weight.detach()
        count += 1
        data = form.encode(weight.view(torch.uint8).numpy().reshape(-1), "bfloat16", weight.shape)
        module.formed = FormedWeight(form, torch.from_numpy(data), tuple(weight.shape), torch.bfloat16)
        module._parameters["weight"] = torch.empty(weight.shape, dtype=torch.bfloat16, device="meta")
        plain = torch.from_numpy(form.decode(data, weight.shape))
        for lane in ("torch", "exact"):
            same = lanes[lane].model.get_submodule(path).weight
            same.data.copy_(plain)
    tables = [tuple(1 + (i * 3 + j) * 71 % 197 for j in range(3)) for i in range(sequences)]
    chunks = [SequenceChunk(i, (i % 90,), 5 + i % 18, tables[i], False) for i in range(sequences)]
    results = {lane: lanes[lane].step(chunks) for lane in lanes}
    ours, theirs = ((results[lane] - results["exact"]).norm() for lane in ("kernels", "torch"))
    assert ours <= 1.6 * theirs  # of few rows, an error says little
