"""The `raytier` command."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from raytier.cli.bench import bench
from raytier.cli.doctor import doctor
from raytier.cli.models import models
from raytier.cli.plan import plan
from raytier.cli.store import store
from raytier.cli.transfer import transfer

app = typer.Typer(
    name="raytier",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
app.command()(plan)
app.command()(doctor)
app.command()(bench)
app.command()(transfer)
app.add_typer(models, name="models")
app.add_typer(store, name="store")


def _show_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"raytier {version('raytier')}")
        except PackageNotFoundError:
            typer.echo("raytier (run from a source tree that is not installed)")
        raise typer.Exit


@app.callback()
def _main(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Serve Hugging Face models that are larger than the fastest memory of the machine."""
