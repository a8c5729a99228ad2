"""`raytier bench MODEL`: how fast a model really is here, beside what the planner predicted (spec C5)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from raytier.cli.plan import model_config
from raytier.cli.render import duration, rate, size
from raytier.config import AppConfig
from raytier.errors import ConfigurationError, RaytierError
from raytier.planner.cost import PROMPT_TOKENS, predict_step, sweep_of
from raytier.planner.plan import Prediction, WeightPlan

if TYPE_CHECKING:
    from raytier.cli.decoding import DecodeWindow


@dataclass(frozen=True)
class BenchResult:
    """What was measured of one model: decode windows with the prediction for each, and the first token of a prompt."""

    plan: WeightPlan
    windows: tuple[tuple[Prediction, DecodeWindow], ...]
    first_token_seconds: float

    def as_dict(self) -> dict[str, Any]:
        return {
            "streamed_bytes_per_step": self.plan.streamed_bytes,
            "resident_bytes": self.plan.devices[0].resident_bytes,
            "first_token": {
                "prompt_tokens": PROMPT_TOKENS,
                "predicted_seconds": self.plan.first_token_seconds,
                "seconds": self.first_token_seconds,
            },
            "steps": [
                {
                    "batch": window.batch,
                    "context": window.context,
                    "predicted_seconds": prediction.seconds,
                    "seconds": window.step_seconds,
                    "tokens_per_second": window.tokens_per_second,
                    "streamed_bytes_per_second": window.streamed_per_second,
                }
                for prediction, window in self.windows
            ],
        }


def bench(
    model: Annotated[str, typer.Argument(help="Model directory, builtin:demo, or a model_id of --config.")],
    config: Annotated[Path | None, typer.Option(help="Serve YAML; the args of its first application count.")] = None,
    device_mb: Annotated[float | None, typer.Option(help="Cap of the device budget (tiers.device.max_mb).")] = None,
    host_mb: Annotated[float | None, typer.Option(help="Cap of the host pool (tiers.host.max_mb).")] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes to decode with.")] = "1,8,32",
    context: Annotated[int, typer.Option(min=1, help="Tokens that each sequence has behind it.")] = 128,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time to decode for, per batch size.")] = 3.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Load a model on this machine, decode with it, and show what was predicted beside what was measured."""
    errors = Console(stderr=True, highlight=False)
    try:
        batches = _batches(batch)
        settings = _settings(model_config(model, config, device_mb, host_mb), batches, context)
        with _quiet():
            result = run_bench(errors, settings, batches, context, seconds)
    except RaytierError as error:
        errors.print(f"[bold red]Error:[/] {escape(error.message)}", soft_wrap=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(result.as_dict(), indent=2))
    else:
        render_bench(Console(highlight=False), result)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without log lines: what the plan warns of is shown with the result."""
    logger = logging.getLogger("raytier")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def run_bench(
    console: Console, config: AppConfig, batches: tuple[int, ...], context: int, seconds: float
) -> BenchResult:
    """Load the model of `config`, measure, and end everything again.

    Raises:
        RaytierError: the model cannot be planned or loaded, or died.
    """
    from raytier.cli.decoding import measure_decode, measure_first_token
    from raytier.llm import LLM

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Loading", total=len(batches) + 2)
        sections = config.model_dump(exclude={"models", "startup_model"})
        with LLM(config.models[0].source_path, **sections) as llm:
            bar.update(task, advance=1, description="First token")
            first = measure_first_token(llm, min(PROMPT_TOKENS, llm.manifest.max_context - 1))
            windows = []
            for number in batches:
                bar.update(task, advance=1, description=f"Decoding at batch {number}")
                window = measure_decode(llm, number, context=context, seconds=seconds)
                sweep = sweep_of(llm.manifest, llm.plan)
                windows.append((predict_step(sweep, llm.rates, number, window.context), window))
            return BenchResult(llm.plan, tuple(windows), first)


def render_bench(console: Console, result: BenchResult) -> None:
    """Print the windows, predicted beside measured."""
    plan = result.plan
    device = plan.devices[0]
    console.print(
        f"{device.kind}: {size(device.resident_bytes)} resident, {size(plan.host_bytes)} in the host pool, "
        f"{size(plan.streamed_bytes)} streamed per step through a ring of {size(device.ring_bytes)}"
    )
    columns = ("batch", "predicted step", "measured step", "off by", "predicted tokens/s", "measured tokens/s")
    table = Table(*columns, "streamed", title="Decoding", title_justify="left")
    for prediction, window in result.windows:
        table.add_row(
            str(window.batch),
            duration(prediction.seconds),
            duration(window.step_seconds),
            f"{window.step_seconds / prediction.seconds - 1:+.0%}",
            f"{prediction.tokens_per_second:.3g}",
            f"{window.tokens_per_second:.3g}",
            rate(window.streamed_per_second) if plan.streamed_bytes else "-",
        )
    console.print(table)
    context = max((window.context for _, window in result.windows), default=0)
    console.print(
        f"Each sequence with about {context} tokens of context; first token of a {PROMPT_TOKENS}-token prompt after "
        f"{duration(result.first_token_seconds)}, predicted {duration(plan.first_token_seconds)}."
    )
    for warning in plan.warnings:
        console.print(f"[yellow]![/] {escape(warning)}")


def _batches(text: str) -> tuple[int, ...]:
    try:
        batches = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        batches = ()
    if not batches or min(batches) < 1:
        raise ConfigurationError(f"--batch {text}: give whole numbers from 1 up, separated by commas, like 1,8,32")
    return batches


def _settings(config: AppConfig, batches: tuple[int, ...], context: int) -> AppConfig:
    """`config` with KV and places for every batch, so that the largest one does not wait for the smallest's memory."""
    most = max(batches)
    # The sequences that come first decode while the prompts of the last ones are read.
    kv = config.kv.model_copy(update={"expected_sequences": most, "expected_context": 2 * context})
    scheduler = config.scheduler.model_copy(update={"max_num_seqs": max(most, config.scheduler.max_num_seqs)})
    return config.model_copy(update={"kv": kv, "scheduler": scheduler})
