"""Trains the demo model from scratch on the generated corpus: `python -m raytier.demo.train --out DIR --minutes N`."""

import argparse
import copy
import math
import os
import random
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from raytier.demo.corpus import Corpus, Message

END_OF_TEXT: Final = "<|endoftext|>"
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"
END_OF_TEXT_ID, TURN_START_ID, TURN_END_ID = 0, 1, 2  # the trainer numbers special tokens first, in order
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
VOCABULARY: Final = 2048
POSITIONS: Final = 1024
ROW: Final = 256
TOKENS_PER_STEP: Final = 2048
LONG_EVERY: Final = 12
PROMPT_WEIGHT: Final = 0.1

Row = tuple[list[int], list[float], list[int]]


def train_tokenizer(corpus: Corpus, documents: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE with single digits, learned from the corpus."""
    source = corpus.documents(random.Random(corpus.seed + 2))
    texts = [message.content for _ in range(documents) for message in next(source)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "system\nuser\nassistant\n"], trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model() -> LlamaForCausalLM:
    """A fresh Llama of about 4.1 million parameters."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=TURN_END_ID,
        pad_token_id=END_OF_TEXT_ID,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=[TURN_END_ID, END_OF_TEXT_ID],
        pad_token_id=END_OF_TEXT_ID,
        do_sample=False,
        max_new_tokens=192,
    )
    return model


def encode(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> tuple[list[int], list[float]]:
    """Token ids of a document as the chat template writes it, and the weight of each in the loss."""
    ids: list[int] = []
    weights: list[float] = []
    newline = tokenizer.encode("\n")
    for message in messages:
        if message.role == "text":
            text = tokenizer.encode(message.content)
            ids += text
            weights += [1.0] * len(text)
            continue
        head = [TURN_START_ID, *tokenizer.encode(f"{message.role}\n")]
        body = [*tokenizer.encode(message.content), TURN_END_ID]
        ids += head + body + newline
        weight = 1.0 if message.role == "assistant" else PROMPT_WEIGHT
        weights += [0.0] * len(head) + [weight] * len(body) + [0.0] * len(newline)
    return [*ids, END_OF_TEXT_ID], [*weights, 1.0 if messages[0].role == "text" else 0.0]


def rows(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Row]:
    """Endless rows of packed documents: ids, loss weights, and the number of the document within the row."""
    documents = corpus.documents(random.Random(seed))
    pending: list[tuple[list[int], list[float]]] = []
    while True:
        ids: list[int] = []
        weights: list[float] = []
        numbers: list[int] = []
        number = 0
        while len(ids) < ROW:
            document = pending.pop() if pending else encode(tokenizer, next(documents))
            if ids and len(ids) + len(document[0]) > ROW + 8:
                pending.append(document)
                break
            ids += document[0]
            weights += document[1]
            numbers += [number] * len(document[0])
            number += 1
        yield _fit(ids, weights, numbers, ROW)


def long_rows(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, seed: int) -> Iterator[Row]:
    """Endless rows that hold one long conversation each, so that far positions behave."""
    rng = random.Random(seed)
    while True:
        ids, weights = encode(tokenizer, corpus.conversation(rng, 26))
        yield _fit(ids, weights, [0] * len(ids), POSITIONS)


def _fit(ids: list[int], weights: list[float], numbers: list[int], length: int) -> Row:
    gap = max(0, length - len(ids))
    return (ids + [0] * gap)[:length], (weights + [0.0] * gap)[:length], (numbers + [-1] * gap)[:length]


def loss_of(model: LlamaForCausalLM, batch: Sequence[Row]) -> torch.Tensor:
    """Weighted next-token loss; no document sees another one of its row."""
    ids, weights, numbers = (torch.tensor(column) for column in zip(*batch, strict=True))
    length = ids.shape[1]
    mask = (numbers[:, :, None] == numbers[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    logits = model(input_ids=ids, attention_mask=mask[:, None], use_cache=False).logits[:, :-1]
    weight = weights[:, 1:] * (numbers[:, 1:] == numbers[:, :-1])
    wanted = weight > 0
    losses = functional.cross_entropy(logits[wanted].float(), ids[:, 1:][wanted], reduction="none")
    return (losses * weight[wanted]).sum() / weight.sum()


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model as bf16, each file replaced at once, so that `out` is usable at any moment."""
    scratch = out.parent / f".{out.name}.{os.getpid()}"
    copy.deepcopy(model).bfloat16().save_pretrained(scratch)
    tokenizer.save_pretrained(scratch, save_jinja_files=False)
    out.mkdir(parents=True, exist_ok=True)
    for file in scratch.iterdir():
        file.chmod(0o644)
        file.replace(out / file.name)
    shutil.rmtree(scratch)


def _optimizers(model: LlamaForCausalLM, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=peak, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def train(
    out: Path, minutes: float, *, seed: int, threads: int, peak: float, save_every: float, start: Path | None
) -> None:
    """Train for so many minutes; the learning rate follows the clock, so the run always ends on time."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    corpus = Corpus()
    if start is None:
        tokenizer, model = train_tokenizer(corpus), build_model()
    else:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(start)
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    model.train()
    model.model.compile(dynamic=False)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    optimizers = _optimizers(model, peak)
    short, long = rows(corpus, tokenizer, seed + 10), long_rows(corpus, tokenizer, seed + 11)
    began = reported = saved = time.monotonic()
    total, step, mean = minutes * 60, 0, math.nan
    while (elapsed := time.monotonic() - began) < total:
        done = elapsed / total
        rate = peak * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        if step % LONG_EVERY == LONG_EVERY - 1:
            batch = [next(long) for _ in range(TOKENS_PER_STEP // POSITIONS)]
        else:
            batch = [next(short) for _ in range(TOKENS_PER_STEP // ROW)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(model, batch)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        value = loss.item()
        mean = value if math.isnan(mean) else 0.95 * mean + 0.05 * value
        now = time.monotonic()
        if now - reported > 20:
            reported = now
            speed = step * TOKENS_PER_STEP / (now - began)
            left = (total - (now - began)) / 60
            print(
                f"step {step}  loss {mean:.4f}  rate {rate:.5f}  {speed:.0f} tokens/s  {left:.1f} minutes left",
                flush=True,
            )
        if now - saved > save_every * 60:
            saved = now
            save(model, tokenizer, out)
    save(model, tokenizer, out)
    print(f"{step} steps, {step * TOKENS_PER_STEP / 1e6:.1f} M tokens, last loss {mean:.4f}, in {out}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory of the model, replaced file by file")
    parser.add_argument("--minutes", type=float, default=40.0, help="wall-clock time of the training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--save-every", type=float, default=5.0, help="minutes between checkpoints")
    parser.add_argument("--start", type=Path, help="continue from this model directory")
    options = vars(parser.parse_args())
    train(options.pop("out"), options.pop("minutes"), **options)


if __name__ == "__main__":
    main()
