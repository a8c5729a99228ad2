"""The runtime's own routes, under /api: status, models, layers and their transfers, the plan.

No `from __future__ import annotations` here: FastAPI reads the annotations at run time.
"""

from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter, Query
from fastapi.routing import APIRoute

from raytier.serve.runtime import Runtime
from raytier.serve.runtime_schema import (
    GenerateAnswer,
    GenerateRequest,
    KVAnswer,
    Layer,
    LayerGroup,
    ListedModel,
    LoadRequest,
    ModelStatus,
    OperationAnswer,
    Overview,
    PlanAnswer,
    RegisterAnswer,
    RegisterRequest,
    ServerStatus,
    SleepRequest,
    TransferAnswer,
    TransferRequest,
    TransferStatus,
    UnloadRequest,
    WakeRequest,
)
from raytier.serve.schema import ErrorResponse

_TEXTS = {
    400: "A value cannot be served; `param` names the field.",
    404: "No such model, parameter or transfer; the message says what there is.",
    409: "It does not go with what is loaded; the message says what to do first.",
    422: "A field is missing, unknown or out of range; `param` names it.",
    429: "The queue of requests is full; see the header Retry-After.",
    503: "An actor does not answer, or the queue of transfers is full.",
}
_MODEL = Query(None, description="Absent: the startup model, or the only one.")


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    known: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": _TEXTS[status]} for status in statuses
    }
    return {**known, "default": {"model": ErrorResponse, "description": "Any other error."}}


def make_runtime_router(runtime: Runtime, name: str, version: str) -> APIRouter:
    """The routes over `runtime`; `name` and `version` are what /api says about itself."""
    router = APIRouter(prefix="/api")

    @router.get("", summary="What this is, and its routes", tags=["server"])
    async def overview() -> Overview:
        routes = {
            f"{method} {route.path}": route.summary or ""
            for route in router.routes
            if isinstance(route, APIRoute)
            for method in sorted(route.methods or ())
        }
        return Overview(name=name, version=version, docs="/api/docs", routes=routes)

    @router.get("/status", summary="The server, its node, its actors", tags=["server"], responses=_errors(422))
    async def status() -> ServerStatus:
        return await runtime.status()

    @router.post(
        "/models/load",
        status_code=202,
        summary="Begin to load a model",
        tags=["models"],
        responses=_errors(400, 404, 409, 422),
    )
    async def load_model(body: LoadRequest) -> OperationAnswer:
        token = None if body.hf_token is None else body.hf_token.get_secret_value()
        return await runtime.load_model(
            body.model_name_or_path, body.compute_device, force_reload=body.force_reload, token=token
        )

    @router.post(
        "/models/unload",
        summary="Unload a model; answers when everything of it is freed",
        tags=["models"],
        responses=_errors(404, 409, 422, 503),
    )
    async def unload_model(body: UnloadRequest | None = None) -> OperationAnswer:
        body = UnloadRequest() if body is None else body
        return await runtime.unload_model(body.model, body.mode)

    @router.post(
        "/models/sleep",
        summary="Put a model to sleep; answers when it is",
        tags=["models"],
        responses=_errors(404, 409, 422, 503),
    )
    async def sleep_model(body: SleepRequest | None = None) -> OperationAnswer:
        body = SleepRequest() if body is None else body
        return await runtime.sleep_model(body.model, body.mode)

    @router.post(
        "/models/wake",
        status_code=202,
        summary="Begin to wake a model that sleeps",
        tags=["models"],
        responses=_errors(404, 409, 422),
    )
    async def wake_model(body: WakeRequest | None = None) -> OperationAnswer:
        return await runtime.wake_model(None if body is None else body.model)

    @router.post(
        "/models/register",
        summary="Add a model to the registry, or change one",
        tags=["models"],
        responses=_errors(400, 422),
    )
    async def register_model(body: RegisterRequest) -> RegisterAnswer:
        return await runtime.register_model(body.model, persist=body.persist)

    @router.get("/models", summary="The models of the registry, with their states", tags=["models"])
    async def list_models() -> list[ListedModel]:
        return runtime.list_models()

    @router.get("/models/status", summary="State of a model", tags=["models"], responses=_errors(404, 422))
    async def model_status(model: str | None = _MODEL) -> ModelStatus:
        return await runtime.model_status(model)

    @router.post(
        "/models/generate",
        summary="Continue a raw prompt",
        tags=["models"],
        responses=_errors(400, 404, 409, 422, 429, 503),
    )
    async def generate(body: GenerateRequest) -> GenerateAnswer:
        return await runtime.generate_text(**body.model_dump())

    @router.get(
        "/layers",
        summary="Every parameter and where it is now",
        tags=["layers"],
        responses=_errors(404, 409, 422, 503),
        response_model=list[Layer] | list[LayerGroup],
    )
    async def layers(
        model: str | None = _MODEL,
        group: Literal["layer"] | None = Query(None, description="layer: sums by decoder layer."),
    ) -> Sequence[Layer] | Sequence[LayerGroup]:
        return await runtime.layers(model) if group is None else await runtime.layer_groups(model)

    @router.get(
        "/layers/{layer_id}",
        summary="One parameter, by its id or its name",
        tags=["layers"],
        responses=_errors(404, 409, 422, 503),
    )
    async def layer(layer_id: str, model: str | None = _MODEL) -> Layer:
        return await runtime.layer(int(layer_id) if layer_id.isdecimal() else layer_id, model)

    @router.post(
        "/layers/transfer",
        status_code=202,
        summary="Move a parameter or a decoder layer to another tier",
        tags=["layers"],
        responses=_errors(400, 404, 409, 422, 503),
    )
    async def transfer(body: TransferRequest) -> TransferAnswer:
        return await runtime.transfer_layer(
            body.layer_id, body.destination_device, body.priority, layer_index=body.layer_index, model=body.model
        )

    @router.get(
        "/layers/transfer/{transfer_id}",
        summary="How far a transfer is",
        tags=["layers"],
        responses=_errors(404, 422),
    )
    async def transfer_status(transfer_id: str) -> TransferStatus:
        return await runtime.transfer_status(transfer_id)

    @router.get(
        "/kv",
        summary="The KV cache of the loaded model: blocks by tier, what is shared and found again",
        tags=["kv"],
        responses=_errors(404, 409, 422, 503),
    )
    async def kv(model: str | None = _MODEL) -> KVAnswer:
        return await runtime.kv(model)

    @router.get(
        "/plan",
        summary="The plan of the loaded model, with the places that its parameters have now",
        tags=["layers"],
        responses=_errors(404, 409, 422),
    )
    async def plan(model: str | None = _MODEL) -> PlanAnswer:
        return await runtime.plan(model)

    return router
