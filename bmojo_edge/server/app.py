"""The HTTP application: OpenAI's paths over one model, sessions, and the chat page.

This module knows paths and what is sent for an error; what a request does is the service's.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException

from bmojo_edge.engine import LM
from bmojo_edge.server import answers, session_routes, static
from bmojo_edge.server.guard import Guard
from bmojo_edge.server.requests import ChatRequest, CompletionRequest
from bmojo_edge.server.schema import ChatCompletion, Health, Model, Models, TextCompletion, describe, responses
from bmojo_edge.server.service import Limits, Refused, Service, Vanished, reply

logger = logging.getLogger(__name__)

__all__ = ["Limits", "build"]


def build(
    lm: LM,
    name: str,
    limits: Limits,
    api_key: str | None = None,
    sessions: Path | None = None,
    pages: Path | None = None,
    hosts: frozenset[str] | None = None,
    origins: frozenset[str] = frozenset(),
) -> FastAPI:
    """The application; `name` is the model's in requests.

    `sessions` is the folder where sessions are saved; None keeps them in memory. `pages` is the folder of the chat
    page, if it is served. `hosts` are the names the server may be called by; None: any. `origins` are those of pages
    elsewhere that may use it; "*": any.
    Raises ValueError where the model cannot be served, OSError where the folder cannot be used.
    """
    service = Service(lm, name, limits, sessions)
    page = {} if pages is None else static.files(pages)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await run_in_threadpool(service.close)

    app = FastAPI(title="bmojo-edge", lifespan=lifespan, docs_url=None, redoc_url=None)  # those pages need a CDN
    app.state.worker = service.worker
    given = {"api_key": api_key, "max_body": limits.max_body, "hosts": hosts, "origins": origins}
    app.add_middleware(Guard, open_paths=frozenset(page), **given)
    if origins:  # around the guard: browsers read its refusals too, and ask without a key whether they may ask
        app.add_middleware(CORSMiddleware, allow_origins=[*origins], allow_methods=["*"], allow_headers=["*"])
    app.include_router(session_routes.router(service))
    app.include_router(static.router(page))

    @app.post(
        "/v1/chat/completions",
        responses=responses(200, ChatCompletion, 400, 404, 409, 429, 500, 503, stream=True),
    )
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        return await service.answer(asked, request)

    @app.post("/v1/completions", responses=responses(200, TextCompletion, 400, 404, 429, 500, 503, stream=True))
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        return await service.answer(asked, request)

    @app.get("/v1/models", responses=responses(200, Models))
    async def models() -> Response:
        return reply(200, {"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{model:path}", responses=responses(200, Model, 404))
    async def model(model: str) -> Response:
        if model != name:
            raise Refused(404, f"model: there is no {model!r} here, only {name!r}", code="model_not_found")
        return reply(200, _model(service))

    @app.get("/health", responses=responses(200, Health, 503))
    async def health() -> Response:
        alive = service.worker.alive
        return reply(200 if alive else 503, {"status": "ok" if alive else "stopped", **service.worker.counts._asdict()})

    @app.get("/metrics", responses=responses(200, None), response_class=PlainTextResponse)
    async def metrics() -> Response:
        text = service.metrics.text(service.worker.counts._asdict(), lm.config.state_bytes())
        return Response(text, media_type="text/plain; version=0.0.4")

    describe(app, keyed=api_key is not None)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(Vanished, _vanished)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    return app


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "bmojo-edge"}


async def _refused(_: Request, error: Any) -> Response:
    response = reply(error.status, error.body)
    if error.status == 429:
        response.headers["retry-after"] = "1"
    return response


async def _vanished(*_: Any) -> Response:
    return Response(status_code=499)  # nobody reads it


_PROBLEMS = {  # where pydantic's own words say less
    "extra_forbidden": "is not supported here",
    "none_required": "is not supported here",
    "model_attributes_type": "must be an object of JSON, sent with content-type: application/json",
}


async def _invalid(_: Request, error: Any) -> Response:
    found = error.errors()
    fields = [
        "body" if one["type"] == "json_invalid" else ".".join(map(str, one["loc"][1:])) or "body" for one in found
    ]
    problems = [_PROBLEMS.get(one["type"], one["msg"]) for one in found]
    message = "; ".join(f"{field}: {problem}" for field, problem in zip(fields[:4], problems, strict=False))
    return reply(400, answers.error(message, "invalid_request_error", fields[0]))


async def _http_error(_: Request, error: Any) -> Response:
    message = f"{error.detail}; /openapi.json tells what there is"
    return reply(error.status_code, answers.error(message, "invalid_request_error"))


async def _unexpected(_: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    return reply(500, answers.error(f"{type(error).__name__}; the server's log says more", "server_error"))
