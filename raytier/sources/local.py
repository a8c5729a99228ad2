"""Models in a directory of this machine, and the embedded one."""

from __future__ import annotations

import os

from raytier.config import AppConfig
from raytier.errors import CheckpointError, ConfigurationError
from raytier.model_entry import BUILTIN_DEMO, ModelEntry
from raytier.sources.loader import FetchOptions, ModelLoader, Progress


class LocalLoader(ModelLoader):
    """Nothing is fetched: a model is where its path says."""

    def __init__(self, config: AppConfig) -> None:
        pass

    def check(self, entry: ModelEntry) -> None:
        if entry.source_path.lower().endswith((".gguf", ".onnx", ".bin", ".safetensors", ".pt")):
            raise ConfigurationError(
                f"{entry.model_id}: source_path: {entry.source_path!r} is a file; give the directory of a Hugging Face "
                "model, with config.json and a tokenizer (GGUF and ONNX files are not read)"
            )

    def find(self, entry: ModelEntry) -> str | None:
        directory = local_directory(entry)
        if not os.path.isdir(directory):
            raise CheckpointError(f"{directory}: no such directory; give the directory that holds config.json")
        return directory

    async def load(self, entry: ModelEntry, progress: Progress, options: FetchOptions) -> str:
        directory = self.find(entry)
        assert directory is not None
        return directory


def local_directory(entry: ModelEntry) -> str:
    """Absolute path of a local model."""
    if entry.source_path == BUILTIN_DEMO:
        from raytier.demo import model_path

        return str(model_path())
    return os.path.realpath(entry.source_path)
