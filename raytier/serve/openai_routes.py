"""The OpenAI routes: chat completions, completions and models.

No `from __future__ import annotations` here: FastAPI reads the annotations at run time.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from raytier.errors import InvalidRequestError, ModelNotFoundError
from raytier.serve.answers import ChatWriter, CompletionWriter, Writer, stream_events
from raytier.serve.backend import Backend
from raytier.serve.chat import ChatInput, prepare_chat
from raytier.serve.completion import TextInput, prepare_text
from raytier.serve.errors import JSONBytes, request_id_of
from raytier.serve.generate import Generation, in_thread
from raytier.serve.messages import ChosenTool
from raytier.serve.requests import ChatCompletionRequest, CompletionRequest, GenerationRequest
from raytier.serve.schema import ChatCompletion, Completion, ErrorResponse, ModelCard, ModelList
from raytier.serve.sse import EventStream, guarded

if TYPE_CHECKING:
    from raytier.serve.upstream import Upstream

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


def make_router(backend: Backend, upstream: "Upstream | None" = None) -> APIRouter:
    """The routes under /v1 over `backend`; the models of `upstream` are listed too."""
    router = APIRouter(prefix="/v1", tags=["openai"])

    @router.post(
        "/chat/completions", response_model=ChatCompletion, responses=_GENERATES, summary="Continue a conversation"
    )
    async def chat_completions(request: Request, body: ChatCompletionRequest) -> Response:
        async with backend.using(body.model) as model:
            with _in_their_words(body, prompt="messages"):
                prompt = await in_thread(prepare_chat, model, chat_input(body))
                generation = await Generation.start(model, [prompt], priority=body.priority or 0)
        return await _answer(request, body, generation, ChatWriter(generation, body.include_usage))

    @router.post("/completions", response_model=Completion, responses=_GENERATES, summary="Continue raw prompts")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        texts = TextInput(body.prompt, body.sampling(), bool(body.echo), body.add_special_tokens)
        async with backend.using(body.model) as model:
            with _in_their_words(body, prompt="prompt"):
                prompts = await in_thread(prepare_text, model, texts)
                generation = await Generation.start(model, prompts, priority=body.priority or 0)
        return await _answer(request, body, generation, CompletionWriter(generation, body.include_usage))

    @router.get("/models", response_model=ModelList, summary="Models of this server, and of the one behind it")
    async def list_models() -> Response:
        held = backend.model_ids()
        cards = [_card(backend, model_id).model_dump() for model_id in held]
        if upstream is not None:
            cards += [card for card in await upstream.models() if card["id"] not in held]
        return JSONResponse({"object": "list", "data": cards})

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
        return JSONBytes(_card(backend, model_id).json_bytes())

    return router


def chat_input(body: ChatCompletionRequest) -> ChatInput:
    """What a request's body means."""
    choice = body.tool_choice
    kwargs = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        kwargs.setdefault("reasoning_effort", body.reasoning_effort)
    return ChatInput(
        messages=[message.for_template() for message in body.messages],
        sampling=body.sampling(),
        tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
        tool_choice=choice.model_dump() if isinstance(choice, ChosenTool) else choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=bool(body.continue_final_message),
        template_kwargs=kwargs,
    )


@contextmanager
def _in_their_words(body: GenerationRequest, prompt: str) -> Iterator[None]:
    """An error of the engine's names the field as this route calls it."""
    try:
        yield
    except InvalidRequestError as error:
        name, message = error.param, error.message
        if name == "prompt":
            name = prompt
        elif name == "structured_outputs" and body.form is not None:
            name = body.form[0]
            message = message.replace("structured_outputs", name, 1)
        raise InvalidRequestError(message, param=name) from None


async def _answer(request: Request, body: GenerationRequest, generation: Generation, writer: Writer) -> Response:
    """The whole answer, or a stream of it that owns `generation` from then on."""
    if body.stream:
        events = stream_events(generation, writer, body.include_usage)
        return EventStream(guarded(events, request_id_of(request)), generation.aclose)
    try:
        outputs = await generation.outputs()
    finally:
        # Ray Serve cancels this task when the client goes away.
        await generation.aclose()
    # Parsers read every character: of a long answer, and of many choices, too long for the event loop.
    return JSONBytes(await asyncio.to_thread(lambda: writer.whole(outputs).json_bytes()))


def _card(backend: Backend, model_id: str) -> ModelCard:
    status = backend.runtime.state(model_id)
    return ModelCard(id=model_id, object="model", created=backend.created, owned_by="raytier", status=status)
