"""`raytier store`: what has been converted for disk tiers, whether it is sound, and what is not needed any more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from raytier.cli.plan import read_config
from raytier.cli.render import size
from raytier.config import AppConfig, parse_config
from raytier.errors import RaytierError
from raytier.tiers.store_care import StoreCare

store = typer.Typer(no_args_is_help=True, help="Parameters that were converted or compressed for the disk tier.")

_Directories = Annotated[
    list[Path] | None, typer.Option("--dir", help="Directory that holds a raytier-store; may be given again.")
]
_Config = Annotated[Path | None, typer.Option(help="Serve YAML, whose tiers and cache_dir are looked at.")]


@contextmanager
def _opened(directories: list[Path] | None, file: Path | None) -> Iterator[tuple[Console, StoreCare]]:
    try:
        places = [os.path.abspath(path) for path in directories] if directories else _places(file)
        with closing(StoreCare(places)) as care:
            yield Console(highlight=False), care
    except RaytierError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]Error:[/] {escape(error.message)}", soft_wrap=True)
        raise typer.Exit(1) from None


def _places(file: Path | None) -> list[str]:
    demo = {"models": [{"model_id": "demo", "source_path": "builtin:demo"}]}
    config: AppConfig = read_config(file) if file is not None else parse_config(demo)
    return [*config.tiers.nvme.paths, os.path.join(config.cache_dir, "store")]


@store.command("list")
def list_(directory: _Directories = None, config: _Config = None) -> None:
    """Show the models, their schemes and sizes."""
    with _opened(directory, config) as (console, care):
        table = Table("model", "schemes", "parameters", "size", "source")
        for model in care.models():
            schemes = ", ".join(sorted({entry.scheme.rpartition("/")[0] for entry in model.entries}))
            state = "as it was" if model.stale is None else model.stale
            table.add_row(escape(model.model_dir), schemes, str(len(model.entries)), size(model.nbytes), escape(state))
        console.print(table if table.row_count else "nothing is stored")


@store.command()
def verify(
    directory: _Directories = None,
    config: _Config = None,
    remove: Annotated[bool, typer.Option("--remove", help="Remove what is damaged: it will be made anew.")] = False,
) -> None:
    """Read everything and check it; exit status 2 when something is damaged."""
    with _opened(directory, config) as (console, care):
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("checking", total=None)
            found = care.verify(lambda done, total: bar.update(task, completed=done, total=total))
        for model, entry, problem in found:
            console.print(f"{escape(model.model_dir)}: {escape(entry.name)}: {escape(problem)}", soft_wrap=True)
        console.print(f"{len(found)} damaged" if found else "everything is as it was written")
        if found and remove:
            removed = care.remove([entry for _, entry, _ in found])
            console.print(f"removed {removed.files} files, {size(removed.nbytes)}")
    if found:
        raise typer.Exit(2)


@store.command()
def prune(
    directory: _Directories = None,
    config: _Config = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove all there is.")] = False,
) -> None:
    """Remove what no model uses any more: its source is gone or has changed, or raytier has."""
    with _opened(directory, config) as (console, care):
        removed = care.prune(everything)
        console.print(f"removed {removed.files} files, {size(removed.nbytes)}")
