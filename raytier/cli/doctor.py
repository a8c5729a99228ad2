"""`raytier doctor`: what this machine has, how fast it is, and what to mend (spec A1, A2)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from raytier.cli.measuring import machine_rates
from raytier.cli.plan import read_config
from raytier.cli.render import machine_table, rate, size
from raytier.config import AppConfig, parse_config
from raytier.errors import RaytierError, TierError
from raytier.execution.native import why_none
from raytier.hardware.checks import warnings
from raytier.hardware.disk_rates import measure_disk_read, probe_files
from raytier.hardware.inventory import Disk, nearest_existing, take_inventory
from raytier.hardware.machine import Machine
from raytier.hardware.rates import Rates
from raytier.planner.budgets import planned_paths, resolve_kind
from raytier.sources.local import local_directory
from raytier.sources.registry import Registry


def doctor(
    directory: Annotated[
        list[Path] | None, typer.Option("--dir", help="Directory to look at and to measure; may be given again.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="Serve YAML, whose tiers and cache_dir are looked at.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure again, ignore the cache.")] = False,
    dtype: Annotated[str, typer.Option(help="Compute dtype of the linear layers: bfloat16, float16, float32.")] = (
        "bfloat16"
    ),
    as_json: Annotated[
        bool, typer.Option("--json", help="The machine as `raytier plan --machine` reads it, instead of tables.")
    ] = False,
) -> None:
    """Look at this machine: memory, disks, GPUs, measured rates, and what keeps it from being faster."""
    errors = Console(stderr=True, highlight=False)
    try:
        settings, places = _places(directory or [], config)
        machine = _machine(errors, settings, places, dtype, measure)
    except RaytierError as error:
        errors.print(f"[bold red]Error:[/] {escape(error.message)}", soft_wrap=True)
        raise typer.Exit(1) from None
    if as_json:
        typer.echo(machine.to_json())
        return
    console = Console(highlight=False)
    console.print(machine_table(machine))
    assert machine.rates is not None
    console.print(_rates_table(machine.rates))
    console.print(_disks_table(machine, places, measured=places[0]))
    kernels = why_none()
    for warning in (*warnings(machine), *([kernels] if kernels else [])):
        console.print(f"[yellow]![/] {escape(warning)}")


def _places(directories: list[Path], file: Path | None) -> tuple[AppConfig, tuple[str, ...]]:
    """The configuration, and the paths to look at; the first one is where reading is measured."""
    if file is None:
        config = parse_config({"models": [{"model_id": "demo", "source_path": "builtin:demo"}]})
        model_dir = ""
    else:
        config = read_config(file)
        local = [entry for entry in Registry.of(config).entries if entry.source_type == "local"]
        model_dir = local_directory(local[0]) if local else ""
    named = [os.path.abspath(path) for path in directories]
    for path in named:
        if not os.path.isdir(path):
            raise TierError(f"{path} is not a directory: create it, or give another one with --dir")
    return config, tuple(dict.fromkeys([*named, *planned_paths(config, model_dir), config.cache_dir]))


def _machine(console: Console, config: AppConfig, places: tuple[str, ...], dtype: str, measure: bool) -> Machine:
    inventory = take_inventory([*places, "/dev/shm"])
    kind = resolve_kind(inventory, config)
    rates = machine_rates(console, nearest_existing(places[0]), dtype, config, kind, inventory.cpus, refresh=measure)
    return Machine(inventory, rates)


def _rates_table(rates: Rates) -> Table:
    table = Table("rate", "", title="Rates", title_justify="left", show_header=False)

    def row(name: str, value: float | None) -> None:
        if value is not None:
            table.add_row(name, rate(value))

    row("disk read", rates.disk_read_bytes_per_s)
    row("disk write", rates.disk_write_bytes_per_s)
    row("ramdisk read", rates.ramdisk_read_bytes_per_s)
    row("memory copy", rates.memory_copy_bytes_per_s)
    row("decoding (zstd-planes)", rates.decode_bytes_per_s)
    row("host to GPU", rates.host_to_device_bytes_per_s)
    row("GPU to host", rates.device_to_host_bytes_per_s)
    packed = dict(rates.packed_matrix_bytes_per_s or ())
    for rows, value in rates.matrix_bytes_per_s:
        beside = f", packed {rate(packed[rows])}" if rows in packed else ""
        table.add_row(f"linear layers, {rows} rows", f"{rate(value)} of weights{beside}")
    table.add_row("resident layers are packed", "yes, it pays" if rates.packed_pays else "no, it would not pay")
    row("attention", rates.attention_bytes_per_s)
    table.add_row("calls of a layer", _microseconds(rates.layer_seconds, rates.layer_sequence_seconds))
    table.add_row("calls of a step", _microseconds(rates.step_seconds, rates.step_sequence_seconds))
    table.add_row(
        "while reading and computing",
        f"{rates.overlap.reading:.0%} of the disk's rate, {rates.overlap.computing:.0%} of the linear layers'",
    )
    return table


def _microseconds(alone: float, further: float) -> str:
    return f"{alone * 1e6:.0f} us, {further * 1e6:.1f} us per further sequence"


def _disks_table(machine: Machine, places: tuple[str, ...], *, measured: str) -> Table:
    """Every path; those on another disk than the measured one are measured here, briefly."""
    assert machine.rates is not None
    table = Table("path", "filesystem", "free", "O_DIRECT", "read", "write", title="Disks", title_justify="left")
    disks = {disk.path: disk for disk in machine.inventory.disks}
    known: dict[str, tuple[float | None, float | None]] = {
        disks[measured].device: (machine.rates.disk_read_bytes_per_s, machine.rates.disk_write_bytes_per_s)
    }
    for disk in disks.values():
        if disk.device not in known and disk.path in places:
            known[disk.device] = _disk_rates(disk)
        read, write = known.get(disk.device, (None, None))
        table.add_row(
            escape(disk.path),
            disk.filesystem,
            size(disk.free_bytes),
            {True: "yes", False: "no", None: "unknown"}[disk.direct_io],
            "-" if read is None else rate(read),
            "-" if write is None else rate(write),
        )
    return table


def _disk_rates(disk: Disk) -> tuple[float | None, float | None]:
    with probe_files([nearest_existing(disk.path)]) as (files, write):
        return (measure_disk_read(files) if files else None), write
