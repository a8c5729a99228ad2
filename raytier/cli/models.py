"""`raytier models`: the models of a running server, or those of a models.yaml (spec E3, E4, I4)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer
import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raytier.cli.client import LOCAL, Url, call, pause
from raytier.cli.render import duration, size
from raytier.errors import ConfigurationError, RaytierError
from raytier.model_entry import ModelEntry
from raytier.sources.registry import Registry, parse_entry, read_models

models = typer.Typer(no_args_is_help=True, help="The models of a running server, or of a models.yaml.")

#: A model's requests come to their end first, and its files may have to be read.
_LONG_S = 3600.0

_Model = Annotated[str, typer.Argument(metavar="MODEL", help="Id of a model, or its path.")]
_File = Annotated[
    Path | None, typer.Option("--registry", help="A models.yaml, which is read or changed without a server.")
]
_Cancel = Annotated[bool, typer.Option("--cancel", help="End requests that run; else they come to their end first.")]
_Wait = Annotated[bool, typer.Option("--wait", help="Wait until it is loaded; exit with 1 if that failed.")]


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except RaytierError as error:
        Console(stderr=True, highlight=False).print(f"[bold red]Error:[/] {escape(error.message)}", soft_wrap=True)
        raise typer.Exit(1) from None


@models.command("list")
def list_(registry: _File = None, url: Url = LOCAL) -> None:
    """Show every model: where it comes from, its state and its device."""
    with _errors():
        table = Table("model", "source", "path", "state", "device")
        if registry is not None:
            rows = [(e.model_id, e.source_type, e.source_path, "-", e.device_preference) for e in _read(registry)]
        else:
            rows = [
                (m["model_id"], m["source_type"], m["config"]["source_path"], m["status"], m["device"])
                for m in call(_at(url))
            ]
        for row in rows:
            table.add_row(*map(escape, row))
        Console(highlight=False).print(table if rows else "there are no models")


@models.command()
def show(model: _Model, registry: _File = None, url: Url = LOCAL) -> None:
    """Show a model's entry and, of a server, its state."""
    with _errors():
        if registry is not None:
            entries = Registry(_read(registry), str(registry), startup=None)
            said: dict[str, Any] = entries.get(entries.resolve(model)).public()
        else:
            status = _status(url, model)
            known = {each["model_id"]: each["config"] for each in call(_at(url))}
            state = {name: value for name, value in status.items() if name != "model_name" and value is not None}
            said = known[status["model_name"]] | {"state": state}
        typer.echo(yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=4096).rstrip())


@models.command()
def register(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Id under which it is to be known.")],
    path: Annotated[str, typer.Argument(help="Directory, builtin:demo, or what its source calls it (org/name).")],
    source_type: Annotated[str, typer.Option(help="local, huggingface, or what a loader was registered for.")] = (
        "local"
    ),
    model_format: Annotated[str, typer.Option(help="safetensors or transformers_pt.")] = "safetensors",
    fields: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A further field; may be given again.")
    ] = None,
    persist: Annotated[
        bool, typer.Option(help="Have the server write it to its models.yaml; else it is known until the server ends.")
    ] = True,
    registry: _File = None,
    url: Url = LOCAL,
) -> None:
    """Add a model, or change one; takes effect when it is loaded next."""
    with _errors():
        entry = {"model_id": model, "source_type": source_type, "source_path": path, "model_format": model_format}
        entry |= _given(fields or ())
        if registry is not None:
            if not persist:
                raise ConfigurationError("--no-persist is for servers: --registry names a file, which is changed")
            changed = Registry(_read(registry), str(registry), startup=None).put(parse_entry(entry), persist=True)
        else:
            changed = call(_at(url, "register"), {"model": entry, "persist": persist})["changed"]
        typer.echo(f"{model} is registered" if changed else f"{model} was registered so already")


@models.command()
def load(
    model: _Model,
    url: Url = LOCAL,
    force_reload: Annotated[bool, typer.Option("--force-reload", help="Load it anew when it is loaded.")] = False,
    token_env: Annotated[
        str | None, typer.Option(help="Variable of this environment with a token for the model's source.")
    ] = None,
    wait: _Wait = False,
) -> None:
    """Load a model, or wake it."""
    with _errors():
        body: dict[str, Any] = {"model_name_or_path": model, "force_reload": force_reload}
        if token_env is not None:
            if not (token := os.environ.get(token_env)):
                raise ConfigurationError(f"--token-env: there is no {token_env} in the environment")
            body["hf_token"] = token
        _begun(url, call(_at(url, "load"), body), wait=wait)


@models.command()
def wake(model: _Model, url: Url = LOCAL, wait: _Wait = False) -> None:
    """Wake a model that sleeps."""
    with _errors():
        _begun(url, call(_at(url, "wake"), {"model": model}), wait=wait)


@models.command()
def sleep(model: _Model, url: Url = LOCAL, cancel: _Cancel = False) -> None:
    """Put a model to sleep: its memory goes to others, a request wakes it."""
    _leave("sleep", model, url, cancel=cancel)


@models.command()
def unload(model: _Model, url: Url = LOCAL, cancel: _Cancel = False) -> None:
    """Unload a model; ends when everything of it is freed."""
    _leave("unload", model, url, cancel=cancel)


def _leave(operation: str, model: str, url: str, *, cancel: bool) -> None:
    with _errors():
        body = {"model": model, "mode": "cancel" if cancel else "drain"}
        typer.echo(call(_at(url, operation), body, _LONG_S)["message"])


def _begun(url: str, answer: Mapping[str, Any], *, wait: bool) -> None:
    """Say what has begun; wait for its end where that is wanted."""
    typer.echo(answer["message"])
    model = answer["model"]["model_name"]
    if not wait:
        return
    with Console(stderr=True, highlight=False).status("loading") as line:
        while (status := _status(url, model))["status"] == "loading":
            if progress := status["progress"]:
                left = progress["seconds_left"]
                rest = "" if left is None else f", {duration(left)} left"
                line.update(f"{size(progress['bytes_loaded'])} of {size(progress['bytes_total'])}{rest}")
            pause()
    if status["status"] != "loaded":
        raise RaytierError(status["error_message"] or f"{model} is not loaded: its state is {status['status']}")
    typer.echo(f"{model} is loaded")


def _status(url: str, model: str) -> dict[str, Any]:
    status: dict[str, Any] = call(f"{_at(url, 'status')}?model={quote(model, safe='')}")
    return status


def _at(url: str, operation: str = "") -> str:
    return f"{url.rstrip('/')}/api/models{operation and '/'}{operation}"


def _read(file: Path) -> list[ModelEntry]:
    return read_models(str(file))


def _given(fields: list[str] | tuple[str, ...]) -> dict[str, Any]:
    """Fields of `name=value`, values as in YAML."""
    found: dict[str, Any] = {}
    for field in fields:
        name, equals, value = field.partition("=")
        if not equals or not name:
            raise ConfigurationError(f"--set {field!r}: FIELD=VALUE is needed")
        try:
            found[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ConfigurationError(f"--set {name}: {value!r} is not YAML: {' '.join(str(error).split())}") from None
    return found
