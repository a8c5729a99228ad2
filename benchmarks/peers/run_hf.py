"""transformers, all in memory or with `accelerate` disk offload: greedy decoding with its own KV cache."""

from __future__ import annotations

import time
from typing import Any

import torch
from protocol import answer, prompts, run_steps
from transformers import AutoModelForCausalLM


class Transformers:
    """One model; see `side.Side` for who calls."""

    def load(
        self,
        path: str,
        threads: int,
        resident_layers: int | None = None,
        offload_dir: str | None = None,
        own: bool = True,
    ) -> dict[str, Any]:
        """`resident_layers`: so many decoder layers stay in memory, the others on disk (None: all in memory)."""
        torch.set_num_threads(threads)
        began = time.perf_counter()
        if resident_layers is None:
            self._model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        else:
            from transformers import AutoConfig

            layers = AutoConfig.from_pretrained(path).num_hidden_layers
            kept = {round(i * layers / resident_layers) for i in range(resident_layers)} if resident_layers else set()
            device_map: dict[str, str] = {f"model.layers.{i}": "cpu" if i in kept else "disk" for i in range(layers)}
            device_map |= {
                "model.embed_tokens": "cpu",
                "model.norm": "cpu",
                "model.rotary_emb": "cpu",
                "lm_head": "disk",
            }
            self._model = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.bfloat16, device_map=device_map, offload_folder=offload_dir
            )
            if own:  # what stays: a tensor of its own, not a mapping of the file that page cache pressure evicts
                for parameter in self._model.parameters():
                    if parameter.device.type != "meta":
                        parameter.data = parameter.data.clone()
        self._model.eval()
        return {"threads": threads, "seconds": time.perf_counter() - began}

    def decode(
        self, batch: int, prompt: int, warm_up: int, steps: int, seed: int = 0, ids: list[list[int]] | None = None
    ) -> dict[str, Any]:
        chosen = ids or prompts(batch, prompt, self._model.config.vocab_size, seed)
        newest: torch.Tensor = torch.tensor(chosen)
        cache: Any = None

        def step() -> list[int]:
            nonlocal newest, cache
            with torch.inference_mode():
                out = self._model(input_ids=newest, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache = out.past_key_values
                newest = out.logits[:, -1].argmax(-1, keepdim=True)
            return [int(token) for token in newest[:, 0]]

        return run_steps(chosen, step, step, warm_up, steps)


if __name__ == "__main__":
    answer(Transformers())
