"""Opening the model a command works with: a folder, a hub id, or the default model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape

from bmojo_edge.cli.terminal import console, progress_bar

if TYPE_CHECKING:
    from bmojo_edge.engine import LM
    from bmojo_edge.session_file import Origin


def open_model(model: str | None) -> LM:
    """Load a model on MLX, or an export of ours on its runtime, saying on stderr what is being done.

    None is the default model, made where it is missing.
    """
    import bmojo_edge as be
    from bmojo_edge import onnx_runner
    from bmojo_edge.tensors import read_json

    path = _default_model() if model is None else model
    with console.status(f"Loading {escape(str(path))}"):
        manifest = Path(path) / onnx_runner.MANIFEST
        if manifest.is_file():
            if read_json(manifest).get("format") != "bmojo-edge mlxfn":
                return onnx_runner.OnnxModel.load(path)
            from bmojo_edge.mlx.mlxfn_runner import MlxfnModel

            return MlxfnModel.load(path)
        return be.load(path)


def of_session(path: Path, made: Origin, model: str | None, memory: Path | None) -> tuple[str | None, Path | None]:
    """Model and store for a session saved in a file: those given, else those it was made with.

    The model is None where it is no longer there. Raises SessionError where the store is not.
    """
    from bmojo_edge.session_file import SessionError
    from bmojo_edge.storage_files import is_store

    if model is None and made.model is not None and Path(made.model).is_dir():
        model = made.model
    if memory is None and made.store is not None:
        memory = Path(made.store)
        if not is_store(memory):
            raise SessionError(f"{path}: its storage is no longer at {memory}; --memory STORE says where, or a new one")
    return model, memory


def is_default(folder: str) -> bool:
    """Whether a folder is, or was on another machine, the default model's."""
    from bmojo_convert.default import default_model_path

    return Path(folder).name == default_model_path().name


def _default_model() -> Path:
    from bmojo_convert.default import NAME, default_model_path, default_source, ensure_default_model

    path = default_model_path()
    if path.exists():
        console.print(f"[dim]No model given: using {NAME}.[/]")
        return ensure_default_model()
    console.print(
        f"No model given: making {NAME}, a small chat model, from {escape(str(default_source()))}. "
        f"This happens once; it stays in {escape(str(path))}.",
        soft_wrap=True,
    )
    with progress_bar() as progress:
        return ensure_default_model(progress)
