"""raytier serves Hugging Face language models that are larger than the fastest memory of their machine, on Ray."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytier.llm import LLM

__all__ = ["LLM"]


def __getattr__(name: str) -> Any:
    # Importing any part of the package runs this module: it must not pull in Ray.
    if name == "LLM":
        from raytier.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
