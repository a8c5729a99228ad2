"""Loaders: what brings the files of a model to this machine, one per type of source (spec E1).

A loader of a third party is a class that takes the application's configuration. It is named in the configuration
(`loaders: {s3: "company.models:S3Loader"}`), which works in every process of an application, or registered in Python:

    register_loader("s3", S3Loader)
"""

from __future__ import annotations

import importlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from raytier.config import AppConfig
from raytier.errors import ConfigurationError
from raytier.model_entry import ModelEntry

#: Bytes that are here, and bytes that there will be; 0 when that is not known yet.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class FetchOptions:
    """What a load request may say about fetching. `token`: of the source, never stored or logged."""

    token: str | None = None

    def __repr__(self) -> str:
        return f"FetchOptions(token={'given' if self.token else None})"


class ModelLoader(ABC):
    """Brings the files of models of one type of source to this machine, and gives them up again.

    Methods are called from any thread or event loop, for several models at once; for one model one after the other.
    """

    def check(self, entry: ModelEntry) -> None:  # noqa: B027 - most sources take any path
        """Refuse an entry that can never be loaded, without looking at the source.

        Raises:
            ConfigurationError: names the field, its value and what it should be.
        """

    @abstractmethod
    def find(self, entry: ModelEntry) -> str | None:
        """The directory with all of the model's files as they are here now; None when some have to be fetched.

        Must not reach for a network: applications are planned with it.
        """

    @abstractmethod
    async def load(self, entry: ModelEntry, progress: Progress, options: FetchOptions) -> str:
        """Fetch what is not here and return the directory: absolute, in Hugging Face's layout, and left alone until
        `unload`. `progress` may be called from any thread.

        Cancelling ends it: what was fetched may stay, so that the next call goes on from there.

        Raises:
            ModelLoadingError: the source says no, or cannot be reached; says what to do.
            ResourceNotAvailableError: there is no room for the files.
        """

    async def unload(self, entry: ModelEntry) -> None:  # noqa: B027 - most sources keep what they have fetched
        """The model is not loaded any more: what was made for it alone may go."""


LoaderFactory = Callable[[AppConfig], ModelLoader]

_lock = threading.Lock()
_registered: dict[str, LoaderFactory] = {}


def register_loader(source_type: str, factory: LoaderFactory) -> None:
    """Have models of `source_type` loaded by what `factory` makes, in this process; the configuration's `loaders` say
    it to all processes of an application.

    Raises:
        ConfigurationError: the type has another loader already.
    """
    with _lock:
        if _registered.setdefault(source_type, factory) is not factory:
            raise ConfigurationError(f"source_type {source_type!r} has a loader already: {_registered[source_type]!r}")


def loader_types(config: AppConfig) -> list[str]:
    """The source types that models of this application may have."""
    with _lock:
        return sorted({*_BUILTIN, *_registered, *config.loaders})


class Loaders:
    """The loaders of an application, each made when it is first needed."""

    def __init__(self, config: AppConfig) -> None:
        self._config = config
        self._made: dict[str, ModelLoader] = {}
        self._lock = threading.Lock()

    def of(self, entry: ModelEntry) -> ModelLoader:
        """The loader of an entry's source type, which accepts the entry.

        Raises:
            ConfigurationError: there is none, or it cannot be made, or it refuses the entry.
        """
        with self._lock:
            loader = self._made.get(entry.source_type)
            if loader is None:
                loader = self._made[entry.source_type] = _make(entry, self._config)
        loader.check(entry)
        return loader

    def find(self, entry: ModelEntry) -> str | None:
        """As `ModelLoader.find`; ConfigurationError as `of`."""
        return self.of(entry).find(entry)


def _make(entry: ModelEntry, config: AppConfig) -> ModelLoader:
    source_type = entry.source_type
    with _lock:
        factory = _registered.get(source_type)
    path = config.loaders.get(source_type) or _BUILTIN.get(source_type)
    if factory is None:
        if path is None:
            raise ConfigurationError(
                f"{entry.model_id}: source_type: {source_type!r} has no loader; known: "
                f"{', '.join(loader_types(config))}; others are named in `loaders`"
            )
        factory = _import(source_type, path)
    loader = factory(config)
    if not isinstance(loader, ModelLoader):
        raise ConfigurationError(f"loaders.{source_type}: {path or factory!r} makes no ModelLoader but {loader!r}")
    return loader


def _import(source_type: str, path: str) -> LoaderFactory:
    module, _, name = path.partition(":")
    try:
        factory: LoaderFactory = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"loaders.{source_type}: {path!r} cannot be imported: {error}; it must be module:Class, and installed "
            "where the application runs"
        ) from None
    return factory


_BUILTIN: Mapping[str, str] = {
    "local": "raytier.sources.local:LocalLoader",
    "huggingface": "raytier.sources.huggingface:HuggingFaceLoader",
}
