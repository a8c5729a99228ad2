"""E5: what the startup model's entry says of the application before anything is planned."""

from __future__ import annotations

from typing import Any

import pytest

from raytier.actors.prepare import _as_wanted
from raytier.config import parse_config


@pytest.mark.parametrize(
    ("configured", "preferred", "device"),
    [("auto", "auto", "auto"), ("auto", "cpu", "cpu"), ("auto", "cuda", "cuda"), ("cuda", "cpu", "cuda")],
)
def test_the_startup_model_chooses_the_device_where_that_is_open(configured: str, preferred: str, device: str) -> None:
    entry: dict[str, Any] = {"model_id": "m", "source_path": "builtin:demo", "device_preference": preferred}
    config = parse_config({"models": [entry], "compute": {"device": configured, "threads": 3}})
    wanted = _as_wanted(config, config.models[0])
    assert (wanted.compute.device, wanted.compute.threads) == (device, 3)
    assert wanted.precision == config.precision
