"""llama.cpp through llama-cpp-python's C bindings. With two arguments: write a GGUF file from a model directory; with
three (a GGUF file, the new one, `Q8_0` or `Q4_0`): quantise it.

Decoding uses `llama_batch` with one token of every sequence per `llama_decode`, and the C greedy sampler: no Python
work per token but these calls.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np
from protocol import answer, prompts, run_steps


def write_gguf(directory: Path, target: Path) -> None:
    """A Llama checkpoint (bf16 safetensors, one file) as GGUF: bf16 matrices, fp32 norms, no vocabulary.

    llama.cpp rotates neighbouring pairs, Hugging Face halves, so the rows of q and k are permuted.
    """
    import gguf

    config = json.loads((directory / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    source = directory / "model.safetensors"
    with open(source, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    data = np.memmap(source, np.uint8, "r", 8 + size)

    def load(name: str) -> tuple[np.ndarray, tuple[int, ...]]:
        first, last = header[name]["data_offsets"]
        return np.asarray(data[first:last]).view(np.uint16), tuple(header[name]["shape"])

    layer = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    names["lm_head.weight"] = "output.weight"
    for i in range(config["num_hidden_layers"]):
        names |= {f"model.layers.{i}.{hf}.weight": f"blk.{i}.{ours}.weight" for hf, ours in layer.items()}
    if unknown := header.keys() - names.keys():
        raise SystemExit(f"parameters without a place in GGUF: {sorted(unknown)}")
    if "lm_head.weight" not in header:  # tied: llama.cpp then takes the embedding
        del names["lm_head.weight"]

    writer = gguf.GGUFWriter(target, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(config["hidden_size"] // heads)
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    order = sorted(names, key=lambda name: header[name]["data_offsets"])
    for name in order:
        shape = tuple(header[name]["shape"])
        count = int(np.prod(shape))
        if len(shape) == 1:
            writer.add_tensor_info(names[name], shape, np.dtype(np.float32), 4 * count)
        else:  # GGUF's writer takes the byte shape of raw types
            byte_shape = (*shape[:-1], 2 * shape[-1])
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor_info(names[name], byte_shape, np.dtype(np.uint8), 2 * count, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in order:  # one at a time: the file may be larger than memory
        values, shape = load(name)
        if len(shape) == 1:
            values = (values.astype(np.uint32) << 16).view(np.float32)
        elif name.endswith(("q_proj.weight", "k_proj.weight")):
            count = heads if "q_proj" in name else kv_heads
            values = values.reshape(count, 2, shape[0] // count // 2, shape[1]).swapaxes(1, 2)
        writer.write_tensor_data(np.ascontiguousarray(values).view(np.uint8))
    writer.close()
    for path in (target, source):
        fd = os.open(path, os.O_RDWR)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def quantise(source: Path, target: Path, kind: str) -> None:
    """All matrices in `kind`, the output head too, which llama.cpp would keep in more bits."""
    params = lib.llama_model_quantize_default_params()
    params.ftype = {"Q8_0": lib.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": lib.LLAMA_FTYPE_MOSTLY_Q4_0}[kind]
    params.pure = True
    params.nthread = os.cpu_count() or 1
    if lib.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama.cpp cannot quantise {source}")


class Llama:
    """One model and context; see `side.Side` for who calls."""

    def load(self, path: str, context: int, sequences: int, threads: int, batch_tokens: int = 512) -> dict[str, Any]:
        """`context`: tokens of all sequences together."""
        lib.llama_backend_init()
        self._log = lib.llama_log_callback(lambda *_: None)
        lib.llama_log_set(self._log, ctypes.c_void_p(0))
        model_params = lib.llama_model_default_params()
        model_params.use_mmap = True
        self._model = lib.llama_model_load_from_file(path.encode(), model_params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = batch_tokens
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._sampler = lib.llama_sampler_init_greedy()
        self._vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._batch_tokens = batch_tokens
        self._batch = lib.llama_batch_init(batch_tokens, 0, 1)
        return {"system": lib.llama_print_system_info().decode(), "threads": threads}

    def decode(
        self, batch: int, prompt: int, warm_up: int, steps: int, seed: int = 0, ids: list[list[int]] | None = None
    ) -> dict[str, Any]:
        chosen = ids or prompts(batch, prompt, self._vocab, seed)
        lib.llama_memory_clear(lib.llama_get_memory(self._context), True)
        position = len(chosen[0])
        newest: list[int] = []

        def prefill() -> list[int]:
            nonlocal newest
            newest = []
            todo = [(token, pos, seq) for seq, tokens in enumerate(chosen) for pos, token in enumerate(tokens)]
            for first in range(0, len(todo), self._batch_tokens):
                part = todo[first : first + self._batch_tokens]
                last = [i for i, (_, pos, _) in enumerate(part) if pos == position - 1]
                newest += self._run(part, last)
            return newest

        def step() -> list[int]:
            nonlocal newest, position
            newest = self._run([(token, position, seq) for seq, token in enumerate(newest)], list(range(len(newest))))
            position += 1
            return newest

        return run_steps(chosen, prefill, step, warm_up, steps)

    def _run(self, tokens: list[tuple[int, int, int]], wanted: list[int]) -> list[int]:
        """One `llama_decode` of (token, position, sequence); the greedy next token at the indices `wanted`."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position
            batch.seq_id[i][0] = sequence
            batch.n_seq_id[i] = 1
            batch.logits[i] = False
        for i in wanted:
            batch.logits[i] = True
        if lib.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        return [lib.llama_sampler_sample(self._sampler, self._context, i) for i in wanted]


if __name__ == "__main__":
    if len(sys.argv) == 3:
        write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
    elif len(sys.argv) == 4:
        quantise(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    else:
        answer(Llama())
