"""The user's placement rules: name pattern -> tier (spec C2)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from raytier.checkpoint.manifest import ModelManifest, Parameter
from raytier.config import MIB
from raytier.planner.plan import Tier
from raytier.weight_settings import PlacementRule


@dataclass(frozen=True)
class RuleResult:
    """`tiers` and `reasons` of the parameters that a rule placed; `skipped`: name -> why rules fell through."""

    tiers: dict[str, Tier] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def matches(pattern: str, parameter: Parameter) -> bool:
    """Case-insensitive substring, or `re:` + regular expression, of the name or of a tied name."""
    names = (parameter.name, *parameter.aliases)
    if pattern.startswith("re:"):
        return any(re.search(pattern[3:], name, re.IGNORECASE) for name in names)
    return any(pattern.lower() in name.lower() for name in names)


def apply_rules(
    manifest: ModelManifest,
    rules: Sequence[PlacementRule],
    room: Mapping[Tier, int],
    unmovable: Mapping[str, str],
    nbytes: Callable[[Parameter, Tier], int],
) -> RuleResult:
    """Place every parameter by the first rule (lowest priority, then order) whose tier has room for it.

    Args:
        room: bytes that rules may fill per tier.
        unmovable: parameters that rules cannot move -> why.
        nbytes: what a parameter takes on a tier.
    """
    left = dict(room)
    result = RuleResult()
    full: dict[int, list[Parameter]] = {}
    order = sorted(range(len(rules)), key=lambda i: (rules[i].priority, i))
    used = set()
    for parameter in manifest.parameters:
        for i in order:
            rule, tier = rules[i], Tier(rules[i].tier)
            if not matches(rule.pattern, parameter):
                continue
            used.add(i)
            if parameter.name in unmovable:
                result.skipped[parameter.name] = f"{unmovable[parameter.name]}; rule {rule.pattern!r} does not apply"
                break
            if nbytes(parameter, tier) <= left[tier]:
                left[tier] -= nbytes(parameter, tier)
                result.tiers[parameter.name] = tier
                after = result.skipped.pop(parameter.name, "")
                result.reasons[parameter.name] = f"rule {rule.pattern!r}" + (f" after {after}" if after else "")
                break
            full.setdefault(i, []).append(parameter)
            note = f"rule {rule.pattern!r}: {tier.value} {'is full' if room[tier] else 'has no room'}"
            earlier = result.skipped.get(parameter.name)
            result.skipped[parameter.name] = f"{earlier}; {note}" if earlier else note

    warnings = [
        f"placement rule {rules[i].pattern!r} -> {rules[i].tier}: {len(parameters)} parameters "
        f"({sum(nbytes(p, Tier(rules[i].tier)) for p in parameters) / MIB:.0f} MB) fell through, the tier has room for "
        f"{room[Tier(rules[i].tier)] / MIB:.0f} MB"
        for i, parameters in sorted(full.items())
    ]
    warnings += [
        f"placement rule {rule.pattern!r} matches no parameter" for i, rule in enumerate(rules) if i not in used
    ]
    return RuleResult(result.tiers, result.reasons, result.skipped, tuple(warnings))
