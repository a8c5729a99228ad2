"""G3: which values a request may have."""

from __future__ import annotations

from typing import Any

import pytest

from raytier.checkpoint.manifest import GenerationDefaults
from raytier.engine.sampling_params import SamplingParams
from raytier.engine.structured import StructuredOutputs
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
        ("n", [0, 129, 1.0, True], "between 1 and 128"),
        ("min_p", [-0.1, 1.1, "x"], "between 0 and 1"),
        ("repetition_penalty", [0, -1, float("inf")], "above 0"),
        ("presence_penalty", [-2.1, 2.1, "x"], "between -2 and 2"),
        ("frequency_penalty", [-2.1, 2.1, True], "between -2 and 2"),
        ("logit_bias", [5, [1], {"x": 1}, {-1: 1}, {3: 101}, {3: "x"}, {3: 1, "3": 2}], "a map"),
        ("logit_bias", [dict.fromkeys(range(1025), 1)], "at most 1024"),
        ("min_tokens", [-1, 1.5, 78], "at least 0|at most max_tokens"),
        ("logprobs", [-1, 21, 1.5, True], "between 0 and 20"),
        ("prompt_logprobs", [-1, 21, "x"], "between 0 and 20"),
        ("bad_words", ["x", [""], [7], ["x"] * 1025], "a list|1 to 1024 characters|at most 1024"),
        ("allowed_token_ids", [5, [], [-1], ["x"]], "a list|at least 0"),
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


def test_lists_and_maps_become_tuples() -> None:
    params = SamplingParams.from_request(
        DEFAULTS, logit_bias={"5": 1.5, 7: -100}, bad_words=["a"], allowed_token_ids=[3, 4], n=2, logprobs=0
    )
    assert params.logit_bias == ((5, 1.5), (7, -100))
    assert (params.bad_words, params.allowed_token_ids, params.n, params.logprobs) == (("a",), (3, 4), 2, 0)
    structured = SamplingParams.from_request(DEFAULTS, structured_outputs={"choice": ["a", "b"], "regex": None})
    assert structured.structured_outputs == StructuredOutputs(choice=("a", "b"))


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(InvalidRequestError, match="unknown sampling field 'best_of'; known: temperature, ") as refused:
        SamplingParams.from_request(DEFAULTS, best_of=2)
    assert refused.value.param == "best_of"


def test_nothing_is_generated_only_for_the_logprobs_of_a_prompt() -> None:
    assert SamplingParams.from_request(DEFAULTS, max_tokens=0, prompt_logprobs=0).max_tokens == 0
