"""What a configuration says of weights: `placement`, `precision` and `compression` (spec B1-B4, C2)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Auto = Literal["auto"]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _pattern(value: str) -> str:
    if value.startswith("re:"):
        import re

        try:
            re.compile(value[3:])
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression: {error}") from None
    return value


#: Of parameter names: a case-insensitive substring, or a regular expression with the prefix `re:`.
Pattern = Annotated[str, Field(min_length=1), AfterValidator(_pattern)]


class PlacementRule(Section):
    """Parameters whose name matches `pattern` go to `tier`.

    The lowest `priority` is tried first; a rule whose tier is full falls through, with the reason noted.
    """

    pattern: Pattern
    tier: Literal["device", "host", "ramdisk", "nvme"]
    priority: int = 99


FixedPrecision = Literal[
    "source", "fp32", "fp16", "bf16", "int8", "int8-dynamic", "int4", "int4-32", "int4-64", "int4-128"
]
Precision = FixedPrecision | Auto


class AdaptiveRule(Section):
    """Parameters whose name matches `pattern` have `precision`, where a tier's precision is auto."""

    pattern: Pattern
    precision: FixedPrecision


class PrecisionSection(Section):
    """How parameters are held, per tier (null: `default`): `source` = as in the checkpoint, so nothing is lost.

    `auto`: the first of `adaptive_rules` that matches, else `default_auto_precision`. `int4` has groups of `int4_group`
    columns with a scale. `permitted`: in place of `default`, the planner takes what makes a step fastest of these, one
    for memory and one for files. `enabled: false` turns all of it off.
    """

    enabled: bool = True
    default: Precision = "source"
    permitted: tuple[FixedPrecision, ...] = ()
    default_auto_precision: FixedPrecision = "source"
    device: Precision | None = None
    host: Precision | None = None
    ramdisk: Precision | None = None
    nvme: Precision | None = None
    int4_group: Literal[32, 64, 128] = 64
    adaptive_rules: tuple[AdaptiveRule, ...] = ()

    @model_validator(mode="after")
    def _one_default(self) -> PrecisionSection:
        if self.permitted and self.default != "source":
            raise ValueError(f"give either default ({self.default!r}) or permitted, from which the planner chooses")
        return self

    def wishes(self, tier: str) -> frozenset[str]:
        """What parameters of a tier may be asked to be; empty where nothing is asked for."""
        if not self.enabled:
            return frozenset()
        own: Precision | None = getattr(self, tier)
        return frozenset(self.permitted or (self.default,)) if own is None else frozenset((own,))


MemoryCompression = Literal["none", "coded-exponents"]
Compression = Literal["none", "coded-exponents", "zstd", "zstd-planes", "auto"]


class CompressionSection(Section):
    """How parameters are compressed on a tier (null: `default`), without loss. `level`: of zstd.

    In files: `zstd-planes` takes bytes of the same significance together, and is the one for bf16, fp16 and fp32;
    `auto`: that one where the measured rates of the disk and of decoding say that it pays. On device and host a default
    of these means none. On every tier: `coded-exponents` makes bf16 matrices smaller that are computed on as they are,
    on processors with AVX512 VBMI2; elsewhere it means none. `enabled: false` turns all of it off.
    """

    enabled: bool = True
    default: Compression = "none"
    device: MemoryCompression | None = None
    host: MemoryCompression | None = None
    ramdisk: Compression | None = None
    nvme: Compression | None = None
    level: int = Field(1, ge=1, le=19)

    def of(self, tier: str) -> Compression:
        """What is done on a tier."""
        wish: Compression = (getattr(self, tier) or self.default) if self.enabled else "none"
        return "none" if tier in ("device", "host") and wish != "coded-exponents" else wish


class Placement(Section):
    rules: tuple[PlacementRule, ...] = ()
