"""The description of a model that may be loaded many times: made again only when its files have changed."""

from __future__ import annotations

import os

import ray

from raytier.actors.executor import answer_of
from raytier.checkpoint.manifest import ModelDescription
from raytier.errors import CheckpointError

#: Name, size in bytes and time of change of every file.
Stamp = tuple[tuple[str, int, int], ...]


class Describer:
    """Gives the description of the model in `directory`, which is `description` as long as no file changes."""

    def __init__(self, directory: str, description: ModelDescription) -> None:
        self._directory = directory
        self._description = description
        self._stamp = _stamp(directory)

    def __call__(self) -> ModelDescription:
        """Blocks for seconds where files have changed.

        Raises:
            CheckpointError, UnsupportedModelError: what there is now cannot be served.
        """
        stamp = _stamp(self._directory)
        if stamp != self._stamp:
            # In a process that ends: describing takes transformers and torch.
            self._description = answer_of(ray.remote(num_cpus=0, max_calls=1)(_describe).remote(self._directory))
            self._stamp = stamp
        return self._description


def _describe(directory: str) -> ModelDescription:
    from raytier.checkpoint.describe import describe_model

    return describe_model(directory)


def _stamp(directory: str) -> Stamp:
    try:
        with os.scandir(directory) as entries:
            found = [(entry.name, status.st_size, status.st_mtime_ns) for entry in entries if (status := entry.stat())]
    except OSError as error:
        raise CheckpointError(f"{directory}: {error.strerror}; restore the model's directory") from None
    return tuple(sorted(found))
