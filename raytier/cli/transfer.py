"""`raytier transfer LAYER_OR_PARAMETER DEST`: move weights of a running server to another tier (spec D5, I4)."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from raytier.cli.client import LOCAL, Url, call, pause
from raytier.cli.render import duration, size
from raytier.errors import RaytierError


def transfer(
    what: Annotated[
        str,
        typer.Argument(metavar="LAYER_OR_PARAMETER", help="Number of a decoder layer, or the name of a parameter."),
    ],
    destination: Annotated[str, typer.Argument(metavar="DEST", help="cpu or host, gpu:N or device:N, ramdisk, nvme.")],
    url: Url = LOCAL,
    priority: Annotated[int, typer.Option(help="1 goes first, 10 last.")] = 5,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has ended; exit with 1 if it failed.")] = False,
) -> None:
    """Move a decoder layer, or one parameter, of a running server to another tier. Generation goes on meanwhile."""
    errors = Console(stderr=True, highlight=False)
    target = {"layer_index": int(what)} if what.isdecimal() else {"layer_id": what}
    body = {**target, "destination_device": destination, "priority": priority}
    base = url.rstrip("/") + "/api/layers/transfer"
    try:
        accepted = call(base, body)
        typer.echo(f"{accepted['message']} (transfer {accepted['transfer_id']})")
        if not wait:
            typer.echo(f"its status: {base}/{accepted['transfer_id']}")
            return
        with errors.status("pending") as line:
            while (status := call(f"{base}/{accepted['transfer_id']}"))["status"] not in ("completed", "failed"):
                line.update(f"{status['status']}: {escape(what)} from {status['source']} to {status['destination']}")
                pause()
    except RaytierError as error:
        errors.print(f"[bold red]Error:[/] {escape(error.message)}", soft_wrap=True)
        raise typer.Exit(1) from None
    if status["status"] == "failed":
        errors.print(f"[bold red]failed:[/] {escape(status['reason'])}", soft_wrap=True)
        raise typer.Exit(1)
    typer.echo(status["reason"] or f"completed: {size(status['nbytes'])} in {duration(status['seconds'])}")
