"""`raytier transfer LAYER_OR_PARAMETER DEST`: move weights of a running server to another tier (spec D5, I4)."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from raytier.cli.render import duration, size
from raytier.errors import RaytierError

_TIMEOUT_S = 30.0
#: How often the status is asked for while waiting.
_POLL_S = 0.1


def transfer(
    what: Annotated[
        str,
        typer.Argument(metavar="LAYER_OR_PARAMETER", help="Number of a decoder layer, or the name of a parameter."),
    ],
    destination: Annotated[str, typer.Argument(metavar="DEST", help="cpu or host, gpu:N or device:N, ramdisk, nvme.")],
    url: Annotated[str, typer.Option(help="Where the server answers, its route prefix included.")] = (
        "http://127.0.0.1:8000"
    ),
    priority: Annotated[int, typer.Option(help="1 goes first, 10 last.")] = 5,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until it has ended; exit with 1 if it failed.")] = False,
) -> None:
    """Move a decoder layer, or one parameter, of a running server to another tier. Generation goes on meanwhile."""
    errors = Console(stderr=True, highlight=False)
    target = {"layer_index": int(what)} if what.isdecimal() else {"layer_id": what}
    body = {**target, "destination_device": destination, "priority": priority}
    base = url.rstrip("/") + "/api/layers/transfer"
    try:
        accepted = _call(base, body)
        typer.echo(f"{accepted['message']} (transfer {accepted['transfer_id']})")
        if not wait:
            typer.echo(f"its status: {base}/{accepted['transfer_id']}")
            return
        with errors.status("pending") as line:
            while (status := _call(f"{base}/{accepted['transfer_id']}"))["status"] not in ("completed", "failed"):
                line.update(f"{status['status']}: {escape(what)} from {status['source']} to {status['destination']}")
                time.sleep(_POLL_S)
    except RaytierError as error:
        errors.print(f"[bold red]Error:[/] {escape(error.message)}", soft_wrap=True)
        raise typer.Exit(1) from None
    if status["status"] == "failed":
        errors.print(f"[bold red]failed:[/] {escape(status['reason'])}", soft_wrap=True)
        raise typer.Exit(1)
    typer.echo(status["reason"] or f"completed: {size(status['nbytes'])} in {duration(status['seconds'])}")


def _call(url: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """GET `url`, or POST `body` to it, as JSON; with the key that the environment has.

    Raises:
        RaytierError: what the server says is wrong, or that there is none.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("RAYTIER_ADMIN_KEY") or os.environ.get("RAYTIER_API_KEY"):
        headers["X-API-Key"] = key.split()[0]
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            content: dict[str, Any] = json.load(answer)
            return content
    except urllib.error.HTTPError as error:
        raise RaytierError(_said(error)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RaytierError(f"{url} does not answer as raytier does: {reason}; is --url right?") from None


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.url} answers {error.code} {error.reason}; is --url right?"
