"""What a decode step costs beside its weights: attention over KV, the calls of a layer, sampling.

Measured by running steps of small random Llamas the way the model runner does: transformers' modules, raytier's
attention over a paged KV store, the sampler. Layers, sequences, context and vocabulary are varied one at a time, and
the differences are the rates. In the first model the matrices are so small that what remains is the price of the calls.
In the second they are as large as those of a small model, so that every one of them is computed by all threads: what
a layer takes beyond the first model's and beyond its bytes is what starting the threads again and again costs, and what
the tokens of a prompt take beyond that is the price of their activations and of attention among them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import nn
from transformers import LlamaConfig

from raytier.checkpoint.architecture import ATTENTION_NAME, build_meta, decoder_layers
from raytier.checkpoint.manifest import KVLayerSpec
from raytier.engine.step import SampleSpec, SequenceChunk
from raytier.execution import fusion, linears
from raytier.execution.attention import ForwardContext, forward_context
from raytier.execution.drawing import draw
from raytier.execution.kv_store import KVStore
from raytier.execution.threads import num_threads
from raytier.execution.timing import typical_seconds, wait
from raytier.hardware.rates import Rates

_FEW, _MANY = 2, 8  # layers
_BATCH = 32
_SHORT, _LONG = 16, 1024  # tokens of context
_SEQUENCES = 8  # that attend over the long context
_PROMPT = 256  # tokens of a prompt that are read at once
_HEADS, _KV_HEADS, _HEAD_DIM = 16, 4, 64
_TINY, _SMALL = 64, 1024  # hidden sizes
_MATRICES = 7  # of a Llama's layer
_ASSUMED_MATRIX, _ASSUMED_PACKED = 8e-5, 4e-5  # as measured on two cores
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
    prompt_bytes_per_s: float
    prompt_flops: float
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
        fusion.adopt(self._model)
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
        # As `planner.sizing.token_bytes` has it: residual, queries, and a feed-forward part as wide as the model.
        self.token_activations = (4 * hidden + 3 * max(hidden, _HEADS * _HEAD_DIM) + 3 * hidden) * element.itemsize
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
        return self._run(layers, [self._chunk(i, 1, context - 1) for i in range(batch)])

    def read(self, tokens: int, start: int) -> Callable[[], None]:
        """A function that reads `tokens` of a prompt after its first `start` ones, with all layers."""
        return self._run(_MANY, [self._chunk(0, tokens, start)])

    def _chunk(self, number: int, tokens: int, start: int) -> SequenceChunk:
        blocks = (start + tokens) // _BLOCK
        table = tuple(range(1 + number * blocks, 1 + (number + 1) * blocks))
        return SequenceChunk(number, (1,) * tokens, start, table, True)

    def _run(self, layers: int, chunks: Sequence[SequenceChunk]) -> Callable[[], None]:
        device = torch.device(self._device)
        ids = [token for chunk in chunks for token in chunk.token_ids]
        positions = [chunk.start + i for chunk in chunks for i in range(len(chunk.token_ids))]
        last = [end - 1 for end in accumulate(len(chunk.token_ids) for chunk in chunks)]

        def run() -> None:
            self._model.config.num_hidden_layers = layers
            with forward_context(ForwardContext.build(self._store, chunks, device)):
                output = self._model(
                    input_ids=torch.tensor([ids], device=device),
                    position_ids=torch.tensor([positions], device=device),
                    use_cache=False,
                    logits_to_keep=torch.tensor(last, device=device),
                )
            draw(output.logits[0], [_GREEDY] * len(chunks))
            wait(self._device)

        return run


def measure_steps(
    dtype: str, threads: int, rates: Rates, *, device: str = "cpu", disturbed: bool = False, seconds: float = 1.0
) -> StepRates:
    """Rates of decode steps on `device`, in about `seconds`.

    Args:
        dtype: torch's name of the compute dtype, for instance "bfloat16".
        threads: CPU threads to compute with (restored afterwards).
        rates: how fast linear layers were measured to be.
        disturbed: other work uses the cores. Threads that wait for each other then take a hundred times as long, so
            that one alone is nearer to the truth, and what it costs to wake the others is assumed.
    """
    with torch.inference_mode(), num_threads(1 if disturbed else threads):

        def measured(decoder: _Decoder, layers: int, batch: int = 1, context: int = _SHORT) -> float:
            return typical_seconds(decoder.step(layers, batch, context), seconds / 12)

        def per_layer(decoder: _Decoder) -> float:
            return max(1e-6, (measured(decoder, _MANY) - measured(decoder, _FEW)) / (_MANY - _FEW))

        tiny = _Decoder(_TINY, dtype, device)
        few, many = (measured(tiny, n) for n in (_FEW, _MANY))
        few_batch, many_batch = (measured(tiny, n, _BATCH) for n in (_FEW, _MANY))
        near, far = (measured(tiny, _MANY, _SEQUENCES, context) for context in (_SHORT, _LONG))
        logits = torch.zeros(_BATCH, _VOCAB, dtype=getattr(torch, dtype), device=device)
        sampling = typical_seconds(lambda: draw(logits, [_GREEDY] * _BATCH), seconds / 20)

        # On a disturbed machine a difference may come out below nothing.
        layer = max(1e-6, (many - few) / (_MANY - _FEW))
        layer_batch = max(layer, (many_batch - few_batch) / (_MANY - _FEW))
        step = max(1e-6, few - _FEW * layer)
        step_batch = max(step, few_batch - _FEW * layer_batch)

        small = _Decoder(_SMALL, dtype, device)
        at_once, behind = (
            typical_seconds(small.read(_PROMPT, start), seconds / 12) / _MANY for start in (0, _LONG - _PROMPT)
        )
        matrix, packed_matrix = _ASSUMED_MATRIX, _ASSUMED_PACKED
        if not disturbed:
            rest = per_layer(small) - layer
            matrix = max(0.0, rest - small.layer_bytes / rates.matrix_rate(1)) / _MATRICES
            if rates.packed_matrix_bytes_per_s is not None:
                small.pack()
                rest = per_layer(small) - layer
                packed_matrix = max(0.0, rest - small.layer_bytes / rates.matrix_rate(1, packed=True)) / _MATRICES
        pairs = _PROMPT * (_LONG - _PROMPT)
        flops = 4 * pairs * _HEADS * _HEAD_DIM / max(behind - at_once, behind / 20)
        attention = 4 * _PROMPT * _PROMPT / 2 * _HEADS * _HEAD_DIM / flops
        linear = small.layer_bytes / rates.matrix_rate(_PROMPT) + _MATRICES * matrix
        passing = max(at_once - layer - attention - linear, at_once / 20)

    read = _MANY * _SEQUENCES * (_LONG - _SHORT) * tiny.token_bytes
    return StepRates(
        attention_bytes_per_s=read / max(far - near, far / 20),
        logits_per_s=logits.numel() / sampling,
        layer_seconds=layer,
        layer_sequence_seconds=(layer_batch - layer) / (_BATCH - 1),
        step_seconds=step,
        step_sequence_seconds=(step_batch - step) / (_BATCH - 1),
        prompt_bytes_per_s=_PROMPT * small.token_activations / passing,
        prompt_flops=flops,
        matrix_seconds=matrix,
        packed_matrix_seconds=packed_matrix,
    )
