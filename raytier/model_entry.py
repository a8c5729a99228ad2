"""What is said of one model: an item of `models`, or of the file that `registry` names (spec E3)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

#: The embedded model.
BUILTIN_DEMO = "builtin:demo"
#: The fields that have no default in a registry file.
REQUIRED_FIELDS = ("model_id", "source_type", "source_path", "model_format")
#: Parameters of loaders with such names are used and never written to a file, shown or logged.
_SECRET = re.compile(r"token|secret|passw|credential|api_?key|private_?key", re.IGNORECASE)


class ModelEntry(BaseModel):
    """One model that the application may serve.

    `source_type`, `source_path`: where its files come from: `local` with an absolute path or builtin:demo,
    `huggingface` with an id (org/name) and `revision`, or what a loader was registered for.
    `model_format`: safetensors, or transformers_pt: as transformers reads a directory, safetensors where there are any,
    else PyTorch's .bin files.
    `device_preference`: the application's device has to be that one; auto = it may be any.
    `required_gpu_memory_mb`, `required_ram_mb`: what has to be free before the model is loaded, beside what the plan
    needs by itself.
    `tokenizer_path`: directory of another tokenizer than the model's own.
    `trust_remote_code`: accepted where the model's code is part of transformers all the same.
    `pinned`: it never sleeps to make room for others.
    `tool_call_parser`, `reasoning_parser`: how the model writes calls of tools and its thoughts; auto = as its chat
    template shows, none = answers are text.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_id: str = Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$")
    source_type: str = Field("local", pattern=r"^[a-z][a-z0-9_-]*$", max_length=50)
    source_path: str = Field(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f\x7f]+$")
    model_format: Literal["safetensors", "transformers_pt"] = "safetensors"
    revision: str = Field("main", min_length=1, max_length=200)
    quantization_bits: Literal[4, 8] | None = None
    device_preference: Literal["auto", "cpu", "cuda"] = "auto"
    required_gpu_memory_mb: float | None = Field(None, ge=0)
    required_ram_mb: float | None = Field(None, ge=0)
    custom_loader_params: Mapping[str, Any] = Field(default_factory=dict)
    tokenizer_path: str | None = None
    trust_remote_code: bool = False
    pinned: bool = False
    tool_call_parser: Literal["auto", "none", "hermes", "llama3_json", "mistral", "qwen3"] = "auto"
    reasoning_parser: Literal["auto", "none", "think", "mistral"] = "auto"

    @field_validator("model_format", mode="before")
    @classmethod
    def _readable(cls, value: object) -> object:
        if isinstance(value, str) and value.lower() in ("gguf", "onnx"):
            raise ValueError(
                f"{value} files are not read: give the model's checkpoint of safetensors (or of PyTorch's .bin files, "
                "transformers_pt) instead"
            )
        return value

    @field_validator("tokenizer_path")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and not Path(value).is_absolute():
            raise ValueError("must be an absolute path of a directory with a tokenizer")
        return value

    @model_validator(mode="after")
    def _local_is_absolute(self) -> ModelEntry:
        if (
            self.source_type == "local"
            and self.source_path != BUILTIN_DEMO
            and not Path(self.source_path).is_absolute()
        ):
            raise ValueError(
                f"source_path: {self.source_path!r} must be an absolute path of a model directory, or {BUILTIN_DEMO}"
            )
        return self

    def public(self) -> dict[str, Any]:
        """The fields that were given, as they may be shown and written: without secrets of the loader."""
        fields = self.model_dump(exclude_unset=True)
        if self.custom_loader_params:
            fields["custom_loader_params"] = without_secrets(self.custom_loader_params)
        return fields


def without_secrets(params: Mapping[str, Any]) -> dict[str, Any]:
    """Those parameters whose names are not those of secrets, nested ones included."""
    return {
        name: without_secrets(value) if isinstance(value, Mapping) else value
        for name, value in params.items()
        if not _SECRET.search(str(name))
    }
