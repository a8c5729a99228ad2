"""Doubles for what stands around the engine: an executor whose tokens follow from its paged KV, small tokenizers."""

from __future__ import annotations

import functools
import hashlib
import json
import threading
from collections.abc import Callable, Sequence

from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from raytier.checkpoint.manifest import TokenizerSpec
from raytier.engine.step import Arrival, SampleSpec, StepBatch, StepResult, StepStats, TokenLogprobs
from raytier.engine.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog. ",
    "Pack my box with five dozen liquor jugs! 0123456789\n",
    "日本語の文章と漢字。 中文句子也在这里。",
    "emoji 😀🎉👩‍👩‍👧 naïve café Ünïcödé",
]
EOS = "<|im_end|>"


@functools.lru_cache(maxsize=1)
def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE of a few hundred tokens; rare characters are split over several tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS * 3, trainer)
    special = ["<|im_start|>", EOS]
    backend.add_special_tokens([AddedToken(text, special=True) for text in special])
    backend.add_tokens([AddedToken("<tool call>", special=False)])
    eos_id = backend.token_to_id(EOS)
    return Tokenizer(TokenizerSpec(backend.to_str(), None, {"eos_token": EOS}, None, (eos_id,)))


@functools.lru_cache(maxsize=1)
def byte_fallback_tokenizer() -> Tokenizer:
    """Llama-2-like: word pieces with a metasymbol, bytes for what is not in the vocabulary."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += ["▁hello", "▁world", "▁a", "b", "c", "é", "日", "本", "!"]
    backend = Backend(models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(text, special=True) for text in ("<s>", "</s>")])
    return Tokenizer(TokenizerSpec(backend.to_str(), None, {}, 1, (2,)))


def next_token(history: Sequence[int], draw: SampleSpec, vocab_size: int) -> int:
    """The fake model: greedy tokens depend on the history, drawn ones on the draw's key as well."""
    key: list[object] = [list(history)]
    if draw.temperature > 0:
        key += [draw.seed, draw.sample, draw.position]
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % vocab_size


class PagedExecutor:
    """Keeps tokens where a real executor keeps KV, in slots `block * block_size + offset`.

    The history that a draw depends on is read back through the block table, so a block that two sequences
    write to, a wrong start, a missing token or a copy left out changes the output or fails right away.

    Args:
        model: replaces `next_token`; gets (history, draw) and returns the token.
        on_step: called with every batch before it runs.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        vocab_size: int,
        model: Callable[[Sequence[int], SampleSpec], int] | None = None,
        on_step: Callable[[StepBatch], None] | None = None,
    ) -> None:
        self.block_size = block_size
        self.slots: list[tuple[int, int] | None] = [None] * (num_blocks * block_size)  # position, token
        self.batches: list[StepBatch] = []
        self.known: dict[int, Arrival] = {}
        self.logprobs: dict[int, int] = {}  # of sequences that want them: tokens whose logprobs are known
        self.model = model or (lambda history, draw: next_token(history, draw, vocab_size))
        self.on_step = on_step
        self.threads: set[int] = set()

    def step(self, batch: StepBatch) -> StepResult:
        self.threads.add(threading.get_ident())
        if self.on_step:
            self.on_step(batch)
        assert batch.step == len(self.batches) + 1
        self.batches.append(batch)
        for seq_id in batch.ended:
            del self.known[seq_id]
            self.logprobs.pop(seq_id, None)
        for arrival in batch.arrivals:
            assert self.known.setdefault(arrival.seq_id, arrival) is arrival, "it is known already"
        old = list(self.slots)
        for copy in batch.copies:
            for offset in range(self.block_size):
                self.slots[copy.target * self.block_size + offset] = old[copy.source * self.block_size + offset]
        written: set[int] = set()
        result = StepResult(batch.step, stats=StepStats(batch.num_tokens, len(batch.chunks), bytes_streamed=1000))
        for chunk in batch.chunks:
            assert chunk.token_ids
            stop = chunk.start + len(chunk.token_ids)
            assert stop <= len(chunk.block_table) * self.block_size
            assert 0 not in chunk.block_table, "the null block is in a block table"
            for position, token in enumerate(chunk.token_ids, chunk.start):
                slot = self._slot(chunk.block_table, position)
                assert slot not in written, "two sequences of a step write to the same slot"
                written.add(slot)
                self.slots[slot] = (position, token)
        for chunk in batch.chunks:
            history = []
            for position in range(chunk.start + len(chunk.token_ids)):
                entry = self.slots[self._slot(chunk.block_table, position)]
                assert entry is not None, f"sequence {chunk.seq_id}: token {position} was never written"
                assert entry[0] == position, f"slot of {chunk.seq_id}@{position} holds {entry}"
                history.append(entry[1])
            arrival = self.known[chunk.seq_id]
            if arrival.spec.prompt_logprobs is not None:
                first = self.logprobs.setdefault(arrival.seq_id, arrival.logprobs_known)
                assert first >= min(chunk.start + 1, arrival.prompt_len), "a row was left out"
                targets = range(max(chunk.start + 1, first), min(chunk.stop + 1, arrival.prompt_len))
                found = tuple(TokenLogprobs(arrival.tokens[i], -float(i), 1, ()) for i in targets)
                if found:
                    self.logprobs[arrival.seq_id] = targets.stop
                    result.prompt_logprobs[chunk.seq_id] = found
            if chunk.draws:
                draw = arrival.spec.draw(chunk.stop - arrival.prompt_len)
                result.tokens[chunk.seq_id] = self.model(history, draw)
        return result

    def _slot(self, table: Sequence[int], position: int) -> int:
        index, offset = divmod(position, self.block_size)
        return table[index] * self.block_size + offset
