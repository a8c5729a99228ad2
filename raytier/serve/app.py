"""The application builder that `serve run` calls.

It validates and plans, and starts nothing: Serve may run it several times, in a task of its own. It is the
place where an application that cannot work is refused, within seconds and with the reason in `serve status`.
"""

from typing import Any

from ray import serve
from ray.serve import Application

from raytier.actors.prepare import prepare
from raytier.config import parse_config
from raytier.serve.server import LLMServer

#: The scheduler admits and refuses; Serve's own limit (5 by default) would only hide requests from it.
_MAX_ONGOING_REQUESTS = 100_000


def build_app(args: dict[str, Any]) -> Application:
    """The application of `import_path: raytier.serve:build_app`.

    Args:
        args: the tree of `raytier.config.AppConfig`.

    Raises:
        ConfigurationError, CheckpointError, UnsupportedModelError, BudgetError, ResourceNotAvailableError:
            Serve shows the message as the reason of DEPLOY_FAILED.
    """
    config = parse_config(args)
    description, resources = prepare(config)
    deployment = serve.deployment(
        name="LLMServer",
        num_replicas=1,
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": resources.bundles[0]["CPU"]},
        placement_group_bundles=[dict(bundle) for bundle in resources.bundles],
        placement_group_strategy=resources.strategy,
        graceful_shutdown_timeout_s=20,
        health_check_period_s=5,
        health_check_timeout_s=30,
    )(serve.ingress()(LLMServer))
    return deployment.bind(config, description, resources)
