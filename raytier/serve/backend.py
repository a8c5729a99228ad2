"""What the HTTP layer needs from whoever holds the engines."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from prometheus_client.core import Metric

from raytier.serve.runtime import Runtime
from raytier.serve.served import ServedModel


class Backend(Protocol):
    """The Serve deployment, or a test's stand-in. Methods are called on the event loop and must not block."""

    @property
    def created(self) -> int:
        """Unix time in seconds since when the models are offered."""
        ...

    def model_ids(self) -> list[str]:
        """Ids that this server knows, the startup model first."""
        ...

    @property
    def runtime(self) -> Runtime:
        """What /api offers."""
        ...

    def using(self, model_id: str | None) -> AbstractAsyncContextManager[ServedModel]:
        """A model with its engine, which stays until the block ends; waits for one that is being loaded, and wakes one
        that sleeps. None is the only or the startup model.

        Raises:
            ModelNotFoundError: no such model; the message names the known ones.
            RaytierError: the model is known and cannot answer now.
        """
        ...

    def metrics(self) -> Iterable[Metric]:
        """What /metrics shows."""
        ...

    def health(self) -> str | None:
        """None when requests can be served, else the reason why not."""
        ...
