"""G3, first version: which values a request may have."""

from __future__ import annotations

from typing import Any

import pytest

from raytier.checkpoint.manifest import GenerationDefaults
from raytier.engine.sampling_params import SamplingParams
from raytier.errors import InvalidRequestError

DEFAULTS = GenerationDefaults(max_new_tokens=77, temperature=0.3, top_p=0.8, top_k=5, stop_token_ids=(2,))


def test_defaults_of_the_model_and_overrides_of_the_request() -> None:
    assert SamplingParams.from_request(DEFAULTS) == SamplingParams(0.3, 0.8, 5, 77)
    params = SamplingParams.from_request(
        DEFAULTS, temperature=0, top_p=1, top_k=-1, max_tokens=3, seed=9, stop="x", stop_token_ids=[4], ignore_eos=True
    )
    assert params == SamplingParams(0, 1, 0, 3, seed=9, stop=("x",), stop_token_ids=(4,), ignore_eos=True)
    assert SamplingParams.from_request(DEFAULTS, stop=["a", "b"], skip_special_tokens=False).stop == ("a", "b")


@pytest.mark.parametrize(
    ("field", "values", "allowed"),
    [
        ("temperature", [-0.1, 2.1, float("nan"), float("inf"), "hot", True], "between 0|finite number"),
        ("top_p", [0, -1, 1.01, float("nan"), "x"], "above 0 and at most 1|finite number"),
        ("top_k", [-2, 1.5, "x", True], "at least 1"),
        ("max_tokens", [0, -1, 2.5, "x", False], "at least 1"),
        ("seed", [1.5, "x", 2**63, -(2**63) - 1, True], "64-bit"),
        ("stop", [5, [""], [7], ["x"] * 65, ["x" * 1025]], "a list|1 to 1024 characters|at most 64"),
        ("stop_token_ids", [5, [-1], ["x"], [1.0]], "a list|at least 0"),
        ("ignore_eos", ["yes", 1], "true or false"),
        ("include_stop_str_in_output", ["yes"], "true or false"),
        ("skip_special_tokens", [0], "true or false"),
    ],
)
def test_refusals_name_field_value_and_range(field: str, values: list[Any], allowed: str) -> None:
    for value in values:
        with pytest.raises(InvalidRequestError, match=f"^{field} must be .*({allowed})") as refused:
            SamplingParams.from_request(DEFAULTS, **{field: value})
        assert refused.value.param == field
