"""The actors of a node without Serve: Ray, where this process is in no cluster yet, bundles, and the group in them."""

from __future__ import annotations

from contextlib import ExitStack

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from raytier.actors.group import ActorGroup
from raytier.actors.prepare import prepare
from raytier.checkpoint.manifest import ModelDescription
from raytier.config import AppConfig
from raytier.errors import ResourceNotAvailableError

_PLACEMENT_TIMEOUT_S = 60.0


class LocalNode:
    """The actors, from its making until `close`.

    Args:
        name: of the application, in the names of the actors.

    Raises:
        ConfigurationError, CheckpointError, UnsupportedModelError, BudgetError, ResourceNotAvailableError,
        ModelLoadingError: nothing is left then.

    Attributes:
        group: the actors. description: of the startup model, see `prepare`.
    """

    group: ActorGroup
    description: ModelDescription | None

    def __init__(self, name: str, config: AppConfig) -> None:
        self._undo = ExitStack()
        with ExitStack() as undo:
            if not ray.is_initialized():
                ray.init(address="local", include_dashboard=False, log_to_driver=False)
                undo.callback(ray.shutdown)
            # In a task: describing a model takes transformers and torch, which this process does not need.
            try:
                self.description, resources = ray.get(ray.remote(num_cpus=0, max_calls=1)(prepare).remote(config))
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            bundles = placement_group([dict(bundle) for bundle in resources.bundles], strategy=resources.strategy)
            undo.callback(remove_placement_group, bundles)
            if not bundles.wait(_PLACEMENT_TIMEOUT_S):
                raise ResourceNotAvailableError(
                    f"the cluster has no room for {list(resources.bundles)} within {_PLACEMENT_TIMEOUT_S:.0f} s: "
                    "something else holds its resources"
                )
            self.group = ActorGroup(name, config, resources, bundles)
            undo.callback(self.group.stop)
            self.group.start(with_model=True)
            self._undo = undo.pop_all()

    def close(self) -> None:
        """End the actors and what was made for them, Ray too where it was started here; a second call does nothing."""
        self._undo.close()
