"""What a decode step costs beside its weights: attention over KV, the calls of a layer, sampling.

Measured by running steps of small random Llamas the way the model runner does: transformers' modules, raytier's
attention over a paged KV store, the sampler. Layers, sequences, context and vocabulary are varied one at a time, and
the differences are the rates. In the first model the matrices are so small that what remains is the price of the calls.
In the second they are as large as those of a small model, so that every one of them is computed by all threads: what
a layer takes beyond the first model's and beyond its bytes is what starting the threads again and again costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig

from raytier.checkpoint.architecture import ATTENTION_NAME, build_meta, decoder_layers
from raytier.checkpoint.manifest import KVLayerSpec
from raytier.engine.step import SampleSpec, SequenceChunk
from raytier.execution import linears
from raytier.execution.attention import ForwardContext, forward_context
from raytier.execution.kv_store import KVStore
from raytier.execution.sampler import sample
from raytier.execution.timing import num_threads, typical_seconds, wait

_FEW, _MANY = 2, 8  # layers
_BATCH = 32
_SHORT, _LONG = 16, 1024  # tokens of context
_SEQUENCES = 8  # that attend over the long context
_HEADS, _KV_HEADS, _HEAD_DIM = 16, 4, 64
_TINY, _SMALL = 64, 1024  # hidden sizes
_MATRICES = 7  # of a Llama's layer
_BLOCK = 16
_VOCAB = 32000
_GREEDY = SampleSpec(0.0, 1.0, 0, 0, 0, 0)


@dataclass(frozen=True, slots=True)
class StepRates:
    """Fields of `hardware.rates.Rates` of the same names."""

    attention_bytes_per_s: float
    logits_per_s: float
    layer_seconds: float
    layer_sequence_seconds: float
    step_seconds: float
    step_sequence_seconds: float
    matrix_seconds: float
    packed_matrix_seconds: float


class _Decoder:
    """A random model of `hidden` columns with an empty KV store."""

    def __init__(self, hidden: int, dtype: str, device: str) -> None:
        element = getattr(torch, dtype)
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=hidden,
            num_hidden_layers=_MANY,
            num_attention_heads=_HEADS,
            num_key_value_heads=_KV_HEADS,
            head_dim=_HEAD_DIM,
            vocab_size=64,
            max_position_embeddings=_LONG,
            tie_word_embeddings=False,
        )
        self._model = build_meta(config, dtype)
        self._model.set_attn_implementation(ATTENTION_NAME)
        for module in self._model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    filled = torch.full(parameter.shape, 0.01, dtype=element, device=device)
                    module._parameters[name] = nn.Parameter(filled, requires_grad=False)
            for name, buffer in list(module._buffers.items()):
                module._buffers[name] = None if buffer is None else buffer.to(device)
        spec = KVLayerSpec(_KV_HEADS, _HEAD_DIM, _HEAD_DIM)
        blocks = 1 + max(_BATCH * _SHORT, _SEQUENCES * _LONG) // _BLOCK
        self._store = KVStore([spec] * _MANY, blocks, _BLOCK, element, torch.device(device))
        for tensor in (*self._store.keys, *self._store.values):
            tensor.zero_()
        self.token_bytes = spec.token_bytes(dtype)
        self._layers = decoder_layers(self._model)
        self.layer_bytes = sum(p.nbytes for p in self._layers[0].parameters())
        self._device = device

    def pack(self) -> None:
        """Let every linear layer compute with weights in the layout of the CPU's kernels."""
        for module in self._layers.modules():
            if isinstance(module, nn.Linear):
                linears.bind(module, linears.pack(module.weight))

    def step(self, layers: int, batch: int, context: int) -> Callable[[], None]:
        """A function that runs one decode step of `batch` sequences, each with its `context`-th token."""
        device, per_sequence = torch.device(self._device), context // _BLOCK
        chunks = [
            SequenceChunk(i, (1,), context - 1, tuple(range(1 + i * per_sequence, 1 + (i + 1) * per_sequence)), _GREEDY)
            for i in range(batch)
        ]

        def step() -> None:
            self._model.config.num_hidden_layers = layers
            with forward_context(ForwardContext.build(self._store, chunks, device)):
                output = self._model(
                    input_ids=torch.tensor([[1] * batch], device=device),
                    position_ids=torch.tensor([[context - 1] * batch], device=device),
                    use_cache=False,
                    logits_to_keep=torch.arange(batch, device=device),
                )
            sample(output.logits[0], [_GREEDY] * batch)
            wait(self._device)

        return step


def measure_steps(
    dtype: str,
    threads: int,
    *,
    matrix_rate: float,
    packed_rate: float | None = None,
    device: str = "cpu",
    seconds: float = 0.8,
) -> StepRates:
    """Rates of decode steps on `device`, in about `seconds`.

    Args:
        dtype: torch's name of the compute dtype, for instance "bfloat16".
        threads: CPU threads to compute with (restored afterwards).
        matrix_rate, packed_rate: bytes per second of linear layers at one row, plain and packed (None: never packed).
    """
    with torch.inference_mode(), num_threads(threads):

        def measured(decoder: _Decoder, layers: int, batch: int = 1, context: int = _SHORT) -> float:
            return typical_seconds(decoder.step(layers, batch, context), seconds / 10)

        def per_layer(decoder: _Decoder) -> float:
            return max(1e-6, (measured(decoder, _MANY) - measured(decoder, _FEW)) / (_MANY - _FEW))

        tiny = _Decoder(_TINY, dtype, device)
        few, many = (measured(tiny, n) for n in (_FEW, _MANY))
        few_batch, many_batch = (measured(tiny, n, _BATCH) for n in (_FEW, _MANY))
        near, far = (measured(tiny, _MANY, _SEQUENCES, context) for context in (_SHORT, _LONG))
        logits = torch.zeros(_BATCH, _VOCAB, dtype=getattr(torch, dtype), device=device)
        sampling = typical_seconds(lambda: sample(logits, [_GREEDY] * _BATCH), seconds / 20)

        # On a disturbed machine a difference may come out below nothing.
        layer = max(1e-6, (many - few) / (_MANY - _FEW))
        layer_batch = max(layer, (many_batch - few_batch) / (_MANY - _FEW))
        step = max(1e-6, few - _FEW * layer)
        step_batch = max(step, few_batch - _FEW * layer_batch)

        small = _Decoder(_SMALL, dtype, device)
        matrix = max(0.0, per_layer(small) - layer - small.layer_bytes / matrix_rate) / _MATRICES
        packed_matrix = 0.0
        if packed_rate is not None:
            small.pack()
            packed_matrix = max(0.0, per_layer(small) - layer - small.layer_bytes / packed_rate) / _MATRICES

    read = _MANY * _SEQUENCES * (_LONG - _SHORT) * tiny.token_bytes
    return StepRates(
        attention_bytes_per_s=read / max(far - near, far / 20),
        logits_per_s=logits.numel() / sampling,
        layer_seconds=layer,
        layer_sequence_seconds=(layer_batch - layer) / (_BATCH - 1),
        step_seconds=step,
        step_sequence_seconds=(step_batch - step) / (_BATCH - 1),
        matrix_seconds=matrix,
        packed_matrix_seconds=packed_matrix,
    )
