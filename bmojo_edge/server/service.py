"""One model, its worker and its sessions behind HTTP: a request becomes a job, whose tokens come back to an event loop.

A client that goes away cancels its job. This module knows requests and responses; it knows nothing of paths, states or
batches.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response, StreamingResponse

from bmojo_edge.engine import LM
from bmojo_edge.generate import Continuation, prompt_ids
from bmojo_edge.server import answers
from bmojo_edge.server.answers import Answer, usage
from bmojo_edge.server.metrics import Metrics
from bmojo_edge.server.requests import ChatRequest, CompletionRequest
from bmojo_edge.server.scheduler import Job, Said, Scheduler
from bmojo_edge.server.session_folder import SessionFolder
from bmojo_edge.server.sessions import (
    NotYet,
    SessionBusy,
    SessionExists,
    SessionProblem,
    Sessions,
    TooManySessions,
    UnknownSession,
)
from bmojo_edge.server.worker import Busy, Closed, Worker
from bmojo_edge.steps import Steps
from bmojo_edge.tokenizer import Tokenizer

T = TypeVar("T")

PATIENCE = 1.0  # seconds a request waits for a session that answers: one whose client left ends a moment later
POLL = 0.03  # seconds
STATUS = {UnknownSession: 404, SessionExists: 409}  # other problems: 400


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server takes on. `slots` states are held at most; `timeout` is seconds from request to last token."""

    slots: int
    max_running: int = 16
    max_waiting: int = 64
    max_prompt: int = 32_768  # tokens
    max_tokens: int = 4_096  # of an answer; also what a chat gets that names none
    max_body: int = 2**20  # bytes
    max_stored: int = 10_000  # sessions
    timeout: float = 600.0


class Refused(Exception):
    """A request that is answered with an error. `kind` and `code` are OpenAI's."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.kind, self.code = status, kind, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as it is sent; a message that begins with a field's name and a colon is about that field."""
        field = re.match(r"[a-z_]+(?=: )", str(self))
        return answers.error(str(self), self.kind, field and field[0], self.code)


class Vanished(Exception):
    """The client went away."""


class Service:
    """A model, its worker, and what requests have in common."""

    def __init__(self, lm: LM, name: str, limits: Limits, folder: Path | None) -> None:
        if lm.tokenizer is None:
            raise ValueError("this model folder has no tokenizer; put tokenizer.json or tokenizer.model into it")
        self.lm, self.name, self.limits, self.metrics = lm, name, limits, Metrics()
        self.tokenizer: Tokenizer = lm.tokenizer
        scheduler = Scheduler(lm, limits.slots, limits.max_running)
        self.worker = Worker(scheduler, min(limits.max_running, limits.slots) + limits.max_waiting)
        saved = None if folder is None else SessionFolder(folder)
        self.sessions = Sessions(lm, scheduler, self.worker.call, saved, limits.max_stored)
        self._in_line = 0  # requests that wait for their session, or for room
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

        if isinstance(asked, ChatRequest) and asked.session_id is not None:
            job = await self._session_job(asked, asked.session_id, tell)
        else:
            job = await run_in_threadpool(self._job, asked, tell)
        self._submit(job)
        answer = Answer("chat" if isinstance(asked, ChatRequest) else "text", self.name, self.tokenizer, asked.top)
        deadline = loop.time() + self.limits.timeout
        # Begun here: a response whose client is gone already may never ask for its first token.
        gone = asyncio.ensure_future(self._until_gone(request, job))
        self._watching.add(gone)
        gone.add_done_callback(self._watching.discard)
        said = self._said(job, events, gone, deadline)
        if asked.stream:
            wants_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
            chunks = self._chunks(said, job, answer, wants_usage)
            return StreamingResponse(chunks, media_type="text/event-stream", headers=headers)
        whole = [one async for one in said]
        return reply(200, answer.whole(whole, usage(job, len(whole))))

    def _submit(self, job: Job) -> None:
        try:
            self.worker.submit(job)
        except (Busy, Closed) as problem:
            if job.owner is not None:
                owner = job.owner
                self.worker.call(lambda: owner.left(None))
            if isinstance(problem, Closed):
                raise self._ending(problem) from None
            raise self._busy("the server is busy; try again in a moment") from None

    async def perform(self, task: Callable[[], Steps[T]]) -> T:
        """What a task on sessions returns. It waits a moment for an answer to end, longer for all else.

        Raises Refused.
        """
        start, in_line = time.monotonic(), False
        try:
            while True:
                try:
                    return await asyncio.wrap_future(self.worker.perform(task()))
                except SessionBusy as problem:
                    if time.monotonic() > start + PATIENCE:
                        raise Refused(409, str(problem), code="session_busy") from None
                except NotYet as problem:
                    if not in_line and self._in_line >= self.limits.max_waiting:
                        raise self._busy(str(problem)) from None
                    if time.monotonic() > start + self.limits.timeout:
                        raise Refused(408, str(problem), "timeout_error", "timeout") from None
                    self._in_line += not in_line
                    in_line = True
                await asyncio.sleep(POLL)
        except TooManySessions as problem:
            raise self._busy(str(problem)) from None
        except SessionProblem as problem:
            raise Refused(STATUS.get(type(problem), 400), str(problem)) from None
        except Closed as closed:
            raise self._ending(closed) from None
        finally:
            self._in_line -= in_line

    def _busy(self, message: str) -> Refused:
        self.metrics.add("refused")
        return Refused(429, message, "rate_limit_error", "busy")

    def _ending(self, closed: Closed) -> Refused:
        return Refused(503, str(closed), "server_error", "shutting_down")

    async def _session_job(self, asked: ChatRequest, session: str, tell: Callable[[Said | Exception], None]) -> Job:
        try:
            system, text = asked.turn
            if len(await run_in_threadpool(self.tokenizer.encode, text)) > self.limits.max_prompt:  # before others wait
                raise Refused(
                    400, f"messages: have more than {self.limits.max_prompt:,} new tokens, the most read here"
                )
            options = asked.options(self._max_tokens(asked))
            return await self.perform(
                lambda: self.sessions.ask(session, system, text, options, self.limits.max_prompt, tell, asked.top or 0)
            )
        except ValueError as error:
            raise Refused(400, str(error)) from None

    def _max_tokens(self, asked: ChatRequest | CompletionRequest) -> int:
        most = self.limits.max_tokens
        if asked.limit is not None and asked.limit > most:
            raise Refused(400, f"max_tokens: at most {most:,} here, got {asked.limit:,}")
        return most if asked.limit is None else asked.limit

    def _job(self, asked: ChatRequest | CompletionRequest, tell: Callable[[Said | Exception], None]) -> Job:
        """What is to be computed; rendering and encoding a long prompt takes a while."""
        limits, max_tokens = self.limits, self._max_tokens(asked)
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
        loop, cut = asyncio.get_running_loop(), True
        event = asyncio.ensure_future(events.get())
        try:
            while True:
                timeout = deadline - loop.time()
                await asyncio.wait({event, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if not event.done():
                    if gone.done():
                        raise Vanished
                    message = f"not finished within {self.limits.timeout:g} seconds"
                    raise Refused(408, message, "timeout_error", "timeout")
                said = event.result()
                cut = isinstance(said, Said) and said.token.finish_reason is None
                if isinstance(said, Closed):
                    raise self._ending(said)
                if isinstance(said, Exception):
                    raise Refused(500, f"the model failed: {said}", "server_error")
                self.metrics.add("tokens")
                event = asyncio.ensure_future(events.get())
                yield said
                if said.token.finish_reason is not None:
                    self.metrics.add("answers")
                    self.metrics.add("prompt_tokens", job.past + len(job.prompt))
                    self.metrics.add("cached_tokens", job.cached)
                    return
        finally:
            if cut and not gone.done():
                self.metrics.add("cancelled")
            event.cancel()
            gone.cancel()
            self.worker.cancel(job)

    async def _until_gone(self, request: Request, job: Job) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.metrics.add("cancelled")
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

    def close(self) -> None:
        """End what is open, and save the sessions."""
        self.worker.close(self.sessions.save)
        self.sessions.close()


def reply(status: int, content: dict[str, Any]) -> Response:
    """A JSON response."""
    return Response(answers.as_json(content), status, media_type="application/json")


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + answers.as_json(content) + b"\n\n"
