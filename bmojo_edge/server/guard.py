"""What a request has to pass before its body is parsed: the key, and the size of the body. Plain ASGI."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

from bmojo_edge.server import answers

BODY_SECONDS = 60.0  # for a body to arrive


class Guard:
    """Refuses with 401 without the key, if there is one (not for /health), and bodies too large (413) or slow (408)."""

    def __init__(self, app: Any, api_key: str | None, max_body: int) -> None:
        self._app, self._max_body = app, max_body
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._expected is not None and scope["path"] != "/health":
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, self._expected):
                message = "the API key is missing or wrong: send it as 'Authorization: Bearer KEY'"
                await _refuse(send, 401, message, "authentication_error", "invalid_api_key")
                return
        too_large = f"the body is larger than {self._max_body:,} bytes"
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_body:
            await _refuse(send, 413, too_large, "invalid_request_error", "body_too_large")
            return
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _read(receive, self._max_body)
        except TimeoutError:
            late = f"the body did not arrive within {BODY_SECONDS:g} seconds"
            await _refuse(send, 408, late, "timeout_error", "timeout")
            return
        if body is None:
            return
        if len(body) > self._max_body:
            await _refuse(send, 413, too_large, "invalid_request_error", "body_too_large")
            return
        told = False

        async def replay() -> Any:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)


async def _read(receive: Any, limit: int) -> bytes | None:
    """The body, or its beginning once it is longer than `limit`; None where the client has gone."""
    body, more = bytearray(), True
    while more and len(body) <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


async def _refuse(send: Any, status: int, message: str, kind: str, code: str) -> None:
    body = answers.as_json(answers.error(message, kind, code=code))
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
