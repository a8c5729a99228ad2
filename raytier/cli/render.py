"""A plan as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from raytier.checkpoint.manifest import ModelManifest, Parameter
from raytier.config import MIB
from raytier.hardware.machine import Machine
from raytier.planner.budgets import GIB, UNLIMITED, Budgets
from raytier.planner.plan import DevicePlan, Tier, WeightPlan

_BAR_WIDTH = 60
_SHOWN_NAMES = 4


def render_plan(
    console: Console, manifest: ModelManifest, machine: Machine, budgets: Budgets, plan: WeightPlan
) -> None:
    """Print machine, budgets, split of the device budget, placement, predictions, warnings and notes."""
    device = plan.devices[0]
    console.print(
        f"[bold]{escape(manifest.architecture)}[/] {escape(manifest.model_dir)}: {size(manifest.nbytes)} in "
        f"{len(manifest.parameters)} parameters, {manifest.num_layers} layers, computed in {manifest.compute_dtype}"
    )
    console.print(machine_table(machine, with_rates=True))
    for line in budgets.explanation:
        console.print(f"  {escape(line)}", style="dim")
    console.print(_budget_table(budgets, plan))
    console.print(_split(device))
    console.print(_placement_table(manifest, plan))
    if device.ring_bytes:
        sources = [f"{size(plan.streamed_bytes)} from {_file_tiers(plan)}"] if plan.streamed_bytes else []
        if device.kind == "cuda" and plan.host_bytes:
            sources.append(f"up to {size(plan.host_bytes)} from host memory")
        console.print(
            f"Each step streams {' and '.join(sources)} through a ring of {size(device.ring_bytes)}, "
            f"{device.window} layers ahead."
        )
    console.print(_prediction_table(plan))
    console.print(
        f"Each sequence with {plan.context} tokens of context; at most {device.max_num_batched_tokens} tokens per "
        f"step, {device.max_mixed_tokens} beside running streams; "
        f"first token of a 128-token prompt after {duration(plan.first_token_seconds)}."
    )
    for note in plan.notes:
        console.print(f"[cyan]i[/] {escape(note)}")
    for warning in plan.warnings:
        console.print(f"[yellow]![/] {escape(warning)}")


def _file_tiers(plan: WeightPlan) -> str:
    tiers = {"ramdisk": plan.ramdisk_bytes, "disk": plan.nvme_bytes}
    return " and ".join(name for name, nbytes in tiers.items() if nbytes)


def size(nbytes: float) -> str:
    """Bytes in KB, MB or GB (powers of two, as in the configuration)."""
    if nbytes >= 10 * GIB:
        return f"{nbytes / GIB:.2f} GB"
    return f"{nbytes / MIB:.1f} MB" if nbytes >= MIB or nbytes == 0 else f"{nbytes / 1024:.1f} KB"


def rate(bytes_per_s: float) -> str:
    """A rate in decimal GB/s, as disks and memories are rated."""
    return f"{bytes_per_s / 1e9:.2f} GB/s"


def ranges(indices: Iterable[int]) -> str:
    """Sorted integers as "0-3, 5, 7-9"; of many runs the first ones and the last."""
    runs: list[list[int]] = []
    for i in indices:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    texts = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return ", ".join(texts if len(texts) <= 4 else [*texts[:3], "...", texts[-1]])


@dataclass(frozen=True)
class Group:
    """Parts of the model whose parameters are placed alike."""

    title: str
    parameters: tuple[Parameter, ...]


def groups(manifest: ModelManifest, plan: WeightPlan) -> list[Group]:
    """Embedding, decoder layers of the same pattern together, the head, the rest."""
    tier_of = plan.tier_of
    embedding, head = manifest.by_name[manifest.embedding], manifest.by_name[manifest.head]
    result = [Group("embedding and head (tied)" if manifest.tied else "embedding", (embedding,))]
    layers: dict[tuple[tuple[str, int, Tier], ...], list[tuple[int, tuple[Parameter, ...]]]] = {}
    for index in range(manifest.num_layers):
        parameters = manifest.layer_parameters(index)
        pattern = tuple((_suffix(p), p.nbytes, tier_of[p.name]) for p in parameters)
        layers.setdefault(pattern, []).append((index, parameters))
    for members in layers.values():
        title = ("layer " if len(members) == 1 else f"{len(members)} layers: ") + ranges(i for i, _ in members)
        result.append(Group(title, tuple(p for _, parameters in members for p in parameters)))
    if not manifest.tied:
        result.append(Group("head", (head,)))
    rest = tuple(p for p in manifest.parameters if p.layer is None and p not in (embedding, head))
    return [*result, Group("other", rest)] if rest else result


def machine_table(machine: Machine, *, with_rates: bool = False) -> Table:
    """What the node has; with its rates in short."""
    inventory, rates = machine.inventory, machine.rates if with_rates else None
    table = Table(title="Machine", title_justify="left", show_header=False)
    limit = f", cgroup limit {size(inventory.cgroup_limit)}" if inventory.cgroup_limit is not None else ""
    sets = f" with {', '.join(inventory.instruction_sets)}" if inventory.instruction_sets else ""
    table.add_row("node", f"{escape(inventory.hostname)}, {inventory.cpus} CPUs{sets}")
    table.add_row("RAM", f"{size(inventory.ram_available)} available of {size(inventory.ram_total)}{limit}")
    for gpu in inventory.gpus:
        capability = f", compute capability {gpu.compute_capability}" if gpu.compute_capability else ""
        free = f"{size(gpu.free_bytes)} free of {size(gpu.total_bytes)}"
        table.add_row(f"GPU {gpu.index}", f"{escape(gpu.name)}, {free}{capability}")
    for disk in inventory.disks:
        table.add_row("disk", f"{escape(disk.path)} ({disk.filesystem}), {size(disk.free_bytes)} free")
    if rates is not None:
        table.add_row(f"{rates.source} rates", f"disk {rate(rates.disk_read_bytes_per_s)}")
        matrix = ", ".join(f"{rate(r)} at {n}" for n, r in rates.matrix_bytes_per_s)
        table.add_row("", f"linear layers {matrix} rows")
        if rates.host_to_device_bytes_per_s is not None:
            table.add_row("", f"host to GPU {rate(rates.host_to_device_bytes_per_s)}")
    return table


def _budget_table(budgets: Budgets, plan: WeightPlan) -> Table:
    device = plan.devices[0]
    table = Table("tier", "budget", "weights", title="Budgets", title_justify="left")
    table.add_row(f"device ({device.kind})", size(budgets.device_bytes), size(device.resident_bytes))
    table.add_row("host", size(budgets.host_bytes), size(plan.host_bytes))
    if budgets.ramdisk_bytes or plan.ramdisk_bytes:
        table.add_row("ramdisk", size(budgets.ramdisk_bytes), size(plan.ramdisk_bytes))
    nvme = "no cap" if budgets.nvme_bytes >= UNLIMITED else size(budgets.nvme_bytes)
    table.add_row("nvme", nvme, size(plan.nvme_bytes))
    return table


def _split(device: DevicePlan) -> Text:
    """The device budget as a bar with its legend."""
    tokens = (device.kv_blocks - 1) * device.block_size
    parts = [
        ("weights", device.resident_bytes, "blue", ""),
        ("KV", device.kv_bytes, "green", f" ({tokens} tokens in {device.kv_blocks} blocks)"),
        ("ring", device.ring_bytes, "magenta", ""),
        ("activations", device.activation_bytes, "yellow", ""),
    ]
    free = device.budget_bytes - sum(nbytes for _, nbytes, _, _ in parts)
    parts.append(("free", free, "bright_black", ""))
    text = Text("Device budget\n")
    widths = _widths([nbytes for _, nbytes, _, _ in parts], _BAR_WIDTH)
    for (name, _, colour, _), width in zip(parts, widths, strict=True):
        text.append(name[0].upper() * width if name != "free" else "·" * width, style=colour)
    for name, nbytes, colour, note in parts:
        text.append(f"\n  {name:<12}", style=colour)
        text.append(f"{size(nbytes):>12}  {nbytes / max(1, device.budget_bytes):6.1%}{note}")
    return text


def _widths(values: Sequence[int], width: int) -> list[int]:
    """Whole columns whose cumulated ends are nearest to the cumulated shares, so that they add up to `width`."""
    total, ends, seen = max(1, sum(values)), [0], 0
    for value in values:
        seen += value
        ends.append(round(seen / total * width))
    return [b - a for a, b in pairwise(ends)]


def _placement_table(manifest: ModelManifest, plan: WeightPlan) -> Table:
    tier_of = plan.tier_of
    tiers = [tier for tier in Tier if tier is not Tier.RAMDISK or plan.ramdisk_bytes]
    names = [tier.value for tier in tiers]
    table = Table("part", *names, "off the device", title="Placement", title_justify="left")
    for group in groups(manifest, plan):
        sums = [sum(p.nbytes for p in group.parameters if tier_of[p.name] is tier) for tier in tiers]
        off = dict.fromkeys(_suffix(p) for p in group.parameters if tier_of[p.name] is not Tier.DEVICE)
        names = list(off)
        shown = ", ".join(names[:_SHOWN_NAMES]) + (
            f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
        )
        table.add_row(escape(group.title), *(size(n) if n else "-" for n in sums), escape(shown))
    return table


def _prediction_table(plan: WeightPlan) -> Table:
    columns = ("batch", "step", "read and copy", "linear layers", "attention", "calls", "tokens/s")
    table = Table(*columns, title="Prediction", title_justify="left")
    for p in plan.predictions:
        parts = (p.seconds, p.io_seconds, p.compute_seconds, p.attention_seconds, p.overhead_seconds)
        cells = [duration(seconds) for seconds in parts]
        table.add_row(
            str(p.batch),
            *cells,
            f"{p.tokens_per_second:,.0f}" if p.tokens_per_second >= 100 else f"{p.tokens_per_second:.3g}",
        )
    return table


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _suffix(parameter: Parameter) -> str:
    """Name within its layer: what follows the layer's number, without a trailing ".weight"."""
    name = parameter.name
    if parameter.layer is not None:
        name = name.partition(f".{parameter.layer}.")[2] or name
    return name.removesuffix(".weight")
