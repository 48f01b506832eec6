"""The real server for the tests of its page: a tiny model whose states are its own, and whose words a test chooses."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx

from bmojo_edge.engine import LM
from bmojo_edge.server import static
from bmojo_edge.server.app import Limits, build
from bmojo_edge.server.run import Server

LIMITS = Limits(slots=40, max_running=4, max_prompt=4_000, max_tokens=3_000)


class Scripted:
    """A model that computes as it does and says what it is told to, one answer at a time."""

    def __init__(self, lm: LM) -> None:
        assert lm.tokenizer is not None
        self._lm: Any = lm
        self._ids: list[int] = []
        self._pause = 0.0
        self._start = 0  # position of the last prompt's last token

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lm, name)

    def says(self, text: str, pause: float = 0.0) -> None:
        """What the next answers are, each token after a pause in seconds."""
        tokenizer = self._lm.tokenizer
        self._ids, self._pause = [*tokenizer.encode_continuation(text), min(tokenizer.eos_ids)], pause
        assert tokenizer.decode(self._ids[:-1]) == text

    def prefill(self, tokens: Any, state: Any, lengths: Any = None) -> Any:
        logits, state = self._lm.prefill(tokens, state, lengths)
        self._start = int(state.position[0])
        return logits, state

    def decode_one_token(self, token: Any, state: Any, active: Any = None) -> Any:
        time.sleep(self._pause)
        places = [int(position) - self._start for position in state.position.tolist()]
        logits, state = self._lm.decode_one_token(token, state, active)
        chosen = mx.array([self._ids[place] if 0 <= place < len(self._ids) else self._ids[-1] for place in places])
        return logits + 1e4 * (mx.arange(logits.shape[-1]) == chosen[:, None]), state

    def prefill_with_attention(self, tokens: Any, state: Any) -> Any:
        time.sleep(self._pause * tokens.shape[1])
        return self._lm.prefill_with_attention(tokens, state)


class Served:
    """A server that can be stopped and started again at its address; its sessions are in `folder`."""

    def __init__(self, lm: LM, folder: Path, key: str | None = None) -> None:
        self._lm, self._folder, self._key = Scripted(lm), folder, key
        self.says = self._lm.says
        self._port = 0
        self.start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        model: Any = self._lm
        app = build(model, "tiny", LIMITS, self._key, sessions=self._folder, pages=static.FOLDER)
        self._server = Server(app, 1, log_level="critical")
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._listener]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            assert self._thread.is_alive()
            time.sleep(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        self._listener.close()

    def ask(self, session: str, text: str) -> None:
        """Asks in a session, as another client does."""
        body = {"model": "tiny", "session_id": session, "messages": [{"role": "user", "content": text}]}
        httpx.post(f"{self.address}/v1/chat/completions", json=body, timeout=120).raise_for_status()

    def get(self, path: str) -> dict[str, Any]:
        """What the server tells."""
        headers = {} if self._key is None else {"authorization": f"Bearer {self._key}"}
        return httpx.get(self.address + path, headers=headers, timeout=30).json()
