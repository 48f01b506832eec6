"""The HTTP application: OpenAI's paths over one model.

A request becomes a job of the worker; its tokens come back through a queue of this event loop. A client that goes away
cancels its job. This module knows HTTP; it knows nothing of states or batches.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from starlette.exceptions import HTTPException

from bmojo_edge.engine import LM
from bmojo_edge.generate import Continuation, prompt_ids
from bmojo_edge.server import answers
from bmojo_edge.server.answers import Answer, usage
from bmojo_edge.server.guard import Guard
from bmojo_edge.server.metrics import Metrics
from bmojo_edge.server.requests import ChatRequest, CompletionRequest
from bmojo_edge.server.scheduler import Job, Said, Scheduler
from bmojo_edge.server.worker import Busy, Closed, Worker
from bmojo_edge.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes on. `slots` states are held at most; `timeout` is seconds from request to last token."""

    slots: int
    max_running: int = 16
    max_waiting: int = 64
    max_prompt: int = 32_768  # tokens
    max_tokens: int = 4_096  # of an answer; also what a chat gets that names none
    max_body: int = 2**20  # bytes
    timeout: float = 600.0


class Refused(Exception):
    """A request that is answered with an error. `kind` and `code` are OpenAI's."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as it is sent."""
        return answers.error(str(self), self.kind, code=self.code)


class Vanished(Exception):
    """The client went away."""


class Service:
    """A model, its worker, and what requests have in common."""

    def __init__(self, lm: LM, name: str, limits: Limits) -> None:
        if lm.tokenizer is None:
            raise ValueError("this model folder has no tokenizer; put tokenizer.json or tokenizer.model into it")
        self.lm, self.name, self.limits, self.metrics = lm, name, limits, Metrics()
        self.tokenizer: Tokenizer = lm.tokenizer
        scheduler = Scheduler(lm, limits.slots, limits.max_running)
        self.worker = Worker(scheduler, min(limits.max_running, limits.slots) + limits.max_waiting)
        self.created = int(time.time())
        self._watching: set[asyncio.Future[None]] = set()  # the event loop alone would not keep them

    async def answer(self, asked: ChatRequest | CompletionRequest, request: Request) -> Response:
        """The response to a request for text. Raises Refused."""
        self.metrics.add("requests")
        if asked.model != self.name:
            raise Refused(404, f"model: there is no {asked.model!r} here, only {self.name!r}", code="model_not_found")
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Said | Exception]()

        def tell(event: Said | Exception) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = await run_in_threadpool(self._job, asked, tell)
        kind = "chat" if isinstance(asked, ChatRequest) else "text"
        answer = Answer(kind, self.name, self.tokenizer, asked.top)
        deadline = loop.time() + self.limits.timeout
        try:
            self.worker.submit(job)
        except Busy:
            self.metrics.add("refused")
            raise Refused(429, "the server is busy; try again in a moment", "rate_limit_error", "busy") from None
        except Closed:
            raise Refused(503, "the server is shutting down", "server_error", "shutting_down") from None
        # Begun here: a response whose client is gone already may never ask for its first token.
        gone = asyncio.ensure_future(self._until_gone(request, job))
        self._watching.add(gone)
        gone.add_done_callback(self._watching.discard)
        said = self._said(job, events, gone, deadline)
        if asked.stream:
            wants_usage = asked.stream_options is not None and asked.stream_options.include_usage
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            chunks = self._chunks(said, job, answer, wants_usage)
            return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)
        whole = [one async for one in said]
        return reply(200, answer.whole(whole, usage(job, len(whole))))

    def _job(self, asked: ChatRequest | CompletionRequest, tell: Callable[[Said | Exception], None]) -> Job:
        """What is to be computed; rendering and encoding a long prompt takes a while."""
        limits = self.limits
        max_tokens = limits.max_tokens if asked.limit is None else asked.limit
        if max_tokens > limits.max_tokens:
            raise Refused(400, f"max_tokens: at most {limits.max_tokens:,} here, got {max_tokens:,}")
        try:
            ids = prompt_ids(self.lm, asked.text)
            if len(ids) > limits.max_prompt:
                message = f"the prompt has {len(ids):,} tokens; at most {limits.max_prompt:,} are read here"
                raise Refused(400, message, code="context_length_exceeded")
            run = Continuation(self.lm, None, ids, **asked.options(max_tokens))
        except ValueError as error:  # every error of prompts, templates and options, each naming what is wrong
            raise Refused(400, str(error)) from None
        return Job(run, tell, asked.top or 0)

    async def _said(
        self, job: Job, events: asyncio.Queue[Said | Exception], gone: asyncio.Future[None], deadline: float
    ) -> AsyncIterator[Said]:
        """The tokens of a job; however this is left, the job has ended. Raises Refused or Vanished."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                event = asyncio.ensure_future(events.get())
                timeout = deadline - loop.time()
                await asyncio.wait({event, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    event.cancel()
                    self.metrics.add("cancelled")
                    if gone.done():
                        raise Vanished
                    message = f"not finished within {self.limits.timeout:g} seconds"
                    raise Refused(408, message, "timeout_error", "timeout")
                said = event.result()
                if isinstance(said, Closed):
                    raise Refused(503, str(said), "server_error", "shutting_down")
                if isinstance(said, Exception):
                    raise Refused(500, f"the model failed: {said}", "server_error")
                self.metrics.add("tokens")
                yield said
                if said.token.finish_reason is not None:
                    self.metrics.add("answers")
                    self.metrics.add("prompt_tokens", len(job.prompt))
                    self.metrics.add("cached_tokens", job.cached)
                    return
        finally:
            gone.cancel()
            self.worker.cancel(job)

    async def _until_gone(self, request: Request, job: Job) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.worker.cancel(job)

    async def _chunks(
        self, said: AsyncIterator[Said], job: Job, answer: Answer, wants_usage: bool
    ) -> AsyncIterator[bytes]:
        """Server-sent events, as OpenAI's API has them."""
        count = 0
        try:
            opening = answer.opening()
            if opening is not None:
                yield _event(opening)
            async for one in said:
                count += 1
                chunk = answer.chunk(one)
                if chunk is not None:
                    yield _event(chunk)
            if wants_usage:
                yield _event(answer.closing(usage(job, count)))
            yield b"data: [DONE]\n\n"
        except Refused as refused:  # the status is sent already
            yield _event(refused.body)
        except Vanished:
            pass
        finally:
            await said.aclose()  # pyright: ignore[reportAttributeAccessIssue]
            self.worker.cancel(job)


def build(lm: LM, name: str, limits: Limits, api_key: str | None = None) -> FastAPI:
    """The application; `name` is the model's in requests. Raises ValueError where the model cannot be served."""
    service = Service(lm, name, limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await run_in_threadpool(service.worker.close)

    app = FastAPI(title="bmojo-edge", lifespan=lifespan, docs_url=None, redoc_url=None)  # those pages need a CDN
    app.add_middleware(Guard, api_key=api_key, max_body=limits.max_body)

    @app.post("/v1/chat/completions")
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        return await service.answer(asked, request)

    @app.post("/v1/completions")
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        return await service.answer(asked, request)

    @app.get("/v1/models")
    async def models() -> Response:
        return reply(200, {"object": "list", "data": [_model(service)]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        if model != name:
            raise Refused(404, f"model: there is no {model!r} here, only {name!r}", code="model_not_found")
        return reply(200, _model(service))

    @app.get("/health")
    async def health() -> Response:
        alive = service.worker.alive
        return reply(200 if alive else 503, {"status": "ok" if alive else "stopped", **service.worker.counts._asdict()})

    @app.get("/metrics")
    async def metrics() -> Response:
        text = service.metrics.text(service.worker.counts._asdict(), lm.config.state_bytes())
        return Response(text, media_type="text/plain; version=0.0.4")

    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(Vanished, _vanished)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    return app


def reply(status: int, content: dict[str, Any]) -> Response:
    """A JSON response."""
    return Response(answers.as_json(content), status, media_type="application/json")


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + answers.as_json(content) + b"\n\n"


def _model(service: Service) -> dict[str, Any]:
    return {"id": service.name, "object": "model", "created": service.created, "owned_by": "bmojo-edge"}


async def _refused(_: Request, error: Any) -> Response:
    response = reply(error.status, error.body)
    if error.status == 429:
        response.headers["retry-after"] = "1"
    return response


async def _vanished(*_: Any) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _invalid(_: Request, error: Any) -> Response:
    found = error.errors()  # several where a field may be of several kinds
    fields = [
        "body" if one["type"] == "json_invalid" else ".".join(map(str, one["loc"][1:])) or "body" for one in found
    ]
    message = "; ".join(f"{field}: {one['msg']}" for field, one in zip(fields[:4], found, strict=False))
    return reply(400, answers.error(message, "invalid_request_error", fields[0]))


async def _http_error(_: Request, error: Any) -> Response:
    return reply(error.status_code, answers.error(str(error.detail), "invalid_request_error"))


async def _unexpected(_: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    return reply(500, answers.error(f"{type(error).__name__}; the server's log says more", "server_error"))
