"""E5, B1: what an entry asks for of the node, and what its `quantization_bits` make of the configuration."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from raytier.catalog.resources import check_resources
from raytier.checkpoint.quantisation import quantised
from raytier.config import parse_config
from raytier.errors import RaytierError, ResourceNotAvailableError, UnsupportedModelError
from raytier.hardware.inventory import take_inventory
from raytier.model_entry import ModelEntry
from raytier.planner.budgets import DeviceKind, store_directories

MIB = 2**20


def entry(**fields: Any) -> ModelEntry:
    return ModelEntry.model_validate({"model_id": "m", "source_path": "builtin:demo", **fields})


@pytest.mark.parametrize(
    ("fields", "kind", "error", "said"),
    [
        ({"device_preference": "cuda"}, "cpu", ResourceNotAvailableError, "device_preference: cuda is wanted"),
        ({"device_preference": "cpu"}, "cuda", ResourceNotAvailableError, "computes on cuda"),
        ({"quantization_bits": 8}, "cuda", UnsupportedModelError, "quantization_bits: 8: .*CPUs only"),
        (
            {"required_ram_mb": 101},
            "cpu",
            ResourceNotAvailableError,
            "101 MB of RAM .* 100 MB are free: 1 MB are missing",
        ),
        ({"required_gpu_memory_mb": 5}, "cuda", ResourceNotAvailableError, "5 MB are missing"),
    ],
)
def test_what_cannot_be_is_refused(
    fields: dict[str, Any], kind: DeviceKind, error: type[RaytierError], said: str
) -> None:
    inventory = replace(take_inventory(), ram_available=100 * MIB, gpus=())
    with pytest.raises(error, match=said):
        check_resources(entry(**fields), kind, inventory)


@pytest.mark.parametrize(
    "fields",
    [
        {"device_preference": "cpu"},
        {"quantization_bits": 4},
        {"required_ram_mb": 100, "required_gpu_memory_mb": 10_000},  # a CPU node has no GPU memory to ask for
    ],
)
def test_what_can_be_is_not(fields: dict[str, Any]) -> None:
    check_resources(entry(**fields), "cpu", replace(take_inventory(), ram_available=100 * MIB))


def test_quantization_bits_go_before_the_precision_of_the_application() -> None:
    models = [{"model_id": "m", "source_path": "builtin:demo"}]
    config = parse_config({"models": models, "precision": {"enabled": False, "nvme": "bf16"}})
    assert quantised(config, None) is config
    assert not store_directories(config)
    for bits, wanted in ((8, "int8"), (4, "int4")):
        precision = quantised(config, bits).precision  # type: ignore[arg-type]
        assert precision.enabled
        assert {getattr(precision, tier) for tier in ("device", "host", "ramdisk", "nvme")} == {wanted}
        assert store_directories(quantised(config, bits))  # type: ignore[arg-type]
