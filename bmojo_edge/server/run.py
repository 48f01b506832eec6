"""Running the application until the process is told to end. This module knows nothing of what requests do."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvicorn
from fastapi import FastAPI

GRACE = 10.0  # seconds that open answers get to finish
REST = 5  # seconds more, to tell the clients of the others


class Server(uvicorn.Server):
    """uvicorn's; an answer still open `grace` seconds after the end has begun ends there, and its client is told."""

    def __init__(self, app: FastAPI, grace: float = GRACE, **options: Any) -> None:
        rest = int(grace) + REST
        super().__init__(uvicorn.Config(app, ws="none", server_header=False, timeout_graceful_shutdown=rest, **options))
        self._app, self._grace = app, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, see the open ones end, and then the application."""
        asyncio.get_running_loop().call_later(self._grace, self._app.state.worker.end)
        await super().shutdown(sockets)
