"""vLLM on the CPU: its engine in this process, stepped by hand so that every step can be timed."""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import asdict
from typing import Any

from protocol import Decoded, answer, prompts


class VLLM:
    """One engine; see `side.Side` for who calls."""

    def load(self, path: str, context: int, sequences: int, options: dict[str, Any] | None = None) -> dict[str, Any]:
        """`context`: tokens of one sequence."""
        from vllm import LLM

        began = time.perf_counter()
        self._llm = LLM(
            model=path,
            dtype="bfloat16",
            max_model_len=context,
            max_num_seqs=sequences,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            **(options or {}),
        )
        self._engine = self._llm.llm_engine
        self._vocab = self._llm.model_config.get_vocab_size()
        self._runs = 0
        import torch

        return {"threads": torch.get_num_threads(), "seconds": time.perf_counter() - began}

    def decode(
        self, batch: int, prompt: int, warm_up: int, steps: int, seed: int = 0, ids: list[list[int]] | None = None
    ) -> dict[str, Any]:
        from vllm import SamplingParams

        chosen = ids or prompts(batch, prompt, self._vocab, seed)
        self._runs += 1
        # A prefill in pieces starts the sequences one after another; the window holds the steps that carry all of them.
        spare = 64
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=warm_up + steps + spare, detokenize=False)
        names = [f"{self._runs}-{i}" for i in range(batch)]
        began = time.perf_counter()
        for name, tokens in zip(names, chosen, strict=True):
            self._engine.add_request(name, {"prompt_token_ids": tokens}, params)
        counts = dict.fromkeys(names, 0)
        first: list[int] = []
        marks: list[float] = []
        while len(marks) < 1 + warm_up + steps:
            outputs = self._engine.step()
            now = time.perf_counter()
            advanced = 0
            for output in outputs:
                tokens = output.outputs[0].token_ids
                advanced += len(tokens) > counts[output.request_id]
                counts[output.request_id] = len(tokens)
                if output.request_id == names[0]:
                    first = list(tokens)
            if min(counts.values()) > 0 and (advanced == batch or not marks):
                marks.append(now)
        self._engine.abort_request(names)
        while self._engine.has_unfinished_requests():
            self._engine.step()
        times = [later - earlier for earlier, later in itertools.pairwise(marks)]
        return asdict(Decoded(batch, times[warm_up:], marks[0] - began, first))


if __name__ == "__main__":
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    answer(VLLM())
