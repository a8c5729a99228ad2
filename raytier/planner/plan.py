"""The planner's result: immutable, address-free, picklable. No Ray, no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from math import prod

from raytier.checkpoint.manifest import Parameter
from raytier.codecs.codec import RATIOS
from raytier.codecs.forms import Form
from raytier.codecs.scheme import PLAIN, Scheme


class Tier(StrEnum):
    """Where a parameter lives, fastest first."""

    DEVICE = "device"
    HOST = "host"
    RAMDISK = "ramdisk"
    NVME = "nvme"


#: Tiers whose parameters are read into the ring in every sweep.
FILE_TIERS = (Tier.RAMDISK, Tier.NVME)

#: Upper estimate of what coded exponents leave of bf16 weights.
_CODED_RATIO = 0.72


@dataclass(frozen=True)
class TierSchemes:
    """The scheme of every parameter on every tier: `PLAIN` where `by_tier` does not say.

    Attributes:
        ratios: codec -> dtype of plain elements -> coded over decoded bytes; what is missing does not shrink.
    """

    by_tier: Mapping[Tier, Mapping[str, Scheme]] = field(default_factory=dict)
    ratios: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: RATIOS)

    def of(self, name: str, tier: Tier) -> Scheme:
        return self.by_tier.get(tier, {}).get(name, PLAIN)

    def rounded_to(self, parameter: Parameter, tier: Tier) -> Form | None:
        """The form that a parameter is computed in from a tier, where its weights are not those of the checkpoint."""
        form = self.of(parameter.name, tier).form
        return form if form is not None and form.rounds(parameter.dtype) else None

    def held_nbytes(self, parameter: Parameter, tier: Tier) -> int:
        """Bytes of a parameter where it is computed on from a tier other than the device: in memory, or in the ring."""
        form = self.of(parameter.name, tier).form
        if form is None:
            return parameter.nbytes
        nbytes = form.nbytes(parameter.shape)
        return int(2 * _CODED_RATIO * prod(parameter.shape)) if nbytes is None else nbytes

    def file_nbytes(self, parameter: Parameter, tier: Tier) -> int:
        """Bytes that files of a tier take for a parameter, as far as can be said before it is coded."""
        scheme, nbytes = self.of(parameter.name, tier), self.held_nbytes(parameter, tier)
        dtype = parameter.dtype if scheme.form is None else scheme.form.dtype
        return nbytes if dtype is None else int(nbytes * self.ratios.get(scheme.codec.name, {}).get(dtype, 1.0))

    def decoded_nbytes(self, parameter: Parameter, tier: Tier) -> int:
        """Bytes that are decoded to have a parameter once."""
        coded = self.of(parameter.name, tier).codec.name != "none"
        return self.held_nbytes(parameter, tier) if coded else 0

    def codecs(self, tier: Tier) -> frozenset[str]:
        """Names of the codecs in a tier's files."""
        return frozenset(scheme.codec.name for scheme in self.by_tier.get(tier, {}).values())

    def converted(self, tier: Tier) -> frozenset[str]:
        """Names of what a tier does not hold as the checkpoint does."""
        return frozenset(self.by_tier.get(tier, {}))


@dataclass(frozen=True, slots=True)
class ParameterPlacement:
    """Tier of one parameter and why (`reason`: the rule, the default, or what it fell through).

    Attributes:
        precision: name of the form in which it is held there; `source`: as in the checkpoint.
        codec: of the tier's files.
    """

    name: str
    tier: Tier
    reason: str
    precision: str = "source"
    codec: str = "none"


@dataclass(frozen=True, slots=True)
class DevicePlan:
    """What one device holds. All sizes in bytes.

    `resident_bytes + ring_bytes + expert_bytes + kv_bytes + activation_bytes <= budget_bytes` always holds.

    Attributes:
        kind: "cpu" or "cuda".
        layer_start, layer_stop: decoder layers run here.
        ring_bytes: ring of streamed bytes; 0 when nothing streams.
        expert_bytes: for routed experts that are fetched when the router has chosen them.
        window: decoder layers that the ring can hold ahead of the one that computes.
        head_chunk_rows: vocabulary rows per chunk of a streamed output head; 0 when it is resident.
        activation_bytes: of a step's activations, and of what the reading threads decode with.
        kv_blocks: KV blocks of `block_size` tokens, the null block included.
        max_num_batched_tokens: tokens that one step carries at most.
        max_mixed_tokens: tokens of a step that brings running streams their next ones, which wait for all of it.
        packed: resident linear layers are kept in the layout of the CPU's matrix kernel, because that was measured
            to be faster.
    """

    index: int
    kind: str
    layer_start: int
    layer_stop: int
    budget_bytes: int
    resident_bytes: int
    ring_bytes: int
    window: int
    head_chunk_rows: int
    block_size: int
    kv_blocks: int
    kv_bytes: int
    activation_bytes: int
    max_num_batched_tokens: int
    max_mixed_tokens: int
    packed: bool
    expert_bytes: int = 0

    def __post_init__(self) -> None:
        used = self.resident_bytes + self.ring_bytes + self.expert_bytes + self.kv_bytes + self.activation_bytes
        if used > self.budget_bytes:
            raise ValueError(f"device {self.index}: {used} bytes planned in a budget of {self.budget_bytes}")


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted cost of one step of `batch` sequences: `seconds` = what does not overlap + per layer max(I/O, compute).

    The parts are what each would take alone: reading and copying, linear layers, attention over the KV cache, and the
    calls around all of them. On a CPU the last three add up; reading goes on beside them.
    """

    batch: int
    seconds: float
    io_seconds: float
    compute_seconds: float
    attention_seconds: float = 0.0
    overhead_seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.seconds


@dataclass(frozen=True)
class WeightPlan:
    """Where every parameter of one model lives, and what that is predicted to cost.

    Attributes:
        placements: one per parameter of the manifest, in its order.
        host_bytes: bytes of parameters in the node's RAM pool.
        ramdisk_bytes: bytes of parameters copied to the ramdisk.
        nvme_bytes: bytes of parameters left in the checkpoint files, or copied to the disk tier's directories.
        streamed_bytes: bytes a decode step streams from ramdisk and disk (the embedding counts only as rows).
        predictions: decode steps at batch 1, 8 and 32, each sequence with `context` tokens.
        first_token_seconds: predicted time to first token of a 128-token prompt.
        warnings: what the user should know (a rule that fell through, unused GPUs, ...).
        notes: why the plan is as it is (a tier that would not pay, copies that it makes, ...).
        context: tokens per sequence that the predictions are for.
        schemes: what each tier makes of a parameter that is there, or is moved there.
    """

    model_dir: str
    placements: tuple[ParameterPlacement, ...]
    devices: tuple[DevicePlan, ...]
    host_bytes: int
    ramdisk_bytes: int
    nvme_bytes: int
    streamed_bytes: int
    predictions: tuple[Prediction, ...]
    first_token_seconds: float
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    context: int = 0
    schemes: TierSchemes = field(default_factory=TierSchemes)

    @cached_property
    def tier_of(self) -> dict[str, Tier]:
        return {p.name: p.tier for p in self.placements}


@dataclass(frozen=True, slots=True)
class ResourcePlan:
    """Node budgets as placement-group bundles.

    `bundles[i]` is for `roles[i]`; bundle 0 is the Serve replica. Quantities as Ray wants them
    (CPU and GPU in units, memory in bytes).
    """

    roles: tuple[str, ...]
    bundles: tuple[dict[str, float], ...]
    strategy: str = "STRICT_PACK"
