"""A server in a thread of the test's process, and its clients."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai

from bmojo_edge.engine import LM
from bmojo_edge.generate import stream
from bmojo_edge.server.app import Limits, build
from bmojo_edge.server.run import Server

ROOT = Path(__file__).parents[2]

LIMITS = Limits(slots=12, max_running=6, max_waiting=40, max_prompt=200, max_tokens=300, max_body=20_000)


class Served:
    """A running server and its clients."""

    def __init__(self, lm: LM, address: str, stop: Callable[[], None] = lambda: None) -> None:
        self.lm, self.address, self.stop = lm, address, stop
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
def serving(
    lm: LM, limits: Limits = LIMITS, api_key: str | None = None, grace: float = 0.5, **options: Any
) -> Iterator[Served]:
    app = build(lm, "tiny", limits, api_key, **options)
    server = Server(app, grace, log_level="error")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        until(lambda: server.started)

        def stop() -> None:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()

        served = Served(lm, f"http://127.0.0.1:{listener.getsockname()[1]}", stop)
        try:
            yield served
        finally:
            served.http.close()
            served.openai.close()
            stop()


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not come to pass"
        time.sleep(0.01)


def serve(*arguments: str) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    code = "from bmojo_edge.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "serve", *arguments],
        cwd=ROOT, env=os.environ | {"NO_COLOR": "1", "COLUMNS": "200"}, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


@contextmanager
def command(model: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """The command once it listens, its address, and what it has said."""
    child = serve(str(model), "--port", "0", *arguments)
    try:
        assert child.stderr is not None
        said = ""
        while "running on" not in said:
            line = child.stderr.readline()
            assert line, said
            said += line
        yield child, re.findall(r"http://127\.0\.0\.1:\d+", said)[0], said
    finally:
        child.kill()
        child.communicate()
