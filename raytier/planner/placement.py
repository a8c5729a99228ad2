"""The weight plan: where every parameter of one model lives on one node (spec C1-C4). Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raytier.checkpoint.manifest import ModelManifest
from raytier.config import AppConfig
from raytier.errors import BudgetError
from raytier.hardware.inventory import NodeInventory
from raytier.hardware.rates import Rates
from raytier.planner.advice import explain_refusal, plan_warnings
from raytier.planner.budgets import DeviceKind, node_budgets, resolve_kind
from raytier.planner.case import Case
from raytier.planner.cost import BATCHES, describe_sweep, predict_first_token, predict_step
from raytier.planner.plan import DevicePlan, ParameterPlacement, Tier, WeightPlan
from raytier.planner.rules import RuleResult, apply_rules
from raytier.planner.sizing import activation_bytes, always_resident, kv_demand, resident_nbytes
from raytier.planner.solver import Depth, Solution, Solver, depths

#: Of what a fully resident model leaves free beyond the expected KV, KV takes this share.
KV_SHARE_OF_REST = 0.6
DEFAULT_STEP_TOKENS = 512


def plan_weights(
    manifest: ModelManifest,
    inventory: NodeInventory,
    rates: Rates,
    config: AppConfig,
    *,
    kind: DeviceKind | None = None,
    device_index: int = 0,
) -> WeightPlan:
    """Plan one model for one node.

    Args:
        config: what the model wishes included (`ModelDescription.configure`).
        kind: device to plan for; None = what `config.compute.device` means here.

    Raises:
        BudgetError: the budgets cannot hold the model; with the numbers and what would make it fit.
        ResourceNotAvailableError: the asked-for device does not exist.
    """
    kind = resolve_kind(inventory, config) if kind is None else kind
    tokens = DEFAULT_STEP_TOKENS
    if config.scheduler.max_num_batched_tokens != "auto":
        tokens = config.scheduler.max_num_batched_tokens
    case = Case(
        manifest=manifest,
        inventory=inventory,
        rates=rates,
        config=config,
        kind=kind,
        budgets=node_budgets(inventory, config, kind, device_index=device_index),
        demand=kv_demand(manifest, config),
        activation_bytes=activation_bytes(manifest, tokens, config.scheduler.max_num_seqs),
        resident={p.name: reason for p in manifest.parameters if (reason := always_resident(p, manifest)) is not None},
    )
    for device_room in _rule_rooms(case):
        room = {Tier.DEVICE: device_room, Tier.HOST: case.capacity.host, Tier.NVME: case.capacity.nvme}
        rules = apply_rules(manifest, config.placement.rules, room, case.resident)
        fixed = dict.fromkeys(case.resident, Tier.DEVICE) | rules.tiers
        solver = Solver(manifest, kind, rates, fixed, case.activation_bytes)
        fitted = _fit(case, solver)
        if fitted is not None:
            break
    else:
        raise BudgetError(explain_refusal(case, solver))

    solution, blocks = fitted
    sweep = describe_sweep(manifest, solution.tiers, kind, solution.ring)
    sizes = dict.fromkeys(Tier, 0)
    for p in manifest.parameters:
        tier = solution.tiers[p.name]
        sizes[tier] += resident_nbytes(p, manifest) if tier is Tier.DEVICE else p.nbytes
    return WeightPlan(
        model_dir=manifest.model_dir,
        placements=_placements(manifest, solution, rules, case.resident),
        devices=(
            DevicePlan(
                index=device_index,
                kind=kind,
                layer_start=0,
                layer_stop=manifest.num_layers,
                budget_bytes=case.capacity.device,
                resident_bytes=sizes[Tier.DEVICE],
                ring_bytes=solution.ring.nbytes,
                window=solution.ring.window,
                head_chunk_rows=solution.ring.head_chunk_rows,
                block_size=case.demand.block_size,
                kv_blocks=blocks,
                kv_bytes=blocks * case.demand.block_bytes,
                activation_bytes=case.activation_bytes,
                max_num_batched_tokens=tokens,
                packed=False,
            ),
        ),
        host_bytes=sizes[Tier.HOST],
        ramdisk_bytes=sizes[Tier.RAMDISK],
        nvme_bytes=sizes[Tier.NVME],
        streamed_bytes=sweep.streamed_bytes,
        predictions=tuple(predict_step(sweep, rates, batch) for batch in BATCHES),
        first_token_seconds=predict_first_token(sweep, rates),
        warnings=plan_warnings(case, rules, solution, blocks),
    )


def _rule_rooms(case: Case) -> tuple[int, ...]:
    """Device bytes that rules may claim, to be tried in this order: all there is beside the expected KV, then what two
    ring units of the largest layer leave (the rest of the model must stream through something), then nothing."""
    manifest = case.manifest
    if not any(rule.tier == "device" for rule in case.config.placement.rules):
        return (0,)
    room = case.capacity.device - case.resident_bytes - case.activation_bytes - case.expected_kv_bytes
    layer = [0] * manifest.num_layers
    for p in manifest.parameters:
        if p.layer is not None and p.name not in case.resident:
            layer[p.layer] += p.nbytes
    return max(0, room), max(0, room - 2 * max(layer, default=0)), 0


def _fit(case: Case, solver: Solver) -> tuple[Solution, int] | None:
    """A solution and its KV blocks. KV has the expected load if that leaves room for the ring; else less.

    How much less: of what is possible between the floor and the largest KV that fits, that which serves the expected
    context with the highest predicted throughput. A model that just fits without much KV is not streamed for more.
    """
    demand, device = case.demand, case.capacity.device
    tried = depths(case.config.prefetch.window)

    def best(blocks: int, at: Sequence[Depth] = tried) -> Solution | None:
        return solver.best(case.capacity, blocks * demand.block_bytes, at)

    solution = best(demand.expected)
    blocks = demand.expected
    if solution is None:
        low, high = demand.floor, demand.expected
        if best(low, tried[-1:]) is None:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if best(middle, tried[-1:]) is not None else (low, middle)
        resident = (device - case.weight_bytes - case.activation_bytes) // demand.block_bytes
        sizes = {demand.floor + (low - demand.floor) * i // 8 for i in range(9)}
        sizes.add(max(demand.floor, min(low, resident)))
        found = [(s, blocks) for blocks in sorted(sizes, reverse=True) if (s := best(blocks)) is not None]
        solution, blocks = max(found, key=lambda pair: _throughput(case, *pair))
    if not solution.lowered:
        free = (device - solution.used) // demand.block_bytes
        share = demand.expected + int((free - demand.expected) * KV_SHARE_OF_REST)
        blocks = min(demand.most, free, max(demand.expected, share))
    return solution, blocks


def _throughput(case: Case, solution: Solution, blocks: int) -> float:
    """Predicted tokens per second with as many sequences of the expected context as `blocks` hold."""
    sequences = min(case.demand.sequences, (blocks - 1) * case.demand.block_size / case.demand.context)
    sweep = describe_sweep(case.manifest, solution.tiers, case.kind, solution.ring)
    return sequences / predict_step(sweep, case.rates, max(1, round(sequences))).seconds


def _placements(
    manifest: ModelManifest, solution: Solution, rules: RuleResult, resident: Mapping[str, str]
) -> tuple[ParameterPlacement, ...]:
    placements = []
    for p in manifest.parameters:
        tier = solution.tiers[p.name]
        reason = rules.reasons.get(p.name) or resident.get(p.name)
        if reason is None:
            reason = _default_reason(manifest, p.name, tier, solution.lowered)
        skipped = rules.skipped.get(p.name)
        placements.append(ParameterPlacement(p.name, tier, f"{reason} ({skipped})" if skipped else reason))
    return tuple(placements)


def _default_reason(manifest: ModelManifest, name: str, tier: Tier, lowered: bool) -> str:
    if tier is Tier.DEVICE:
        return "default: fits on the device" if not lowered else "default: kept on the device"
    if name == manifest.embedding and not manifest.tied:
        return f"default: {tier.value}, only the rows of a step's tokens are read"
    return f"default: {tier.value}, spread over the layers"
