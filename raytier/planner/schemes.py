"""In which form each tier holds a parameter, and with which codec its files have it (spec B1, B3). Pure."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from raytier.checkpoint.manifest import ModelManifest, Parameter, Role
from raytier.codecs.codec import NONE, RATIOS, Codec
from raytier.codecs.forms import Form, form_of
from raytier.codecs.scheme import Scheme
from raytier.config import AppConfig
from raytier.errors import ConfigurationError
from raytier.planner.budgets import DeviceKind
from raytier.planner.plan import FILE_TIERS, Tier, TierSchemes
from raytier.planner.rules import matches


def tier_schemes(manifest: ModelManifest, config: AppConfig, kind: DeviceKind, *, coded: bool = False) -> TierSchemes:
    """What the configuration makes of every parameter for a device of `kind`.

    Parameters of one dimension stay as they are, and so does an input embedding, whose rows are read one by one; where
    it is tied to the output head, its rows come from the checkpoint.

    Args:
        coded: the device computes on weights with coded exponents.
    """
    ratios = {codec: {**known, **manifest.ratios.get(codec, {})} for codec, known in RATIOS.items()}
    schemes = TierSchemes({tier: dict(_schemes(manifest, config, tier, coded)) for tier in Tier}, ratios)
    for tier, named in schemes.by_tier.items():
        for name, scheme in named.items():
            if kind == "cuda" and scheme.form is not None and scheme.form.dtype is None:
                raise ConfigurationError(
                    f"precision.{tier.value}: {name} would be {scheme.form.name}, which is computed on by CPUs only in "
                    "this version; set it to source, bf16, fp16 or fp32, or compute.device to cpu"
                )
    return schemes


def _schemes(manifest: ModelManifest, config: AppConfig, tier: Tier, coded: bool) -> Iterator[tuple[str, Scheme]]:
    codec = _codec(config, tier)
    for parameter in manifest.parameters:
        by_rows = parameter.name == manifest.embedding and not manifest.tied
        if len(parameter.shape) < 2 or parameter.role is Role.OTHER or by_rows:
            continue
        form = _form(parameter, config, tier)
        if form is None and coded and _wants_coded(parameter, config, tier):
            form = form_of("bf16-coded")
        scheme = Scheme(form, codec)
        if not scheme.plain:
            yield parameter.name, scheme


def _codec(config: AppConfig, tier: Tier) -> Codec:
    """The codec of a tier's files; what is `auto` has been decided before (`compressions`)."""
    name = config.compression.of(tier.value)
    return Codec(name, config.compression.level) if name == "zstd" or name == "zstd-planes" else NONE


def _wants_coded(parameter: Parameter, config: AppConfig, tier: Tier) -> bool:
    possible = parameter.matrix and parameter.dtype == "bfloat16" and parameter.resident is None
    wanted = config.compression.of(tier.value) == "coded-exponents"
    return wanted and possible and form_of("bf16-coded").fits(parameter.shape)


def compressions(config: AppConfig) -> list[AppConfig]:
    """The configuration for every way to decide where compression is `auto`: nothing is compressed in the first."""
    automatic = [tier.value for tier in FILE_TIERS if config.compression.of(tier.value) == "auto"]
    enabled = [tier for tier in automatic if getattr(config.tiers, tier).enabled]
    decided = []
    for names in product(("none", "zstd-planes"), repeat=len(enabled)):
        chosen = dict.fromkeys(automatic, "none") | dict(zip(enabled, names, strict=True))
        compression = config.compression.model_copy(update=chosen)
        decided.append(config.model_copy(update={"compression": compression}))
    return decided


def precisions(config: AppConfig, manifest: ModelManifest, kind: DeviceKind) -> list[AppConfig]:
    """The configuration for every precision that `precision.permitted` leaves open, the most exact first: one for the
    device and the host pool, whose weights are computed on where they are, and one for files.

    Raises:
        ConfigurationError: a device of this kind computes on none of them.
    """
    precision = config.precision
    if not precision.permitted or not precision.enabled:
        return [config]
    errors: dict[str, float] = {}
    for name in precision.permitted:
        form = _form_named(name, precision.int4_group)
        if form is None or form.dtype is not None or kind == "cpu":
            errors[name] = 0.0 if form is None else form.typical_error(manifest.compute_dtype)
    if not errors:
        raise ConfigurationError(
            f"precision.permitted: {', '.join(precision.permitted)} are computed on by CPUs only in this version; add "
            "source, bf16, fp16 or fp32, or set compute.device to cpu"
        )
    memory = [tier.value for tier in (Tier.DEVICE, Tier.HOST) if getattr(precision, tier.value) is None]
    files = [tier.value for tier in FILE_TIERS if getattr(precision, tier.value) is None]
    pairs = [(m, f) for m in errors for f in errors if (memory and files) or m == f]
    chosen = []
    for m, f in sorted(pairs, key=lambda pair: errors[pair[0]] + errors[pair[1]]):
        update = dict.fromkeys(memory, m) | dict.fromkeys(files, f) | {"permitted": ()}
        chosen.append(config.model_copy(update={"precision": precision.model_copy(update=update)}))
    return chosen


def _form_named(name: str, int4_group: int) -> Form | None:
    """The form that a configuration calls so; None: as in the checkpoint."""
    if name == "source":
        return None
    return form_of(f"int4-{int4_group}" if name == "int4" else name)


def _form(parameter: Parameter, config: AppConfig, tier: Tier) -> Form | None:
    """The form that is asked for; None: as in the checkpoint, also where the parameter cannot have another."""
    precision = config.precision
    if not precision.enabled:
        return None
    wish = getattr(precision, tier.value) or precision.default
    if wish == "auto":
        rules = (rule.precision for rule in precision.adaptive_rules if matches(rule.pattern, parameter))
        wish = next(rules, precision.default_auto_precision)
    form = _form_named(wish, precision.int4_group)
    if form is None:
        return None
    possible = parameter.matrix and form.fits(parameter.shape) and parameter.resident is None
    return form if possible and form.dtype != parameter.dtype else None
