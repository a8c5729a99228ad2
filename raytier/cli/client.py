"""Calls to the API of a running server, with the key that the environment has."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from typing import Annotated, Any

import typer

from raytier.errors import RaytierError

_TIMEOUT_S = 30.0
#: How often a status is asked for while waiting.
_POLL_S = 0.1

#: The option of every command that asks a server.
Url = Annotated[str, typer.Option(help="Where the server answers, its route prefix included.")]
LOCAL = "http://127.0.0.1:8000"


def call(url: str, body: dict[str, Any] | None = None, timeout_s: float = _TIMEOUT_S) -> Any:
    """GET `url`, or POST `body` to it, as JSON.

    Raises:
        RaytierError: what the server says is wrong, or that there is none.
    """
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("RAYTIER_ADMIN_KEY") or os.environ.get("RAYTIER_API_KEY"):
        headers["X-API-Key"] = key.split()[0]
    request = urllib.request.Request(url, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise RaytierError(_said(error)) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RaytierError(f"{url} does not answer as raytier does: {reason}; is --url right?") from None


def pause() -> None:
    """Between two looks at a status."""
    time.sleep(_POLL_S)


def _said(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{error.url} answers {error.code} {error.reason}; is --url right?"
