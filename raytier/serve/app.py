"""The application builder that `serve run` calls.

It validates and plans, and starts nothing: Serve may run it several times, in a task of its own. It is the
place where an application that cannot work is refused, within seconds and with the reason in `serve status`.
"""

from collections import Counter
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus
from ray.util import placement_group_table

from raytier.actors.prepare import prepare
from raytier.config import parse_config
from raytier.errors import RaytierError
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
    try:
        config = parse_config(args)
        description, resources = prepare(config, _reclaimable())
    except RaytierError as error:
        raise _refusal(error) from None
    deployment = serve.deployment(
        name="LLMServer",
        num_replicas=1,
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        ray_actor_options={"num_cpus": resources.bundles[0]["CPU"]},
        placement_group_bundles=[dict(bundle) for bundle in resources.bundles],
        placement_group_strategy=resources.strategy,
        graceful_shutdown_timeout_s=20,
        health_check_period_s=2,
        health_check_timeout_s=30,
    )(serve.ingress()(LLMServer))
    return deployment.bind(config, description, resources)


def _refusal(error: RaytierError) -> RaytierError:
    """`error` as Serve takes the refusal of a builder: of a RayServeException it reports the message and nothing else,
    at once; anything else it tries three times more and reports with its traceback."""
    kind = type(error)
    refusal: type[RaytierError] = type(kind.__name__, (kind, RayServeException), {"__module__": kind.__module__})
    return refusal(error.message)


def _reclaimable() -> dict[str, Counter[str]]:
    """Resources that each node gets back when Serve stops the replicas of the application that is being deployed.

    A builder is not told the name of its application, but while it runs in Serve's task the application is DEPLOYING.
    """
    applications = serve.status().applications
    deploying = [name for name, app in applications.items() if app.status == ApplicationStatus.DEPLOYING]
    prefixes = tuple(f"SERVE_REPLICA::{name}#" for name in deploying)
    freed: dict[str, Counter[str]] = {}
    for group in placement_group_table().values():
        if group["state"] == "CREATED" and group["name"].startswith(prefixes):
            for index, bundle in group["bundles"].items():
                freed.setdefault(group["bundles_to_node_id"][index], Counter()).update(bundle)
    return freed
