"""Routes about the server and its tokenizers: /health, /version, /metrics, /tokenize, /detokenize.

No `from __future__ import annotations` here: FastAPI reads the annotations at run time.
"""

import asyncio
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from raytier.errors import InvalidRequestError
from raytier.serve.backend import Backend
from raytier.serve.chat import ChatInput, render
from raytier.serve.errors import JSONBytes
from raytier.serve.metrics import exposition
from raytier.serve.requests import DetokenizeRequest, TokenizeRequest
from raytier.serve.schema import DetokenizeAnswer, ErrorResponse, TokenizeAnswer
from raytier.serve.served import ServedModel

_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "A field is wrong; `param` names it."},
    404: {"model": ErrorResponse, "description": "No such model; the message names the known ones."},
    409: {"model": ErrorResponse, "description": "The model is not loaded; the message says how to load it."},
    "default": {"model": ErrorResponse, "description": "Any other error."},
}


def make_server_router(backend: Backend, version: str) -> APIRouter:
    """The routes over `backend`; `version` is what /version says."""
    router = APIRouter(tags=["server"])

    @router.get(
        "/health",
        summary="200 when requests can be served, else 503 with the reason",
        responses={503: {"description": "Requests cannot be served; `reason` says why."}},
    )
    async def health() -> JSONResponse:
        reason = backend.health()
        if reason is not None:
            return JSONResponse({"status": "unavailable", "reason": reason}, status_code=503)
        return JSONResponse({"status": "ok", "models": backend.model_ids()})

    @router.get("/version", summary="Version of raytier")
    async def get_version() -> dict[str, Any]:
        return {"version": version}

    @router.get(
        "/metrics",
        summary="Prometheus metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format."}},
    )
    async def metrics() -> Response:
        return Response(exposition(backend.metrics()), headers={"Content-Type": CONTENT_TYPE_LATEST})

    @router.post("/tokenize", summary="Token ids of a text or a chat", responses=_ERRORS, response_model=TokenizeAnswer)
    async def tokenize(body: TokenizeRequest) -> Response:
        async with backend.using(body.model) as model:
            return JSONBytes((await asyncio.to_thread(_tokenize, model, body)).json_bytes())

    @router.post("/detokenize", summary="Text of token ids", responses=_ERRORS, response_model=DetokenizeAnswer)
    async def detokenize(body: DetokenizeRequest) -> Response:
        async with backend.using(body.model) as model:
            known = model.engine.config.vocab_size
            if wrong := [token for token in body.tokens if not 0 <= token < known]:
                raise InvalidRequestError(f"tokens must be between 0 and {known - 1}, got {wrong[0]}", param="tokens")
            tokenizer = model.engine.tokenizer
            text = await asyncio.to_thread(tokenizer.decode, body.tokens, skip_special_tokens=False)
        return JSONBytes(DetokenizeAnswer(prompt=text).json_bytes())

    return router


def _tokenize(model: ServedModel, body: TokenizeRequest) -> TokenizeAnswer:
    tokenizer = model.engine.tokenizer
    if body.prompt is not None:
        text, param, add = body.prompt, "prompt", body.add_special_tokens
    else:
        chat = ChatInput(
            messages=[message.for_template() for message in body.messages or ()],
            tools=[tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
            template_kwargs=body.chat_template_kwargs or {},
        )
        # The rendered template holds its special tokens already.
        text, param, add = render(model, chat), "messages", bool(body.add_special_tokens)
    tokens = model.encode(text, param, add_special_tokens=add)
    extra: dict[str, Any] = {}
    if body.return_token_strs:
        extra["token_strs"] = [tokenizer.token(token) or "" for token in tokens]
    return TokenizeAnswer(
        count=len(tokens), max_model_len=model.engine.config.max_context, tokens=list(tokens), **extra
    )
