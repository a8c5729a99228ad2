"""raytier serves Hugging Face language models that are larger than the fastest memory of their machine, on Ray."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raytier.llm import LLM
    from raytier.manager import ModelManager

__all__ = ["LLM", "ModelManager"]


def __getattr__(name: str) -> Any:
    # Importing any part of the package runs this module: it must not pull in Ray.
    if name == "LLM":
        from raytier.llm import LLM

        return LLM
    if name == "ModelManager":
        from raytier.manager import ModelManager

        return ModelManager
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
