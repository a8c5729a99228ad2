"""What all request bodies of the OpenAI routes share: strict types, and a decision about every field of the SDK."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from raytier.serve.fields import drop_neutral


def wrong(message: str, param: str | None = None) -> PydanticCustomError:
    """An error with our own text; `param` names the field where pydantic does not know it."""
    # The text goes in as a value: a template of pydantic's would read braces in what the client sent.
    context = {"message": message} if param is None else {"message": message, "param": param}
    return PydanticCustomError("raytier", "{message}", context)


class Body(BaseModel):
    """A part of a request: strict types, unknown keys refused, known ones not implemented only when neutral."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = MappingProxyType({})
    ignored: ClassVar[frozenset[str]] = frozenset()

    @model_validator(mode="before")
    @classmethod
    def _implemented_only(cls, data: object) -> object:
        if not isinstance(data, Mapping):
            return data
        return drop_neutral(data, unsupported=cls.unsupported, ignored=cls.ignored)
