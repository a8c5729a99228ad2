"""The rates of this machine, with a progress bar while they are measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from raytier.config import AppConfig
from raytier.hardware.rates import Progress as Report
from raytier.hardware.rates import Rates
from raytier.planner.budgets import DeviceKind, disk_directories, ramdisk_directory


def machine_rates(
    console: Console, path: str, dtype: str, config: AppConfig, kind: DeviceKind, cpus: int, *, refresh: bool
) -> Rates:
    """Rates from the cache of `config`, or measured now: the bar then shows what is being measured.

    Args:
        path: file or directory whose disk is read where the disk tier has no directories of its own.

    Raises:
        TierError: `path` cannot be read.
    """
    from raytier.execution.rates import node_rates  # imports torch

    with progress_bar(console) as report:
        return node_rates(
            path,
            dtype=dtype,
            threads=config.compute.resolve_threads(cpus),
            cache_dir=config.cache_dir,
            kind=kind,
            nvme_paths=disk_directories(config),
            ramdisk=ramdisk_directory(config),
            refresh=refresh,
            progress=report,
        )


@contextmanager
def progress_bar(console: Console) -> Iterator[Report]:
    """A bar that shows what is told to the function that it gives; nothing is shown until the first call."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("Measuring this machine", total=1.0, visible=False)

        def report(what: str, done: float) -> None:
            bar.update(task, description=f"Measuring: {what}", completed=done, visible=True)

        yield report
