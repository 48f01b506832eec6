"""What a request has to pass before its body is parsed: the key, and the size of the body. Plain ASGI."""

from __future__ import annotations

import asyncio
import hmac
import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from bmojo_edge.server import answers

BODY_SECONDS = 60.0  # for a body to arrive
DRAINED, DRAIN_SECONDS = 8, 5.0  # of a body that is too large, times the limit is still read, for so long
_READING = ("GET", "HEAD", "OPTIONS")


class _Refusal(Exception):
    """What is sent in place of an answer."""

    def __init__(self, status: int, message: str, code: str, kind: str = "invalid_request_error") -> None:
        super().__init__(message)
        self.status, self.body = status, answers.as_json(answers.error(message, kind, code=code))

    async def send(self, send: Any) -> None:
        """Answer with it, and close the connection."""
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


class Guard:
    """Refuses with 401 without the key, if there is one (not for /health and `open_paths`).

    Refuses bodies too large (413) or slow (408); where `hosts` are given, requests for another host (421): a page
    elsewhere whose name was made to lead here; and what a page of another origin wants changed (403), but for those of
    `origins` ("*": any).
    """

    def __init__(
        self,
        app: Any,
        api_key: str | None,
        max_body: int,
        hosts: frozenset[str] | None = None,
        open_paths: frozenset[str] = frozenset(),
        origins: frozenset[str] = frozenset(),
    ) -> None:
        self._app, self._max_body, self._hosts, self._open = app, max_body, hosts, open_paths | {"/health"}
        self._key, self._origins = None if api_key is None else api_key.encode(), origins

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            self._check(scope, headers)
            body = await self._body(receive, headers)
        except _Refusal as refusal:
            await refusal.send(send)
            return
        if body is None:  # the client has gone
            return
        told = False

        async def replay() -> Any:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _check(self, scope: Any, headers: Mapping[bytes, bytes]) -> None:
        """Who asks, by which name, and from where."""
        host = headers.get(b"host", b"").decode("latin-1")
        if self._hosts is not None and re.sub(r":\d*$", "", host).lower() not in self._hosts:
            message = f"this server is not {host!r}; start it with --host if it should be reached from elsewhere"
            raise _Refusal(421, message, "wrong_host")
        if b"origin" in headers and scope["method"] not in _READING and not self._allows(headers[b"origin"], host):
            raise _Refusal(403, "pages of other origins change nothing here; see --allow-origin", "origin")
        if self._key is not None and scope["path"] not in self._open:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
                message = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
                raise _Refusal(401, message, "invalid_api_key", "authentication_error")

    async def _body(self, receive: Any, headers: Mapping[bytes, bytes]) -> bytes | None:
        """All of it; None where the client has gone."""
        declared = headers.get(b"content-length", b"0")  # the HTTP server refuses what is no number
        if len(declared) < 20 and int(declared) <= self._max_body:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    body = await _read(receive, self._max_body)
            except TimeoutError:
                message = f"the body did not arrive within {BODY_SECONDS:g} seconds"
                raise _Refusal(408, message, "timeout", "timeout_error") from None
            if body is None or len(body) <= self._max_body:
                return body
        await _drain(receive, DRAINED * self._max_body)
        raise _Refusal(413, f"the body is larger than {self._max_body:,} bytes", "body_too_large")

    def _allows(self, origin: bytes, host: str) -> bool:
        """Whether a page of this origin may change something."""
        name = origin.decode("latin-1")
        return name.partition("://")[2] == host != "" or not self._origins.isdisjoint((name, "*"))


async def _read(receive: Any, limit: int, keep: bool = True) -> bytes | None:
    """The body, or its beginning once it is longer than `limit`; None where the client has gone."""
    body, size, more = bytearray(), 0, True
    while more and size <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        piece = message.get("body", b"")
        size += len(piece)
        body += piece if keep else b""
        more = message.get("more_body", False)
    return bytes(body)


async def _drain(receive: Any, limit: int) -> None:
    """Take in what a client goes on sending, within measure: before that is sent, many do not read an answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_SECONDS):
            await _read(receive, limit, keep=False)
