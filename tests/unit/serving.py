"""A server in a thread of the test's process, and its clients."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import uvicorn

from bmojo_edge.engine import LM
from bmojo_edge.generate import stream
from bmojo_edge.server.app import Limits, build

LIMITS = Limits(slots=12, max_running=6, max_waiting=40, max_prompt=200, max_tokens=300, max_body=20_000)


class Served:
    """A running server and its clients."""

    def __init__(self, lm: LM, address: str) -> None:
        self.lm, self.address = lm, address
        self.http = httpx.Client(base_url=address, timeout=30)
        self.openai = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=30)

    def health(self) -> dict[str, Any]:
        return self.http.get("/health").json()

    def alone(self, prompt: Any, **options: Any) -> str:
        return "".join(token.text for token in stream(self.lm, prompt, **options))

    def ask(self, session: str, text: str, **options: Any) -> dict[str, Any]:
        """The response of a turn by id."""
        message = {"role": "user", "content": text}
        body = {"model": "tiny", "messages": [message], "session_id": session, "temperature": 0, **options}
        response = self.post(body)
        assert response.status_code == 200, response.text
        return response.json()

    def post(self, body: Any, path: str = "/v1/chat/completions") -> httpx.Response:
        return self.http.post(path, json=body)


@contextmanager
def serving(lm: LM, limits: Limits = LIMITS, api_key: str | None = None, **options: Any) -> Iterator[Served]:
    app = build(lm, "tiny", limits, api_key, **options)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        served = Served(lm, f"http://127.0.0.1:{listener.getsockname()[1]}")
        try:
            yield served
        finally:
            served.http.close()
            served.openai.close()
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.01)
