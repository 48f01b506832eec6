"""The chat page: the files of one folder, each under its own path and no other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from fastapi import APIRouter
from fastapi.responses import FileResponse, Response

FOLDER = Path(__file__).parent / "page"

HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def files(folder: Path) -> dict[str, Path]:
    """The files by the paths they are served under; `index.html` is the root's. Raises ValueError without one."""
    found = {f"/{path.relative_to(folder).as_posix()}": path for path in sorted(folder.rglob("*")) if path.is_file()}
    index = found.pop("/index.html", None)
    if index is None:
        raise ValueError(f"{folder}: has no index.html; serve without the page")
    return {"/": index, **found}


def router(found: Mapping[str, Path]) -> APIRouter:
    """Routes of exactly these files."""
    routes = APIRouter(include_in_schema=False)
    for path, file in found.items():
        routes.add_api_route(path, _sender(file), methods=["GET", "HEAD"])
    return routes


def _sender(file: Path) -> Callable[[], Awaitable[Response]]:
    async def send() -> Response:
        return FileResponse(file, headers=HEADERS)

    return send
