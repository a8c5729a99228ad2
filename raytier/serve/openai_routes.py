"""The OpenAI routes: chat completions, completions and models.

No `from __future__ import annotations` here: FastAPI reads the annotations at run time.
"""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from raytier.errors import InvalidRequestError, ModelNotFoundError
from raytier.serve.answers import ChatWriter, CompletionWriter, Writer, stream_events
from raytier.serve.backend import Backend
from raytier.serve.errors import JSONBytes, request_id_of
from raytier.serve.generate import ChatInput, Generation, TextInput, prepare
from raytier.serve.schema import (
    ChatCompletion,
    ChatCompletionRequest,
    Completion,
    CompletionRequest,
    ErrorResponse,
    GenerationRequest,
    ModelCard,
    ModelList,
)
from raytier.serve.sse import EventStream, guarded

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "A field is wrong; `param` names it."},
    404: {"model": ErrorResponse, "description": "No such model; the message names the known ones."},
    409: {"model": ErrorResponse, "description": "The model is not loaded; the message says how to load it."},
    429: {"model": ErrorResponse, "description": "The queue is full; see the header Retry-After."},
    503: {"model": ErrorResponse, "description": "The model cannot answer now."},
}
# With a default FastAPI does not document its own 422, which is a 400 here.
_ANY: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorResponse, "description": "Any other error."}}
_GENERATES: dict[int | str, dict[str, Any]] = {
    **_ERRORS,
    **_ANY,
    200: {"content": {"text/event-stream": {}}, "description": "The answer, or its events when `stream` is true."},
}


def make_router(backend: Backend) -> APIRouter:
    """The routes under /v1 over `backend`."""
    router = APIRouter(prefix="/v1", tags=["openai"])

    @router.post(
        "/chat/completions", response_model=ChatCompletion, responses=_GENERATES, summary="Continue a conversation"
    )
    async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
        engine = await backend.engine(body.model)
        chat = ChatInput(
            messages=[message.model_dump(exclude_none=True) for message in body.messages],
            sampling=body.sampling(),
            add_generation_prompt=body.add_generation_prompt is not False,
            template_kwargs=body.chat_template_kwargs or {},
        )
        prompts = await prepare(engine, [chat])
        try:
            generation = await Generation.start(engine, prompts)
        except InvalidRequestError as error:
            if error.param == "prompt":  # the engine's name of what is `messages` here
                raise InvalidRequestError(error.message, param="messages") from None
            raise
        return await _answer(request, body, generation, ChatWriter(engine.model_id, body.include_usage))

    @router.post("/completions", response_model=Completion, responses=_GENERATES, summary="Continue raw prompts")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        engine = await backend.engine(body.model)
        sampling = body.sampling()
        prompts = await prepare(engine, [TextInput(prompt, sampling) for prompt in body.prompt])
        generation = await Generation.start(engine, prompts)
        return await _answer(request, body, generation, CompletionWriter(engine.model_id, body.include_usage))

    @router.get("/models", response_model=ModelList, summary="Models of this server")
    async def list_models() -> Response:
        cards = [_card(model_id, backend.created) for model_id in backend.model_ids()]
        return JSONBytes(ModelList(object="list", data=cards).json_bytes())

    @router.get(
        "/models/{model_id:path}",
        response_model=ModelCard,
        responses={404: _ERRORS[404], **_ANY},
        summary="One model",
    )
    async def get_model(model_id: str) -> Response:
        known = backend.model_ids()
        if model_id not in known:
            raise ModelNotFoundError(f"No model {model_id!r} on this server; known: {', '.join(known)}")
        return JSONBytes(_card(model_id, backend.created).json_bytes())

    return router


async def _answer(request: Request, body: GenerationRequest, generation: Generation, writer: Writer) -> Response:
    """The whole answer, or a stream of it that owns `generation` from then on."""
    if body.stream:
        events = stream_events(generation, writer, body.include_usage)
        return EventStream(guarded(events, request_id_of(request)), generation.aclose)
    try:
        results = await generation.results()
    finally:
        # Ray Serve cancels this task when the client goes away.
        await generation.aclose()
    return JSONBytes(writer.whole(results).json_bytes())


def _card(model_id: str, created: int) -> ModelCard:
    return ModelCard(id=model_id, object="model", created=created, owned_by="raytier")
