"""The server of apps/onnx-web, in this process."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.absent import absent

APP = Path(__file__).parents[2] / "apps/onnx-web"
if not (APP / "node_modules").is_dir():
    absent("the ONNX page", "run `npm install` in apps/onnx-web", expected=False)


@contextmanager
def served(export: Path) -> Iterator[str]:
    """The page's address, with an export behind it."""
    spec = importlib.util.spec_from_file_location("serve", APP / "serve.py")
    assert spec is not None and spec.loader is not None
    serve = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serve)
    with serve.server(export, 0) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}/"
        found.shutdown()
