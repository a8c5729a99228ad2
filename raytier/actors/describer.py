"""Descriptions of models that may be loaded many times: made again only when their files have changed."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass

import ray

from raytier.actors.executor import answer_of
from raytier.checkpoint.manifest import ModelDescription
from raytier.errors import CheckpointError
from raytier.model_entry import ModelEntry

#: Name, size in bytes and time of change of every file.
Stamp = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True, slots=True)
class _Known:
    key: tuple[str, str, str | None, int | None, Stamp]
    description: ModelDescription


class Describer:
    """Describes models; the same object again as long as neither entry nor files change. Safe from any thread."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}
        self._lock = threading.Lock()

    def remember(self, entry: ModelEntry, directory: str, description: ModelDescription) -> None:
        """What a model in `directory` was found to be."""
        self._keep(entry, _Known(_key(entry, directory), description))

    def __call__(self, entry: ModelEntry, directory: str) -> ModelDescription:
        """Blocks for seconds where there is something new.

        Raises:
            CheckpointError, UnsupportedModelError: what there is now cannot be served.
        """
        key = _key(entry, directory)
        with self._lock:
            known = self._known.get(entry.model_id)
        if known is not None and known.key == key:
            return known.description
        # In a process that ends: describing takes transformers and torch.
        task = ray.remote(num_cpus=0, max_calls=1)(_describe)
        description: ModelDescription = answer_of(task.remote(entry, directory))
        self._keep(entry, _Known(key, description))
        return description

    def _keep(self, entry: ModelEntry, known: _Known) -> None:
        with self._lock:
            self._known[entry.model_id] = known


def _describe(entry: ModelEntry, directory: str) -> ModelDescription:
    from raytier.checkpoint.describe import describe_entry

    return describe_entry(entry, directory)


def _key(entry: ModelEntry, directory: str) -> tuple[str, str, str | None, int | None, Stamp]:
    stamp = _stamp(directory)
    if entry.tokenizer_path is not None:
        stamp += _stamp(entry.tokenizer_path)
    return directory, entry.model_format, entry.tokenizer_path, entry.quantization_bits, stamp


def _stamp(directory: str) -> Stamp:
    try:
        with os.scandir(directory) as entries:
            found = [(entry.name, status.st_size, status.st_mtime_ns) for entry in entries if (status := entry.stat())]
    except OSError as error:
        raise CheckpointError(f"{directory}: {error.strerror}; restore the model's directory") from None
    return tuple(sorted(found))
