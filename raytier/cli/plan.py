"""`raytier plan MODEL`: where everything would live and how fast it would be, before anything is loaded (spec C5)."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.markup import escape

from raytier.cli.measuring import machine_rates
from raytier.cli.render import render_plan
from raytier.config import AppConfig, parse_config
from raytier.errors import ConfigurationError, RaytierError
from raytier.hardware.inventory import take_inventory
from raytier.hardware.machine import Machine
from raytier.hardware.rates import default_rates
from raytier.model_entry import BUILTIN_DEMO, ModelEntry
from raytier.planner.budgets import Budgets, DeviceKind, node_budgets, planned_paths, resolve_kind
from raytier.planner.placement import plan_weights
from raytier.planner.plan import ResourcePlan, TierSchemes, WeightPlan
from raytier.planner.resources import plan_resources
from raytier.sources.loader import Loaders
from raytier.sources.registry import Registry

if TYPE_CHECKING:
    from raytier.checkpoint.manifest import ModelManifest


@dataclass(frozen=True)
class Planned:
    """A plan and everything that it was made from."""

    manifest: ModelManifest
    machine: Machine
    config: AppConfig
    kind: DeviceKind
    budgets: Budgets
    weights: WeightPlan
    resources: ResourcePlan


def plan(
    model: Annotated[
        str, typer.Argument(help="Model directory, builtin:demo, or a model_id of --config. A config.json is enough.")
    ],
    machine: Annotated[Path | None, typer.Option(help="Plan for the machine described in this JSON file.")] = None,
    config: Annotated[Path | None, typer.Option(help="Serve YAML; the args of its first application count.")] = None,
    device_mb: Annotated[float | None, typer.Option(help="Cap of the device budget (tiers.device.max_mb).")] = None,
    host_mb: Annotated[float | None, typer.Option(help="Cap of the host pool (tiers.host.max_mb).")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine again, ignore the cache.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Show where every parameter would live and how fast the model would run, without loading it."""
    errors = Console(stderr=True, highlight=False)
    try:
        planned = _plan(errors, model, machine, config, device_mb, host_mb, measure)
    except RaytierError as error:
        errors.print(f"[bold red]Error:[/] {escape(error.message)}", soft_wrap=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(json.dumps(_as_dict(planned), indent=2))
    else:
        render_plan(Console(highlight=False), planned.manifest, planned.machine, planned.budgets, planned.weights)


def _plan(
    console: Console,
    model: str,
    machine_file: Path | None,
    config_file: Path | None,
    device_mb: float | None,
    host_mb: float | None,
    measure: bool,
) -> Planned:
    config = model_config(model, config_file, device_mb, host_mb)
    entry = config.models[0]
    directory = Loaders(config).find(entry)
    if directory is None:
        raise ConfigurationError(
            f"{model}: its files are not here yet: load it once on a server, or give a directory with its config.json"
        )
    with console.status(f"Describing {escape(model)}"):
        manifest, config = _describe(directory, entry, config)
    if machine_file is not None:
        machine = Machine.from_json(_read(machine_file))
        kind = resolve_kind(machine.inventory, config)
        rates = machine.rates_for(kind)
    else:
        inventory = take_inventory(planned_paths(config, directory))
        kind = resolve_kind(inventory, config)
        rates = default_rates(kind)
        if manifest.files:
            largest = max(manifest.files, key=lambda file: file.size).path
            dtype = manifest.compute_dtype
            rates = machine_rates(console, largest, dtype, config, kind, inventory.cpus, refresh=measure)
        machine = Machine(inventory)
    machine = Machine(machine.inventory, rates)
    weights = plan_weights(manifest, machine.inventory, rates, config, kind=kind)
    budgets = node_budgets(machine.inventory, config, kind)
    return Planned(manifest, machine, config, kind, budgets, weights, plan_resources(weights, machine.inventory))


def model_config(model: str, file: Path | None, device_mb: float | None, host_mb: float | None) -> AppConfig:
    """The file's configuration (or the defaults) for `model`, with the command line's caps.

    Args:
        model: id of a model of the file, a directory, or the id of a Hugging Face model.
    """
    args: dict[str, Any] = _application_args(file) if file is not None else {}
    known = Registry.of(parse_config(args)).entries if args.get("models") or args.get("registry") else ()
    named = [entry for entry in known if entry.model_id == model]
    args["models"] = [named[0].model_dump(exclude_unset=True)] if named else [_unnamed(model)]
    args.pop("startup_model", None)
    args.pop("registry", None)
    for tier, megabytes in (("device", device_mb), ("host", host_mb)):
        if megabytes is not None:
            tiers = dict(args.get("tiers") or {})
            tiers[tier] = {**(tiers.get(tier) or {}), "max_mb": megabytes}
            args["tiers"] = tiers
    return parse_config(args)


def _unnamed(model: str) -> dict[str, str]:
    """An entry for a model that no configuration names."""
    path = model if model == BUILTIN_DEMO else os.path.abspath(model)
    model_id = os.path.basename(path.rstrip("/")) or "model"
    if model != BUILTIN_DEMO and not os.path.exists(path) and re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        source = {"source_type": "huggingface", "source_path": model}
    else:
        source = {"source_type": "local", "source_path": path}
    return {"model_id": model_id, "model_format": "transformers_pt", **source}


def read_config(file: Path) -> AppConfig:
    """The configuration of the first application of a Serve YAML.

    Raises:
        ConfigurationError: the file cannot be read, or names no application, or a key is wrong.
    """
    return parse_config(_application_args(file))


def _application_args(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(_read(file))
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{file} is not YAML: {error}") from None
    try:
        return dict(content["applications"][0].get("args") or {})
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ConfigurationError(f"{file} is no Serve configuration: it has no applications[0].args") from None


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{file} cannot be read: {error}") from None


def _describe(directory: str, entry: ModelEntry, config: AppConfig) -> tuple[ModelManifest, AppConfig]:
    """Manifest, and the configuration with the model's own wishes. Imports torch and transformers."""
    from raytier.checkpoint.describe import describe_config, describe_entry
    from raytier.checkpoint.quantisation import quantised

    weights = (".safetensors", ".safetensors.index.json", ".bin", ".gguf")
    if any(name.endswith(weights) for name in os.listdir(directory)):
        description = describe_entry(entry, directory)
        return description.manifest, description.configure(config)
    return describe_config(directory), quantised(config, entry.quantization_bits)


def _as_dict(planned: Planned) -> dict[str, Any]:
    weights = asdict(replace(planned.weights, schemes=TierSchemes()))  # the placements say what is of interest
    for prediction, record in zip(planned.weights.predictions, weights["predictions"], strict=True):
        record["tokens_per_second"] = prediction.tokens_per_second
    return {
        "model": {
            "directory": planned.manifest.model_dir,
            "architecture": planned.manifest.architecture,
            "nbytes": planned.manifest.nbytes,
            "compute_dtype": planned.manifest.compute_dtype,
        },
        "machine": asdict(planned.machine),
        "budgets": asdict(planned.budgets),
        "plan": weights,
        "resources": asdict(planned.resources),
    }
