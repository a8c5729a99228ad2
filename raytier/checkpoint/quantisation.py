"""`quantization_bits` of a model's entry as the precision of its tiers (spec B1, E3). Pure."""

from __future__ import annotations

from typing import Literal

from raytier.config import AppConfig


def quantised(config: AppConfig, bits: Literal[4, 8] | None) -> AppConfig:
    """`config` for a model whose entry has these `quantization_bits`: its matrices are int8 or int4 on every tier,
    whatever `precision` says of other models."""
    if bits is None:
        return config
    wish = "int8" if bits == 8 else "int4"
    tiers = dict.fromkeys(("default", "device", "host", "ramdisk", "nvme"), wish)
    precision = config.precision.model_copy(update={"enabled": True, "permitted": (), **tiers})
    return config.model_copy(update={"precision": precision})
