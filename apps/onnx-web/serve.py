"""Serves the page and an export: python apps/onnx-web/serve.py EXPORT [--port 8000]. Only this machine can reach it."""

from __future__ import annotations

import argparse
import functools
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).resolve().parent


class Handler(SimpleHTTPRequestHandler):
    """The files of this folder, and those of the export under /model."""

    def __init__(self, *args: object, export: Path, **more: object) -> None:
        self.export = export
        super().__init__(*args, directory=str(HERE), **more)  # pyright: ignore[reportArgumentType]

    def translate_path(self, path: str) -> str:
        found = Path(super().translate_path(path))  # below this folder, whatever was asked for
        inside = found.relative_to(HERE) if found.is_relative_to(HERE) else Path()
        return str(self.export.joinpath(*inside.parts[1:]) if inside.parts[:1] == ("model",) else found)

    def end_headers(self) -> None:
        # Only pages that are isolated so may share memory between threads.
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()


def server(export: Path, port: int) -> ThreadingHTTPServer:
    """A server that has its port and does not serve yet."""
    return ThreadingHTTPServer(("127.0.0.1", port), functools.partial(Handler, export=export.resolve()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("export", type=Path, help="a folder that `bmojo-edge export onnx` made")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    if not (args.export / "manifest.json").is_file():
        parser.error(f"{args.export}: has no manifest.json, so it is no export")
    if not (HERE / "node_modules").is_dir():
        parser.error(f"run `npm install` in {HERE} first")
    with server(args.export, args.port) as found:
        print(f"http://127.0.0.1:{found.server_port}/", flush=True)
        found.serve_forever()


if __name__ == "__main__":
    main()
