"""A Llama-shaped bf16 model of random weights, quickly written: the speed of a model does not depend on its values."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers

GIB = 2**30
#: Elements of the random block that all weights are cut from; a prime step apart, so that no two begin alike.
_BLOCK = 16 * 2**20
_STEP = 1_000_003
_ONE = 0x3F80  # 1.0 in bf16


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama with untied embeddings."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int = 2048

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """(name, shape) of every parameter in the order of the file."""
        kv = self.kv_heads * (self.hidden // self.heads)
        yield "model.embed_tokens.weight", (self.vocab, self.hidden)
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            yield f"{name}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{name}.self_attn.k_proj.weight", (kv, self.hidden)
            yield f"{name}.self_attn.v_proj.weight", (kv, self.hidden)
            yield f"{name}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{name}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{name}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{name}.mlp.down_proj.weight", (self.hidden, self.intermediate)
            yield f"{name}.input_layernorm.weight", (self.hidden,)
            yield f"{name}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocab, self.hidden)

    @property
    def parameters(self) -> int:
        return sum(int(np.prod(shape)) for _, shape in self.tensors())

    @property
    def nbytes(self) -> int:
        return 2 * self.parameters

    @property
    def kv_token_bytes(self) -> int:
        return 2 * 2 * self.layers * self.kv_heads * (self.hidden // self.heads)


#: 1.1 B parameters, 2.2 GB: the shape of TinyLlama.
LLAMA_1B = Shape(hidden=2048, intermediate=5632, layers=22, heads=32, kv_heads=4, vocab=32000)
#: 3.0 B parameters, 6.0 GB: the proportions of Llama 3.2 3B with a smaller vocabulary.
LLAMA_3B = Shape(hidden=3072, intermediate=8192, layers=28, heads=24, kv_heads=8, vocab=32000)
#: 0.15 B parameters, 300 MB.
LLAMA_QUICK = Shape(hidden=1024, intermediate=2816, layers=12, heads=16, kv_heads=4, vocab=8000)


@contextmanager
def random_model(shape: Shape, parent: str | None = None) -> Iterator[Path]:
    """The directory of a model of `shape`, below `parent` (None: the directory for temporary files); gone at the end.

    Raises:
        SystemExit: the disk has not enough room.
    """
    with TemporaryDirectory(prefix="raytier-benchmark-", dir=parent) as name:
        directory = Path(name)
        free, needed = shutil.disk_usage(directory).free, shape.nbytes + GIB
        if free < needed:
            raise SystemExit(
                f"{directory.parent} has {free / GIB:.1f} GiB free, the model needs {needed / GIB:.1f}: "
                "choose another directory with --dir"
            )
        write_model(shape, directory)
        yield directory


def write_model(shape: Shape, directory: Path) -> None:
    """Write config, tokenizer and weights; the weights are on disk, and out of the page cache, when this returns."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.context,
        "tie_word_embeddings": False,
        "eos_token_id": 0,
    }
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(shape.vocab)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')

    tensors = list(shape.tensors())
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in tensors:
        start, end = end, end + 2 * int(np.prod(dims))
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)

    values = np.random.default_rng(0).standard_normal(_BLOCK, dtype=np.float32)
    values *= 0.02
    block = (values.view(np.uint32) >> 16).astype(np.uint16)  # bf16 is the upper half of fp32
    ones = np.full(max(shape.hidden, 1), _ONE, dtype=np.uint16)
    with open(directory / "model.safetensors", "wb", buffering=0) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for number, (_, dims) in enumerate(tensors):
            rest = int(np.prod(dims))
            position = number * _STEP % _BLOCK
            while rest:
                source, position = (ones, 0) if len(dims) == 1 else (block[position:], 0)
                rest -= file.write(source[:rest].data) // 2
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
