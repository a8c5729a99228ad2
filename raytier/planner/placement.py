"""The weight plan: where every parameter of one model lives on one node (spec C1-C4). Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from raytier.checkpoint.manifest import ModelManifest, Parameter
from raytier.config import AppConfig
from raytier.errors import BudgetError, RaytierError, ResourceNotAvailableError
from raytier.hardware.inventory import NodeInventory
from raytier.hardware.rates import Rates
from raytier.planner.advice import LeftOut, explain_refusal, plan_notes, plan_warnings
from raytier.planner.budgets import Budgets, DeviceKind, Started, node_budgets, resolve_kind
from raytier.planner.case import Case
from raytier.planner.cost import BATCHES, SweepModel, predict_first_token, predict_step
from raytier.planner.kv_tiers import gateway_bytes, plan_kv_below, staging_bytes
from raytier.planner.plan import FILE_TIERS, DevicePlan, ParameterPlacement, Tier, WeightPlan
from raytier.planner.rules import RuleResult, apply_rules
from raytier.planner.schemes import compressions, precisions, tier_schemes
from raytier.planner.sizing import activation_bytes, always_resident, kv_demand, reader_bytes, resident_nbytes
from raytier.planner.solver import CLEARLY_FASTER, Capacity, Depth, Solution, Solver, depths
from raytier.planner.step_tokens import LEAST_TOKENS, step_tokens
from raytier.weight_settings import Placement

#: Of what a fully resident model leaves free beyond the expected KV, KV takes this share.
KV_SHARE_OF_REST = 0.6
#: Tokens of a step for which memory is set aside at first, where the number of tokens is the planner's to choose.
FIRST_STEP_TOKENS = 512
#: Of the device's budget, activations of a step that the planner chooses take at most this share.
ACTIVATION_SHARE = 0.1
#: Compression that is automatic has to make a step so much faster: it costs space, and predictions are not exact.
COMPRESSION_PAYS = 0.95
#: The same of a less exact precision of those that are permitted.
LOSS_PAYS = 0.97
#: What processors that compute on weights with coded exponents have (`codecs.coded`); Ice Lake has the first alone.
_CODED = frozenset({"avx512_vbmi2", "avx512_bf16"})
#: A tier is left out only if it would not pay either with reads so much slower than measured.
SLOWER_READS = 0.8


@dataclass(frozen=True)
class _Fitted:
    """What answers a case: the rules' result, where everything goes, KV blocks, and tiers that were left out."""

    case: Case
    rules: RuleResult
    solution: Solution
    blocks: int
    left_out: tuple[LeftOut, ...] = ()


def plan_weights(
    manifest: ModelManifest,
    inventory: NodeInventory,
    rates: Rates,
    config: AppConfig,
    *,
    kind: DeviceKind | None = None,
    device_index: int = 0,
    started: Started = "nothing",
    budgets: Budgets | None = None,
) -> WeightPlan:
    """Plan one model for one node.

    Args:
        config: what the model wishes included (`ModelDescription.configure`).
        kind: device to plan for; None = what `config.compute.device` means here.
        started: which processes run already (see `node_budgets`).
        budgets: what the model may take; None = what the node has (`node_budgets`).

    Raises:
        BudgetError: the budgets cannot hold the model; with the numbers and what would make it fit.
        ResourceNotAvailableError: the asked-for device does not exist.
    """
    kind = resolve_kind(inventory, config) if kind is None else kind
    chosen: WeightPlan | None = None
    refused: RaytierError | None = None
    for option in precisions(config, manifest, kind):
        try:
            found = _compressed(manifest, inventory, rates, option, kind, device_index, started, budgets)
        except (BudgetError, ResourceNotAvailableError) as error:
            refused = error  # what is kept to the end is of the smallest form
            continue
        if chosen is None or found.predictions[0].seconds <= LOSS_PAYS * chosen.predictions[0].seconds:
            chosen = found
    if chosen is None:
        assert refused is not None
        raise refused
    return chosen


def _compressed(
    manifest: ModelManifest,
    inventory: NodeInventory,
    rates: Rates,
    config: AppConfig,
    kind: DeviceKind,
    device_index: int,
    started: Started,
    budgets: Budgets | None,
) -> WeightPlan:
    """The plan with what compression that is automatic makes fastest."""
    chosen: WeightPlan | None = None
    refused: RaytierError | None = None
    options = compressions(config)
    for option in options if rates.decode_bytes_per_s else options[:1]:
        try:
            found = _plan(manifest, inventory, rates, option, kind, device_index, started, budgets)
        except (BudgetError, ResourceNotAvailableError) as error:
            refused = refused or error
            continue
        if chosen is None or found.predictions[0].seconds <= COMPRESSION_PAYS * chosen.predictions[0].seconds:
            chosen = found
    if chosen is None:
        assert refused is not None
        raise refused
    if len(options) == 1:
        return chosen
    coded = {tier: chosen.schemes.codecs(tier) - {"none"} for tier in FILE_TIERS}
    told = ", ".join(f"{tier.value} {'zstd-planes' if coded[tier] else 'none'}" for tier in FILE_TIERS)
    return replace(chosen, notes=(*chosen.notes, f"compression that is auto: {told}, by the measured rates"))


def _plan(
    manifest: ModelManifest,
    inventory: NodeInventory,
    rates: Rates,
    config: AppConfig,
    kind: DeviceKind,
    device_index: int,
    started: Started,
    budgets: Budgets | None,
) -> WeightPlan:
    chosen = config.scheduler.max_num_batched_tokens
    first = FIRST_STEP_TOKENS if isinstance(chosen, str) else chosen
    if budgets is None:
        budgets = node_budgets(inventory, config, kind, device_index=device_index, started=started)
    schemes = tier_schemes(manifest, config, kind, coded=kind == "cpu" and _CODED.issubset(inventory.instruction_sets))
    packed = kind == "cpu" and rates.packed_pays
    case = Case(
        manifest=manifest,
        inventory=inventory,
        rates=rates,
        config=config,
        kind=kind,
        budgets=budgets,
        demand=kv_demand(manifest, config),
        step_tokens=first,
        mixed_tokens=first,
        activation_bytes=0,
        resident={p.name: reason for p in manifest.parameters if (reason := always_resident(p, manifest)) is not None},
        schemes=schemes,
        sweeps=SweepModel(manifest, kind, packed, schemes),
    )
    case = _with_tokens(case, first)
    if isinstance(chosen, str):
        case = _with_tokens(case, _affordable(case, FIRST_STEP_TOKENS))
        fitted = _fit_tokens(case)
    else:
        fitted = _fit_rules(case)
    if fitted is None:
        least = _with_tokens(case, _least_tokens(case)) if isinstance(chosen, str) else case
        raise BudgetError(explain_refusal(least, _solver(least, 0)[1]))
    case, solution = fitted.case, fitted.solution
    sweep = case.sweep(solution)
    sizes = dict.fromkeys(Tier, 0)
    for p in manifest.parameters:
        tier = solution.tiers[p.name]
        sizes[tier] += _nbytes(case, p, tier)
    unruled = _without_rules(case, fitted)
    below, hints = plan_kv_below(
        manifest,
        inventory,
        config,
        kind,
        case.budgets,
        kv_bytes=fitted.blocks * case.demand.block_bytes,
        host_weights=sizes[Tier.HOST],
        disk_weights=sizes[Tier.NVME],
    )
    return WeightPlan(
        model_dir=manifest.model_dir,
        placements=_placements(case, solution, fitted.rules),
        devices=(
            DevicePlan(
                index=device_index,
                kind=kind,
                layer_start=0,
                layer_stop=manifest.num_layers,
                budget_bytes=case.capacity.device,
                resident_bytes=sizes[Tier.DEVICE],
                ring_bytes=solution.ring.nbytes,
                expert_bytes=solution.ring.expert_bytes,
                window=solution.ring.window,
                head_chunk_rows=solution.ring.head_chunk_rows,
                block_size=case.demand.block_size,
                kv_blocks=fitted.blocks,
                kv_bytes=fitted.blocks * case.demand.block_bytes,
                activation_bytes=case.activation_bytes,
                max_num_batched_tokens=case.step_tokens,
                max_mixed_tokens=case.mixed_tokens,
                packed=packed,
            ),
        ),
        host_bytes=sizes[Tier.HOST],
        ramdisk_bytes=sizes[Tier.RAMDISK],
        nvme_bytes=sizes[Tier.NVME],
        streamed_bytes=sweep.streamed_bytes,
        predictions=tuple(predict_step(sweep, rates, batch, case.demand.context) for batch in BATCHES),
        first_token_seconds=predict_first_token(sweep, rates, step_tokens=case.step_tokens),
        warnings=(*plan_warnings(case, fitted.rules, solution, fitted.blocks, unruled), *hints),
        notes=plan_notes(case, solution, fitted.left_out, by_rates=isinstance(chosen, str)),
        context=case.demand.context,
        schemes=case.schemes,
        kv_below=below,
    )


def _nbytes(case: Case, parameter: Parameter, tier: Tier) -> int:
    """Bytes that a parameter takes on a tier."""
    if tier is Tier.DEVICE:
        return resident_nbytes(parameter, case.manifest, case.schemes)
    if tier in FILE_TIERS:
        return case.schemes.file_nbytes(parameter, tier)
    return case.schemes.held_nbytes(parameter, tier)


def _least_tokens(case: Case) -> int:
    """The fewest tokens that a step of the planner's choice carries."""
    return max(LEAST_TOKENS, case.config.scheduler.max_num_seqs)


def _with_tokens(case: Case, tokens: int) -> Case:
    manifest, config = case.manifest, case.config
    nbytes = activation_bytes(manifest, tokens, config.scheduler.max_num_seqs)
    nbytes += reader_bytes(manifest, case.schemes, config.tiers.nvme.io_threads)
    if case.kind == "cpu":  # for KV on its way to the disk and back
        nbytes += gateway_bytes(manifest, config) + staging_bytes(manifest, config)
    return replace(case, step_tokens=tokens, mixed_tokens=tokens, activation_bytes=nbytes)


def _affordable(case: Case, tokens: int) -> int:
    """As many of `tokens` as the device has memory for beside everything else, and never less than the fewest."""
    least, most = _least_tokens(case), ACTIVATION_SHARE * case.capacity.device
    while tokens > least and _with_tokens(case, tokens).activation_bytes > most:
        tokens = tokens * 3 // 4
    return max(least, tokens)


def _fit_tokens(case: Case) -> _Fitted | None:
    """Choose the tokens of a step too, within the memory for activations; None when nothing fits.

    A step without decodes delays nobody: it carries `case.step_tokens`, or fewer where memory is scarce. A plan with
    that shows what is streamed, and so how many tokens a step with decodes may carry by the rates. Where these are
    more, it is planned with as many.
    """
    while (fitted := _fit_rules(case)) is None:
        if case.step_tokens <= _least_tokens(case):
            return None
        case = _with_tokens(case, max(_least_tokens(case), case.step_tokens // 2))
    wanted = step_tokens(
        case.sweep(fitted.solution),
        case.rates,
        sequences=case.demand.sequences,
        context=case.demand.context,
        max_num_seqs=case.config.scheduler.max_num_seqs,
    )
    if wanted > case.step_tokens:
        # More tokens need more memory: there may be too little for them.
        fitted = _fit_rules(_with_tokens(case, _affordable(case, wanted))) or fitted
    mixed = min(wanted, fitted.case.step_tokens)
    return replace(fitted, case=replace(fitted.case, mixed_tokens=mixed))


def _solver(case: Case, device_room: int) -> tuple[RuleResult, Solver]:
    """What the user's rules place, of which `device_room` bytes may be on the device, and a solver for the rest."""
    room = {tier: case.capacity.room(tier) for tier in Tier} | {Tier.DEVICE: device_room}
    rules = apply_rules(case.manifest, case.config.placement.rules, room, case.resident, partial(_nbytes, case))
    fixed = dict.fromkeys(case.resident, Tier.DEVICE) | rules.tiers
    return rules, Solver(case.manifest, case.kind, case.rates, fixed, case.activation_bytes, case.schemes, case.sweeps)


def _fit_rules(case: Case) -> _Fitted | None:
    """Place everything: by rule what rules name, then the rest; None when nothing fits."""
    for device_room in _rule_rooms(case):
        rules, solver = _solver(case, device_room)
        found = _fit(case, solver)
        if found is not None:
            return _leave_out(case, solver, rules, *found)
    return None


def _leave_out(case: Case, solver: Solver, rules: RuleResult, solution: Solution, blocks: int) -> _Fitted:
    """Do without tiers that the solver used and that make no step faster (spec C4).

    What hides behind compute by the measured rates might not in truth, so a tier has to be useless with slower reads
    too.
    """
    left_out = []
    kv_bytes = blocks * case.demand.block_bytes
    capacity: Capacity = case.capacity
    for tier in (Tier.RAMDISK, Tier.HOST):
        used = [p for p in case.manifest.parameters if solution.tiers[p.name] is tier]
        by_rule = sum(_nbytes(case, p, tier) for p in used if p.name in rules.tiers)
        if by_rule == sum(_nbytes(case, p, tier) for p in used):
            continue
        smaller = capacity.limited(tier, by_rule)
        other = solver.best(smaller, kv_bytes, depths(case.config.prefetch.window))
        if other is None:
            continue
        slow = replace(case, rates=case.rates.with_slower_reads(SLOWER_READS))
        with_it, without = case.step(solution).seconds, case.step(other).seconds
        useless = CLEARLY_FASTER * slow.step(other).seconds <= slow.step(solution).seconds
        if without < CLEARLY_FASTER * with_it or (useless and CLEARLY_FASTER * without <= with_it):
            left_out.append(LeftOut(tier, with_it, without))
            solution, capacity = other, smaller
    return _Fitted(case, rules, solution, blocks, tuple(left_out))


def _without_rules(case: Case, fitted: _Fitted) -> Solution | None:
    """Where everything would go without the user's rules; None when they move nothing, or it would not fit."""
    if not fitted.rules.tiers:
        return None
    bare = replace(case, config=case.config.model_copy(update={"placement": Placement()}))
    found = _fit_rules(bare)
    return found.solution if found is not None else None


def _rule_rooms(case: Case) -> tuple[int, ...]:
    """Device bytes that rules may claim, to be tried in this order: all there is beside the expected KV, then what two
    ring units of the largest layer leave (the rest of the model must stream through something), then nothing."""
    manifest = case.manifest
    if not any(rule.tier == "device" for rule in case.config.placement.rules):
        return (0,)
    room = case.capacity.device - case.resident_bytes - case.activation_bytes - case.expected_kv_bytes
    layer = [0] * manifest.num_layers
    for p in manifest.parameters:
        if p.layer is not None and p.expert is None and p.name not in case.resident:
            layer[p.layer] += _nbytes(case, p, Tier.DEVICE)
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
    return sequences / case.step(solution, max(1, round(sequences))).seconds


def _placements(case: Case, solution: Solution, rules: RuleResult) -> tuple[ParameterPlacement, ...]:
    manifest, placements = case.manifest, []
    for p in manifest.parameters:
        tier = solution.tiers[p.name]
        reason = rules.reasons.get(p.name) or case.resident.get(p.name)
        if reason is None:
            reason = _default_reason(manifest, p.name, tier, solution.lowered)
        skipped = rules.skipped.get(p.name)
        scheme = case.schemes.of(p.name, tier)
        placements.append(
            ParameterPlacement(
                p.name,
                tier,
                f"{reason} ({skipped})" if skipped else reason,
                "source" if scheme.form is None else scheme.form.name,
                str(scheme.codec),
            )
        )
    return tuple(placements)


def _default_reason(manifest: ModelManifest, name: str, tier: Tier, lowered: bool) -> str:
    if tier is Tier.DEVICE:
        return "default: fits on the device" if not lowered else "default: kept on the device"
    if name == manifest.embedding and not manifest.tied:
        return f"default: {tier.value}, only the rows of a step's tokens are read"
    return f"default: {tier.value}, spread over the layers"
