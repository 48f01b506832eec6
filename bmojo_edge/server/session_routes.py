"""The paths of sessions. What they do is `sessions`'; this module knows HTTP only."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path
from fastapi.responses import Response

from bmojo_edge.server.requests import Fork, NewSession, Rewind, SessionTitle
from bmojo_edge.server.schema import Memory, SessionList, SessionObject, SessionWithMessages, responses
from bmojo_edge.server.service import Refused, Service, reply
from bmojo_edge.server.session_folder import ID
from bmojo_edge.server.sessions import UnknownSession

Name = Annotated[str, Path(pattern=ID)]


def router(service: Service) -> APIRouter:
    """The routes."""
    routes, sessions = APIRouter(prefix="/v1/sessions"), service.sessions

    @routes.get("", responses=responses(200, SessionList))
    async def listed() -> Response:
        return reply(200, {"object": "list", "data": sessions.listed()})

    @routes.post("", status_code=201, responses=responses(201, SessionObject, 400, 409, 429, 503))
    async def create(asked: NewSession) -> Response:
        return reply(201, await service.perform(lambda: sessions.create(asked.id, asked.title)))

    @routes.get("/{id}", responses=responses(200, SessionWithMessages, 400, 404))
    def shown(id: Name) -> Response:  # reads a file: in a thread of its own
        try:
            return reply(200, sessions.shown(id))
        except UnknownSession as problem:
            raise Refused(404, str(problem)) from None

    @routes.patch("/{id}", responses=responses(200, SessionObject, 400, 404, 503))
    async def rename(id: Name, asked: SessionTitle) -> Response:
        return reply(200, await service.perform(lambda: sessions.rename(id, asked.title)))

    @routes.delete("/{id}", status_code=204, responses=responses(204, None, 400, 404, 409, 429, 503))
    async def delete(id: Name) -> Response:
        await service.perform(lambda: sessions.delete(id))
        return Response(status_code=204)

    @routes.post("/{id}/fork", status_code=201, responses=responses(201, SessionObject, 400, 404, 409, 429, 503))
    async def fork(id: Name, asked: Fork | None = None) -> Response:
        turns = None if asked is None else asked.turns
        return reply(201, await service.perform(lambda: sessions.fork(id, turns)))

    @routes.post("/{id}/rewind", responses=responses(200, SessionObject, 400, 404, 409, 429, 503))
    async def rewind(id: Name, asked: Rewind) -> Response:
        return reply(200, await service.perform(lambda: sessions.rewind(id, asked.turns)))

    @routes.get("/{id}/memory", responses=responses(200, Memory, 400, 404, 409, 429, 503))
    async def memory(id: Name, attention: Literal["true", "false"] = "true") -> Response:
        found: dict[str, Any] = await service.perform(lambda: sessions.memory(id, attention == "true"))
        return reply(200, found)

    return routes
