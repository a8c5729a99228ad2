"""Fields that OpenAI clients know and this version does not implement.

A neutral value (one that asks for nothing) is accepted, so that clients which always send every
field work; anything else is refused by name rather than silently ignored.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from pydantic_core import PydanticCustomError

#: Accepted with any value: they do not ask for another text.
IGNORED = frozenset(
    {
        "user",
        "metadata",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
    }
)

#: Field of a request -> its neutral values besides null.
UNSUPPORTED_REQUEST: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "best_of": (1,),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "verbosity": ("medium",),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "moderation": (),
        "service_tier": ("auto", "default"),
        "store": (False,),
    }
)

#: Field of a message -> its neutral values besides null. SDKs send an answer back with these in it.
UNSUPPORTED_MESSAGE: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "refusal": ("",),
        "annotations": ([],),
        "audio": (),
        "function_call": (),
    }
)

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80
_repr.maxlist = _repr.maxdict = 4
_repr.maxlevel = 3


def shown(value: object) -> str:
    """`value` for an error message, shortened."""
    return _repr.repr(value)


def _equal(value: object, neutral: object) -> bool:
    # 1 == True and 0 == False in Python, not in JSON.
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def drop_neutral(
    data: Mapping[str, Any], *, unsupported: Mapping[str, tuple[Any, ...]], ignored: frozenset[str]
) -> dict[str, Any]:
    """`data` without the ignored fields and without unsupported ones that are null or neutral.

    Raises:
        PydanticCustomError: an unsupported field asks for something; `param` in its context names it.
    """
    kept: dict[str, Any] = {}
    for name, value in data.items():
        if name in ignored:
            continue
        if name not in unsupported:
            kept[name] = value
            continue
        neutral = unsupported[name]
        if value is not None and not any(_equal(value, accepted) for accepted in neutral):
            choices = "".join(f" or send {shown(accepted)}" for accepted in neutral[:1])
            message = f"not supported by this version of raytier (value {shown(value)}); leave it out{choices}"
            raise PydanticCustomError("raytier", "{message}", {"param": name, "message": message})
    return kept
