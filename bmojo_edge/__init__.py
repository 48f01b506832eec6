"""The public face of bmojo-edge: `load`, `generate`, `stream`, `Session`, `Config` and the submodules behind them.

Names are imported when first used, so `import bmojo_edge` loads neither MLX, PyTorch nor typer, and each engine works
where the other is not installed. mlx-lm, when it is imported, knows our model folders from then on (mlx_lm_plugin.py).
This module knows where names live and nothing else.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from bmojo_edge import mlx_lm_plugin

if TYPE_CHECKING:
    from bmojo_edge import checkpoint, config, mlx, reference, torch
    from bmojo_edge.checkpoint import CheckpointError
    from bmojo_edge.config import Config
    from bmojo_edge.generate import Token, generate, stream
    from bmojo_edge.mlx import load
    from bmojo_edge.session import Session, SessionError

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Config",
    "Session",
    "SessionError",
    "Token",
    "checkpoint",
    "config",
    "generate",
    "load",
    "mlx",
    "reference",
    "stream",
    "torch",
]

_HOME = {
    "CheckpointError": "bmojo_edge.checkpoint",
    "Config": "bmojo_edge.config",
    "Session": "bmojo_edge.session",
    "SessionError": "bmojo_edge.session",
    "Token": "bmojo_edge.generate",
    "generate": "bmojo_edge.generate",
    "load": "bmojo_edge.mlx",
    "stream": "bmojo_edge.generate",
}


def __getattr__(name: str) -> object:
    """Import a public name, or a public submodule, when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    return import_module(f"{__name__}.{name}")  # the import itself binds the submodule here


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Face(ModuleType):
    """This package, where `generate` stays the function although a submodule has the same name.

    Importing a submodule assigns it to its package's attribute; for this one name the function is kept instead.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name == "generate" and isinstance(value, ModuleType):
            value = value.generate
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
mlx_lm_plugin.register()
