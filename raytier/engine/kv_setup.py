"""What an engine's KV has below the device, from the plan. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import blake2b

from raytier.checkpoint.manifest import ModelManifest
from raytier.config import AppConfig
from raytier.hardware.rates import Rates
from raytier.kv.cache import KVCache
from raytier.kv.costs import KVCosts
from raytier.kv.lower import LowerTiers
from raytier.kv.orders import LowerShape
from raytier.planner.budgets import kv_directories
from raytier.planner.cost import PROMPT_TOKENS
from raytier.planner.plan import WeightPlan
from raytier.tiers.aligned import align_up

#: Where the copy rate of memory was not measured.
_COPY_BYTES_PER_S = 4e9
#: Loading takes rows of a block out of one place and puts them into another: about half as fast as a plain copy.
_PACKING = 0.5


def lower_shape(manifest: ModelManifest, plan: WeightPlan, config: AppConfig, kv: KVCache) -> LowerShape | None:
    """The slots that `plan` has room for; None without any."""
    below = plan.kv_below
    sizes = tuple(kv.block_size * manifest.kv_group_token_bytes(window) for window in kv.windows)
    slot = sum(map(align_up, sizes))
    host, disk = below.host_bytes // slot, below.disk_bytes // slot
    if not host:
        return None
    # Weights in other forms make other KV: what they leave on disk is not for each other.
    forms = json.dumps([(placement.name, placement.precision) for placement in plan.placements])
    name = blake2b(kv.root + forms.encode(), digest_size=16).hexdigest()
    return LowerShape(sizes, host, disk, kv_directories(config) if disk else (), name, config.kv.persist)


def host_bytes(shape: LowerShape) -> int:
    """Memory of the host's slots."""
    return shape.host_slots * sum(map(align_up, shape.block_bytes))


def attach_lower(
    kv: KVCache,
    shape: LowerShape,
    restored: Iterable[Iterable[tuple[int, bytes]]],
    plan: WeightPlan,
    rates: Rates,
    config: AppConfig,
) -> None:
    """Let the KV of an engine use what is below the device.

    Args:
        restored: what the executor's files hold from before.
    """
    share = plan.devices[0]
    step = plan.predictions[0].seconds
    token = max(0.0, plan.first_token_seconds - step) / PROMPT_TOKENS
    host = rates.host_to_device_bytes_per_s if share.kind == "cuda" else None
    kv.attach(
        LowerTiers(shape, disk_once=config.kv.disk_once, restored=restored),
        KVCosts(
            step,
            token,
            share.max_num_batched_tokens,
            host or _PACKING * (rates.memory_copy_bytes_per_s or _COPY_BYTES_PER_S),
            rates.disk_read_bytes_per_s,
        ),
    )
