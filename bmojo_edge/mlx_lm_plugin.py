"""How mlx-lm comes to know `model_type: bmojo` once bmojo_edge is imported, without either importing the other.

mlx-lm has no registry: it imports `mlx_lm.models.<model_type>`, and refuses a folder that brings its own code unless it
is told to trust it. So one finder on `sys.meta_path` answers for `mlx_lm.models.bmojo` with the file of this package,
and when `mlx_lm.utils` is imported its `load_model` is told to take that in place of the folder's copy, which then
never runs. Nothing happens where mlx-lm is not imported. It knows the names of mlx-lm and no model.
"""

from __future__ import annotations

import functools
import inspect
import json
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

MODEL_FILE = "bmojo_model.py"  # its name in a model folder
SOURCE = Path(__file__).parent / "mlx" / MODEL_FILE
_MODEL, _UTILS = "mlx_lm.models.bmojo", "mlx_lm.utils"


class _Utils(SourceFileLoader):
    """Loads `mlx_lm.utils` as it is, then hands it to `_know`."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _know(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == _MODEL:
            return spec_from_file_location(fullname, SOURCE)
        spec = PathFinder.find_spec(fullname, path) if fullname == _UTILS else None
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Utils(fullname, spec.loader.path)
        return spec


def register() -> None:
    """Make mlx-lm load our folders without `trust_remote_code`; harmless when done twice."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
        if _UTILS in sys.modules:
            _know(sys.modules[_UTILS])


def _is_ours(folder: Any) -> bool:
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # mlx-lm says what is wrong with it
        return False
    return isinstance(config, dict) and (config.get("model_type"), config.get("model_file")) == ("bmojo", MODEL_FILE)


def _know(utils: Any) -> None:
    """Let `load_model` read a folder of ours as one that brings no code, unless it may run that code."""
    original = utils.load_model
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_model(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        options = given.arguments
        if options.get("trust_remote_code") or not _is_ours(options["model_path"]):
            return original(*args, **kwargs)
        options["model_config"] = {**(options.get("model_config") or {}), "model_file": None}
        model, config = original(*given.args, **given.kwargs)
        return model, {**config, "model_file": MODEL_FILE}  # what is saved again still names it

    utils.load_model = load_model
