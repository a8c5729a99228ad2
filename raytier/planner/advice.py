"""What the planner tells the user: warnings of a plan, and why a model does not fit (spec A4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

from raytier.config import MIB
from raytier.hardware.rates import Rates
from raytier.planner.budgets import GIB, UNLIMITED
from raytier.planner.case import Case
from raytier.planner.plan import Tier
from raytier.planner.rules import RuleResult
from raytier.planner.solver import CLEARLY_FASTER, Depth, Solution, Solver

_SMALLEST_RING = (Depth(1),)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A tier that the plan does without: predicted seconds of a decode step at batch 1 with it, and without."""

    tier: Tier
    with_it: float
    without: float


def plan_warnings(
    case: Case, rules: RuleResult, solution: Solution, kv_blocks: int, unruled: Solution | None
) -> tuple[str, ...]:
    """What the user should know about this plan.

    Args:
        unruled: where everything would go without placement rules; None when there is nothing to compare.
    """
    checks = (
        *rules.warnings,
        _costly_rules(case, rules, solution, unruled),
        _streamed_for_kv(case, solution),
        _less_kv(case, kv_blocks),
        _less_window(case, solution),
        _cast(case),
        _not_coded(case),
        _unused_gpus(case),
        _rates(case),
    )
    return tuple(text for text in checks if text)


def _not_coded(case: Case) -> str | None:
    """Coded exponents that are asked for where no kernel computes on them: the weights stay as they are."""
    compression = case.config.compression
    asked = [tier.value for tier in Tier if compression.of(tier.value) == "coded-exponents"]
    coded = any(
        scheme.form is not None and scheme.form.coded
        for named in case.schemes.by_tier.values()
        for scheme in named.values()
    )
    if not asked or coded:
        return None
    return (
        f"compression of {', '.join(asked)} is coded-exponents, and nothing is coded: that is for matrices in bf16 on "
        "a CPU with AVX512 VBMI2 and BF16; zstd-planes compresses files anywhere"
    )


def plan_notes(case: Case, solution: Solution, left_out: Sequence[LeftOut], *, by_rates: bool) -> tuple[str, ...]:
    """Why the plan is as it is.

    Args:
        by_rates: the tokens of a step follow from the rates, not from the configuration.
    """
    notes = [
        f"the {item.tier.value} tier is left out, it would not pay: predicted decode step at batch 1 is "
        f"{item.with_it * 1e3:.1f} ms with it and {item.without * 1e3:.1f} ms without"
        for item in left_out
    ]
    nvme, written = case.config.tiers.nvme, _on(case, solution, Tier.NVME)
    if nvme.paths and written:
        notes.append(_copies(written, f"{len(nvme.paths)} directories of tiers.nvme.paths", case.rates))
    if ramdisk := _on(case, solution, Tier.RAMDISK):
        notes.append(f"{_mb(ramdisk)} are copied to the ramdisk when the model is loaded")
    notes += _precisions(case, solution)
    if case.sweeps.packed:
        gain = case.rates.matrix_rate(1, packed=True) / case.rates.matrix_rate(1)
        notes.append(
            f"resident linear layers are packed for the CPU's kernels: measured {gain:.2f}x as fast at one row, "
            f"{case.rates.matrix_rate(64, packed=True) / case.rates.matrix_rate(64):.2f}x at 64"
        )
    if by_rates:
        notes.append(
            f"a step carries at most {case.step_tokens} tokens, and {case.mixed_tokens} where running streams wait for "
            "it (scheduler.max_num_batched_tokens)"
        )
    return tuple(notes)


def _precisions(case: Case, solution: Solution) -> Iterator[str]:
    """What is not exact, how much of the model it is, and how inexact: nobody gets that unasked."""
    elements: dict[tuple[float, str], int] = {}
    for p in case.manifest.parameters:
        form = case.schemes.of(p.name, solution.tiers[p.name]).form
        if form is not None and (error := form.typical_error(p.dtype)):
            elements[error, form.name] = elements.get((error, form.name), 0) + prod(p.shape)
    whole = sum(prod(p.shape) for p in case.manifest.parameters)
    for (error, name), count in sorted(elements.items()):
        error_text = f"relative error {error:.1%} where weights are normally distributed"
        yield f"{count / whole:.0%} of the weights are {name}: {error_text}"


def _on(case: Case, solution: Solution, tier: Tier) -> int:
    return sum(p.nbytes for p in case.manifest.parameters if solution.tiers[p.name] is tier)


def _copies(nbytes: int, where: str, rates: Rates) -> str:
    seconds = f", about {nbytes / rates.disk_write_bytes_per_s:.0f} s" if rates.disk_write_bytes_per_s else ""
    return f"{_mb(nbytes)} are copied to the {where} when the model is loaded{seconds}"


def _costly_rules(case: Case, rules: RuleResult, solution: Solution, unruled: Solution | None) -> str | None:
    """The user's own rules are obeyed, and where they cost time their price is named once."""
    if unruled is None:
        return None
    actual, ideal = case.step(solution).seconds, case.step(unruled).seconds
    moved = sum(case.manifest.by_name[name].nbytes for name, tier in rules.tiers.items() if tier is not Tier.DEVICE)
    if ideal > CLEARLY_FASTER * actual and (unruled.lowered or not moved):
        return None
    what = f"placement rules keep {_mb(moved)} off it" if moved else "placement rules decide what stays on it"
    fits = "the model fits on the device, but " if not unruled.lowered else "the device could be used better: "
    return f"{fits}{what}: predicted decode step at batch 1 is {actual * 1e3:.1f} ms instead of {ideal * 1e3:.1f} ms"


def _rates(case: Case) -> str | None:
    if case.rates.source == "assumed":
        return "the rates of this machine are assumed, not measured: predictions are rough"
    if case.rates.busy:
        return (
            f"the rates of this machine were measured while other work used {case.rates.other_cores:.1f} cores: "
            "predictions are rough; measure again with `raytier doctor --measure` when it is idle"
        )
    return None


def _streamed_for_kv(case: Case, solution: Solution) -> str | None:
    free = case.capacity.device - case.weight_bytes - case.activation_bytes
    if not solution.lowered or not solution.ring.units or free < case.floor_kv_bytes:
        return None
    tokens = (free // case.demand.block_bytes - 1) * case.demand.block_size
    return (
        f"the weights would fit on the device beside {tokens} tokens of KV; part of them is streamed because "
        f"{case.demand.sequences} sequences of {case.demand.context} tokens are expected (kv.expected_sequences, "
        "kv.expected_context)"
    )


def _less_kv(case: Case, kv_blocks: int) -> str | None:
    if kv_blocks >= case.demand.expected:
        return None
    size = case.demand.block_size
    return (
        f"KV holds {(kv_blocks - 1) * size} tokens instead of the expected {(case.demand.expected - 1) * size}: the "
        f"device budget of {_mb(case.capacity.device)} leaves no more"
    )


def _less_window(case: Case, solution: Solution) -> str | None:
    wish = case.config.prefetch.window
    if isinstance(wish, str) or not solution.ring.units or solution.depth.layers >= wish:
        return None
    return f"prefetch.window is {wish}, the device budget has room for {solution.ring.window}"


def _cast(case: Case) -> str | None:
    if case.cast_bytes <= case.weight_bytes // 10:
        return None
    return (
        f"{_mb(case.cast_bytes)} are stored in another dtype than {case.manifest.compute_dtype}: they are cast when "
        "loaded and cannot be streamed from the checkpoint"
    )


def _unused_gpus(case: Case) -> str | None:
    count = len(case.inventory.gpus)
    if case.kind != "cuda" or count < 2:
        return None
    return f"{count - 1} of {count} GPUs are not used by this version"


def explain_refusal(case: Case, solver: Solver) -> str:
    """Message of a BudgetError: needed, available, what to change. Called only when nothing fits."""
    capacity, demand, config = case.capacity, case.demand, case.config

    def fits(device: int, nvme: int, blocks: int) -> bool:
        tried = replace(capacity, device=device, nvme=nvme)
        return solver.best(tried, blocks * demand.block_bytes, _SMALLEST_RING) is not None

    always, total, floor_kv, activations = (
        case.resident_bytes,
        case.weight_bytes,
        case.floor_kv_bytes,
        case.activation_bytes,
    )
    everything = 3 * (total + activations + floor_kv) + capacity.device  # room for any ring as well
    needed = _smallest(lambda n: fits(n, capacity.nvme, demand.floor), capacity.device, everything)
    lines = [
        f"{case.manifest.model_dir or case.manifest.architecture} does not fit: its weights have {_mb(total)}, the "
        f"budgets are device {_mb(capacity.device)}, host {_mb(capacity.host)}, "
        f"ramdisk {_mb(capacity.ramdisk)}, nvme {'unlimited' if capacity.nvme >= UNLIMITED else _mb(capacity.nvme)}.",
        f"Needed on the device: {_mb(needed)} = always resident {_mb(always)} + activations {_mb(activations)} + KV "
        f"{_mb(floor_kv)} (one sequence of {(demand.floor - 1) * demand.block_size} tokens) + ring and weights that no "
        f"other tier holds {_mb(max(0, needed - always - activations - floor_kv))}.",
    ]
    if case.cast_bytes > always // 2:
        lines.append(
            f"{_mb(case.cast_bytes)} are stored in another dtype than {case.manifest.compute_dtype} and cannot be "
            f"streamed: a checkpoint saved in {case.manifest.compute_dtype} could be."
        )

    changes = []
    if capacity.nvme < UNLIMITED and fits(capacity.device, UNLIMITED, demand.floor):
        nvme = _smallest(lambda n: fits(capacity.device, n, demand.floor), capacity.nvme, 2 * total)
        if config.tiers.nvme.enabled:
            changes.append(f"raise tiers.nvme.max_gb to {ceil(nvme / GIB * 1000) / 1000:g}")
        else:
            changes.append(f"set tiers.nvme.enabled to true ({_mb(nvme)} stay in the checkpoint files)")
    if demand.floor > 2 and fits(capacity.device, capacity.nvme, 2):
        blocks = demand.floor
        while not fits(capacity.device, capacity.nvme, blocks):
            blocks = max(2, blocks * 3 // 4)
        changes.append(f"lower kv.expected_context to {(blocks - 1) * demand.block_size}")
    if held := case.budgets.device_held:
        changes.append(f"unload other models, which hold {_mb(held)} of the device")
    if needed + held <= case.budgets.device_capacity:
        changes.append(f"raise tiers.device.max_mb to {ceil((needed + held) / MIB)}")
    else:
        changes.append(
            f"free {_mb(needed + held - case.budgets.device_capacity)} more memory for the device (this machine offers "
            f"{_mb(case.budgets.device_capacity)}; tiers.device.max_utilization and reserved_mb limit it)"
        )
    if activations > needed - capacity.device:
        changes.append("lower scheduler.max_num_batched_tokens or scheduler.max_num_seqs (activations)")
    return "\n".join([*lines, "Any one of these makes it fit: " + "; or ".join(changes) + "."])


def _smallest(holds: Callable[[int], bool], low: int, high: int) -> int:
    """Smallest value in (low, high], to 64 KiB, for which `holds`; `high` when none below it does."""
    while high - low > 65536:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


def _mb(nbytes: int) -> str:
    return f"{nbytes / MIB:.1f} MB"
