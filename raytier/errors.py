"""One exception tree. Every message names what is wrong, the value seen and what to change.

All classes take the message as their only positional argument, so that they survive pickling
between Ray processes unchanged.
"""

from __future__ import annotations


class RaytierError(Exception):
    """Base of everything raytier raises on purpose."""

    #: HTTP status that the Serve front answers with when this reaches a client.
    http_status = 500
    #: `type` field of OpenAI's error object.
    openai_type = "internal_error"

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__


class ConfigurationError(RaytierError):
    """A configuration key or value is wrong: the message names the field, the value and the fix."""

    http_status = 400
    openai_type = "invalid_request_error"


class ModelNotFoundError(RaytierError):
    """No model of that name is known to this server."""

    http_status = 404
    openai_type = "not_found_error"


class ModelLoadingError(RaytierError):
    """A model could not be loaded; base of the checkpoint errors."""

    http_status = 500


class CheckpointError(ModelLoadingError):
    """A checkpoint file is missing, truncated, or does not hold what the model needs."""


class UnsupportedModelError(ModelLoadingError):
    """The architecture (or one of its parts) cannot be run by raytier; the message says why."""


class ResourceNotAvailableError(RaytierError):
    """The machine or the cluster lacks something that the application needs."""

    http_status = 503
    openai_type = "server_error"


class BudgetError(ResourceNotAvailableError):
    """The budgets cannot hold the model: needed, available, and the smallest change that would fit."""


class TierError(RaytierError):
    """Reading or writing a tier failed."""

    openai_type = "server_error"


class DamagedError(TierError):
    """A file does not hold what was written to it, or what it held when it was first read; the message says where."""


class InvalidRequestError(RaytierError):
    """A request carries a value that cannot be served.

    Args:
        message: what is wrong and what is allowed.
        param: name of the offending request field, as OpenAI's error object reports it.
    """

    http_status = 400
    openai_type = "invalid_request_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class GenerationError(RaytierError):
    """A request leaves no token to draw, though the engine goes on: what it allows contradicts itself, or its grammar
    grew beyond what can be followed."""

    http_status = 400
    openai_type = "invalid_request_error"


class ParameterNotFoundError(InvalidRequestError):
    """The loaded model has no such parameter or layer."""

    http_status = 404
    openai_type = "not_found_error"


class ConflictError(RaytierError):
    """What is asked does not go with what is loaded, or with what is under way; the message says what to do first."""

    http_status = 409
    openai_type = "conflict_error"


class QueueFullError(RaytierError):
    """The request queue is full; retry after `retry_after_s` seconds."""

    http_status = 429
    openai_type = "rate_limit_error"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TransferQueueFullError(QueueFullError):
    """Too many transfers wait; retry after `retry_after_s` seconds."""

    http_status = 503
    openai_type = "server_error"


class TransferNotFoundError(RaytierError):
    """No transfer of that id is known (any more)."""

    http_status = 404
    openai_type = "not_found_error"


class EngineDeadError(RaytierError):
    """The engine or an actor behind it died; the request cannot be finished."""

    http_status = 503
    openai_type = "server_error"


class RequestTimeoutError(RaytierError):
    """A request took longer than this server lets one take."""

    http_status = 504
    openai_type = "server_error"


class AccessError(RaytierError):
    """A request without a key that it needs (401), or with a wrong one (403)."""

    http_status = 403
    openai_type = "permission_error"

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing
        if missing:
            self.http_status = 401
            self.openai_type = "authentication_error"


class UpstreamError(RaytierError):
    """The server behind this one cannot be reached."""

    http_status = 503
    openai_type = "server_error"


class UpstreamTimeoutError(UpstreamError):
    """The server behind this one did not answer in time."""

    http_status = 504


def reason_of(error: BaseException) -> str:
    """What to tell of an error: our own have a message, others a name as well."""
    return error.message if isinstance(error, RaytierError) else f"{type(error).__name__}: {error}"
