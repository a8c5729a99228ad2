"""Measures the demo model on held-out phrasings: `python -m raytier.demo.evaluate [--model DIR]`."""

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Final, cast

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from raytier.demo import model_path
from raytier.demo.corpus import Corpus, Message, Question, normalise, story
from raytier.demo.train import TURN_END, encode

BATCH: Final = 48


def load(model_dir: Path) -> tuple[PreTrainedTokenizerFast, LlamaForCausalLM]:
    """Tokenizer and model as any user of transformers loads them."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    return cast(PreTrainedTokenizerFast, tokenizer), cast(LlamaForCausalLM, model)


def answers(
    tokenizer: PreTrainedTokenizerFast,
    model: LlamaForCausalLM,
    chats: Sequence[Sequence[Message]],
    max_new_tokens: int = 192,
) -> list[str]:
    """Greedy answers; every special token but the one that ends the turn stays visible."""
    prompts = [
        str(
            tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in chat],
                tokenize=False,
                add_generation_prompt=True,
            )
        )
        for chat in chats
    ]
    found: list[str] = []
    for begin in range(0, len(prompts), BATCH):
        inputs = tokenizer(prompts[begin : begin + BATCH], return_tensors="pt", padding=True)
        with torch.inference_mode():
            output = model.generate(  # type: ignore[misc]
                input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=max_new_tokens
            )
        for row in output[:, inputs["input_ids"].shape[1] :]:
            text = str(tokenizer.decode(row))
            found.append(text.split(TURN_END)[0] if TURN_END in text else f"{text} (unfinished)")
    return found


def is_right(question: Question, answer: str) -> bool:
    """Whether the answer is the expected one; a story has to begin with its subject and to end."""
    if question.subject is None:
        return normalise(answer) == normalise(question.answer)
    first = answer.split(" named ")[0]
    return (
        first.startswith("Once upon a time there was a") and question.subject in first and answer.endswith("The end.")
    )


def held_out_loss(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, questions: Sequence[Question]) -> float:
    """Mean loss in nats per token of the expected answers."""
    rng = random.Random(0)
    total, tokens = 0.0, 0
    for question in questions:
        expected = question.answer if question.subject is None else story(rng, question.subject)
        ids, _ = encode(tokenizer, (*question.messages, Message("assistant", expected)))
        start = len(encode(tokenizer, question.messages)[0]) - 1 + len(tokenizer.encode("assistant\n")) + 1
        row = torch.tensor(ids[:-2])  # without the newline and the end of the text
        with torch.inference_mode():
            logits = model(input_ids=row[None]).logits[0, start - 1 : -1].float()
        total += float(functional.cross_entropy(logits, row[start:], reduction="sum"))
        tokens += len(row) - start
    return total / tokens


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=model_path())
    parser.add_argument("--per-category", type=int, default=150, help="most questions of one category")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes-trained", type=float, help="kept in the report")
    parser.add_argument("--show", type=int, default=0, help="print so many wrong answers of each category")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer, model = load(options.model)
    # Short answers first: a batch runs until its longest answer ends, and stories (no single answer) are the longest.
    questions = sorted(
        Corpus().held_out(options.per_category), key=lambda question: len(question.answer) or sys.maxsize
    )
    found = answers(tokenizer, model, [question.messages for question in questions])
    right: dict[str, list[bool]] = defaultdict(list)
    wrong: dict[str, list[str]] = defaultdict(list)
    for question, answer in zip(questions, found, strict=True):
        good = is_right(question, answer)
        right[question.category].append(good)
        if not good:
            expected = question.answer or f"a story about {question.subject}"
            wrong[question.category].append(f"  {question.messages[-1].content!r}: {answer!r}, not {expected!r}")
    loss = held_out_loss(tokenizer, model, questions)
    marks = [good for goods in right.values() for good in goods]
    print(f"{'category':<12} {'right':>5} {'of':>5} {'share':>7}")
    for category, goods in sorted(right.items()):
        print(f"{category:<12} {sum(goods):>5} {len(goods):>5} {sum(goods) / len(goods):>7.1%}")
        print(*wrong[category][: options.show], sep="\n", end="\n" if options.show and wrong[category] else "")
    print(f"{'all':<12} {sum(marks):>5} {len(marks):>5} {sum(marks) / len(marks):>7.1%}")
    print(f"held-out loss {loss:.4f} nats per answer token")
    report = {
        "held_out_loss_nats_per_token": round(loss, 4),
        "share_right": round(sum(marks) / len(marks), 4),
        "questions": len(marks),
        "categories": {
            category: {"share_right": round(sum(goods) / len(goods), 4), "questions": len(goods)}
            for category, goods in sorted(right.items())
        },
        "parameters": model.num_parameters(),
        "minutes_trained": options.minutes_trained,
    }
    (options.model / "EVALUATION.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
