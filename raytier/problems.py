"""What is wrong with what a user has written, in words: field, value, what may be there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError


def explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """The problems of a `root`, a line each, with values where none can be a key: not under `api`, nor of what is
    unknown."""
    lines = []
    for item in error.errors():
        field = ".".join(str(part) for part in item["loc"]) or "configuration"
        if item["type"] == "extra_forbidden":
            lines.append(f"{field}: unknown key; {_known(root, item['loc'])}")
        elif item["type"] == "missing":
            lines.append(f"{field}: required, not given")
        else:
            hidden = item["loc"][:1] == ("api",) or isinstance(item["input"], Mapping)
            shown = "" if hidden else f" (value {item['input']!r})"
            lines.append(f"{field}: {item['msg'].removeprefix('Value error, ')}{shown}")
    return lines


def _known(root: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """The keys that the section around an unknown key does accept."""
    section: Any = root
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        annotation = section.model_fields[part].annotation
        section = next((a for a in getattr(annotation, "__args__", ()) if isinstance(a, type)), annotation)
    return "known here: " + ", ".join(section.model_fields)
