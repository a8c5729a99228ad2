"""What precisions cost in quality: next-token loss of the trained demo model, and relative errors of weights.

What runs: `raytier/demo/model` (4 M parameters, bf16, trained) on the expected answers to its held-out questions, with
every linear layer and the output head in one form and computed by raytier's own kernels, as a CPU device does; the rest
is transformers. The loss is in nats per token of the answers. A small model suffers more than a large one.

- loss.FORM: the loss with FORM / the loss with the checkpoint's own weights, where 1 is no loss of quality. No gate.
- Beside it the norm of the error over that of the weights, of the model's matrices and of normally distributed ones.

Why it is fair: the same questions, code and kernels for all; `source` goes through the same linear layers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from raytier.codecs import scheme
from raytier.codecs.forms import FORMS, Form
from raytier.demo import model_path
from raytier.demo.corpus import Corpus, Question
from raytier.demo.evaluate import held_out_loss, load
from raytier.execution import cpu_kernels, linears
from raytier.execution.formed import FormedWeight

LOSSY = ("int8", "int8-dynamic", "int4-32", "int4-64", "int4-128")


@dataclass(frozen=True)
class Quality:
    """Loss in nats per token, mean relative error of the model's matrices, bits per weight of these."""

    loss: float
    error: float
    bits: float


def measure(form: Form | None, questions: list[Question]) -> Quality:
    """The demo model with all linear layers in `form`; None: as in the checkpoint."""
    tokenizer, model = load(model_path())
    model = model.to(torch.bfloat16)
    squares = np.zeros(2)
    nbytes = elements = 0
    for module in model.modules():
        if type(module) is not nn.Linear:
            continue
        weight = module.weight.detach()
        linears.adopt(module)
        elements += weight.numel()
        if form is None:
            nbytes += weight.nbytes
            continue
        shape = (weight.shape[0], weight.shape[1])
        data = form.encode(weight.contiguous().view(torch.uint8).numpy().reshape(-1), "bfloat16", shape)
        nbytes += data.nbytes
        exact = weight.float().numpy()
        squares += np.square(form.decode(data, shape) - exact).sum(), np.square(exact).sum()
        module.__dict__["formed"] = FormedWeight(form, torch.from_numpy(data), shape, weight.dtype)
    error = float(np.sqrt(squares[0] / squares[1])) if form is not None else 0.0
    return Quality(held_out_loss(tokenizer, model, questions), error, 8 * nbytes / elements)


def main() -> None:
    parser = argparse.ArgumentParser(description="Loss of the demo model in every precision.")
    parser.add_argument("--quick", action="store_true", help="15 questions of a category instead of 150")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--threads", type=int, default=1, help="the model is too small for more")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    questions = Corpus().held_out(15 if arguments.quick else 150)
    with tempfile.TemporaryDirectory(prefix="raytier-quality-") as cache:
        cpu_kernels.use(cache)
        scheme.use_kernels(cache)
        source = measure(None, questions)
        found = {name: measure(FORMS[name], questions) for name in LOSSY}
    columns = ("precision", "bits per weight", "loss", "over source", "error", "error, normal weights")
    table = Table(*columns, title=f"Demo model, {len(questions)} held-out questions")
    table.add_row("source (bf16)", f"{source.bits:.2f}", f"{source.loss:.4f}", "1", "0", "0")
    for name, q in found.items():
        typical = FORMS[name].typical_error("bfloat16")
        ratio = f"{q.loss / source.loss:.3f}"
        table.add_row(name, f"{q.bits:.2f}", f"{q.loss:.4f}", ratio, f"{q.error:.2%}", f"{typical:.2%}")
    Console(width=110).print(table)
    if arguments.json:
        unit = "x loss of source"
        rows = {f"loss.{name}": {"value": round(q.loss / source.loss, 4), "unit": unit} for name, q in found.items()}
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
