"""Hand-made manifests, machines and configurations for the planner's tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raytier.checkpoint.manifest import ExpertBank, ExpertPart, KVLayerSpec, ModelManifest, Parameter, Role
from raytier.config import AppConfig, parse_config
from raytier.hardware.inventory import GPU, NodeInventory
from raytier.hardware.rates import Overlap, Rates

GIB = 2**30
#: A CPU node whose disk is eight times slower than its linear layers.
RATES = Rates(1e9, ((1, 8e9), (8, 8e9), (64, 6e9), (512, 1e9)))
GPU_RATES = Rates(3.5e9, ((1, 1500e9), (8, 1500e9), (64, 1400e9), (512, 400e9)), 24e9)

#: The same with a ramdisk that is four times as fast as the disk.
RAMDISK_RATES = replace(RATES, ramdisk_read_bytes_per_s=4e9)
#: A node of which everything was measured.
FULL_RATES = replace(
    RAMDISK_RATES,
    packed_matrix_bytes_per_s=((1, 12e9), (8, 12e9), (64, 9e9), (512, 1.3e9)),
    disk_write_bytes_per_s=0.8e9,
    memory_copy_bytes_per_s=10e9,
    attention_bytes_per_s=5e9,
    logits_per_s=1e9,
    layer_seconds=2e-4,
    layer_sequence_seconds=1e-5,
    step_seconds=5e-4,
    step_sequence_seconds=1e-5,
    prompt_bytes_per_s=2e9,
    prompt_flops=2e11,
    matrix_seconds=5e-5,
    packed_matrix_seconds=1e-5,
    overlap=Overlap(0.95, 0.9),
    ramdisk_overlap=Overlap(0.7, 0.5),
)

CPU_NODE = NodeInventory("cpu-node", 2, 24 * GIB, 22 * GIB, shm_free=12 * GIB)
GPU_NODE = NodeInventory("gpu-node", 32, 128 * GIB, 124 * GIB, gpus=(GPU(0, "A100", 80 * GIB, 79 * GIB, "8.0"),))


def llama(
    *,
    layers: int = 8,
    hidden: int = 256,
    intermediate: int = 768,
    vocab: int = 4096,
    heads: int = 8,
    kv_heads: int = 4,
    tied: bool = False,
    dtype: str = "bfloat16",
    compute_dtype: str = "bfloat16",
    context: int = 1024,
) -> ModelManifest:
    """A Llama-shaped model without files."""
    width = hidden // heads
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    parameters = [Parameter(embedding, (vocab, hidden), dtype, Role.EMBEDDING, aliases=(head,) if tied else ())]
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_heads * width, hidden),
        "self_attn.v_proj": (kv_heads * width, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    for layer in range(layers):
        parameters += [
            Parameter(f"model.layers.{layer}.{name}.weight", shape, dtype, Role.LAYER, layer)
            for name, shape in shapes.items()
        ]
    parameters.append(Parameter("model.norm.weight", (hidden,), dtype, Role.OTHER))
    if not tied:
        parameters.append(Parameter(head, (vocab, hidden), dtype, Role.HEAD))
    return ModelManifest(
        model_dir="/models/llama",
        architecture="LlamaForCausalLM",
        model_type="llama",
        files=(),
        parameters=tuple(parameters),
        num_layers=layers,
        hidden_size=hidden,
        vocab_size=vocab,
        max_context=context,
        compute_dtype=compute_dtype,
        kv_layers=tuple(KVLayerSpec(kv_heads, width, width) for _ in range(layers)),
        embedding=embedding,
        head=embedding if tied else head,
    )


def mixture(
    *,
    layers: int,
    experts: int,
    per_token: int,
    hidden: int,
    intermediate: int,
    dense_layers: int = 0,
    vocab: int = 4096,
    heads: int = 8,
    kv_heads: int = 4,
) -> ModelManifest:
    """A mixture of experts without files, in bf16: Llama's attention, and from layer `dense_layers` on routed experts,
    each with its projections as parameters of their own."""
    base = llama(layers=layers, hidden=hidden, intermediate=intermediate, vocab=vocab, heads=heads, kv_heads=kv_heads)
    banks = [f"model.layers.{n}.mlp.experts" for n in range(dense_layers, layers)]
    parameters = [p for p in base.parameters if p.layer is None or p.layer < dense_layers or ".mlp." not in p.name]
    projections = (("gate_up_proj", 0, intermediate, hidden), ("gate_up_proj", 1, intermediate, hidden))
    for layer, bank in enumerate(banks, dense_layers):
        gate = f"model.layers.{layer}.mlp.gate.weight"
        parameters.append(Parameter(gate, (experts, hidden), "bfloat16", Role.LAYER, layer))
        parameters += [
            Parameter(
                f"{bank}.{expert}.{weight}.{part}", (rows, columns), "bfloat16", Role.LAYER, layer,
                expert=ExpertPart(bank, weight, expert, part),
            )
            for expert in range(experts)
            for weight, part, rows, columns in (*projections, ("down_proj", 0, hidden, intermediate))
        ]  # fmt: skip
    found = tuple(ExpertBank(bank, n, experts, per_token) for n, bank in enumerate(banks, dense_layers))
    return replace(base, architecture="MixtureForCausalLM", parameters=tuple(parameters), experts=found)


def configuration(
    *,
    device_mb: float | None = None,
    host_mb: float | None = 0,
    nvme: dict[str, Any] | None = None,
    ramdisk: dict[str, Any] | None = None,
    **sections: Any,
) -> AppConfig:
    """A configuration with these caps; small steps and little KV unless `sections` say otherwise."""
    args: dict[str, Any] = {
        "models": [{"model_id": "m", "source_path": "/models/llama"}],
        "tiers": {
            "device": {"max_mb": device_mb},
            "host": {"max_mb": host_mb},
            "nvme": nvme or {},
            "ramdisk": ramdisk or {},
        },
        "scheduler": {"max_num_seqs": 4, "max_num_batched_tokens": 64},
        "kv": {"expected_sequences": 2, "expected_context": 128},
    }
    return parse_config(args | sections)
