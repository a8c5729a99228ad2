"""docs/architectures.md: what raytier does with every architecture. `python -m tests.architectures.table` writes it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers

from tests.architectures.catalogue import STATED, Verdict, flagged, judge
from tests.models import save_tokenizer

PATH = Path(__file__).parents[2] / "docs" / "architectures.md"

_HEAD = """\
# Architectures

Every causal language model of transformers {version} whose class supports the attention interface, as transformers
lists them: {identical} are token-identical with `transformers`, {refused} are refused when a model is planned. Each one
was built tiny and random in fp32 from its default config, and generated greedily for a packed batch, in chunks, with
half of its layers streamed from disk. A checkpoint may differ from the default config of its type; whatever it asks for
that raytier does not run is refused with the reason, before anything is loaded.

`tests/architectures` holds this table true; after a change write it anew with `python -m tests.architectures.table`.

| model type | class | |
| --- | --- | --- |
"""


def row(verdict: Verdict) -> str:
    """A line of the table."""
    if verdict.refused is None:
        stated = ", ".join(STATED.get(verdict.model_type, {}))
        said = f"identical, with {stated} as checkpoints state" if stated else "identical"
    else:
        reason = verdict.refused.partition(" Nearest supported:")[0].removesuffix(".")
        said = "refused: " + reason.removeprefix(f"{verdict.architecture}: ").removeprefix(f"{verdict.model_type}: ")
    return f"| {verdict.model_type} | {verdict.architecture} | {said.replace('|', '/')} |"


def render(verdicts: Iterable[Verdict]) -> str:
    """The whole document."""
    verdicts = list(verdicts)
    refused = sum(verdict.refused is not None for verdict in verdicts)
    head = _HEAD.format(version=transformers.__version__, identical=len(verdicts) - refused, refused=refused)
    return head + "".join(row(verdict) + "\n" for verdict in verdicts)


def documented() -> dict[str, str]:
    """The lines of the table by model type."""
    rows = [line for line in PATH.read_text().splitlines() if line.startswith("| ")][2:]
    return {line.split("|")[1].strip(): line for line in rows}


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    verdicts = []
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = Path(directory) / "tokenizer"
        save_tokenizer(tokenizer)
        for model_type in flagged():
            verdicts.append(judge(model_type, Path(directory) / model_type, tokenizer))
    PATH.parent.mkdir(exist_ok=True)
    PATH.write_text(render(verdicts))


if __name__ == "__main__":
    main()
