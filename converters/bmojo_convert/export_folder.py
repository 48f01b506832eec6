"""What exports to other runtimes have in common, whichever engine makes them: refusals, their folder, the self-test."""

from __future__ import annotations

import errno
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from bmojo_edge.config import Config
from bmojo_edge.staging import staged

MANIFEST, SELF_TEST = "manifest.json", "self_test.safetensors"


class ExportError(ValueError):
    """A model that cannot be exported; the message says which of its layers or fields is in the way."""


class Target(StrEnum):
    """What a manifest calls its format."""

    onnx = "bmojo-edge onnx"
    coreml = "bmojo-edge coreml"
    mlxfn = "bmojo-edge mlxfn"


def check_exportable(config: Config) -> None:
    """Raise ExportError where a layer's state grows, naming the layers."""
    if config.growing_layers:
        names, more = ", ".join(map(str, config.growing_layers)), "s" * (len(config.growing_layers) > 1)
        raise ExportError(
            f"layer{more} {names}: full attention has a cache that grows with the text, so there is no step of fixed "
            "shape; convert the model with a window first: bmojo-edge convert SOURCE --window 1024 --out DIR"
        )


@contextmanager
def exported_folder(out: Path, target: Target, overwrite: bool) -> Iterator[Path]:
    """A folder that takes its name when it is complete; an export of ours is replaced where `overwrite`."""

    def check(folder: Path) -> None:
        if folder.is_dir() and not any(folder.iterdir()):
            return
        if not overwrite:
            raise ExportError(f"{folder}: exists; choose another name, or --overwrite replaces it")
        try:
            found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["format"]
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        if found != target.value:
            raise ExportError(f"{folder}: exists and is no {target.value} export, so it is not replaced")

    try:
        with staged(out, check) as folder:
            yield folder
    except OSError as error:  # of a full disk the system names no file, and shutil every one
        if f"[Errno {errno.ENOSPC}]" not in str(error):
            raise
        full = f"{os.strerror(errno.ENOSPC)}, there or in {tempfile.gettempdir()}"
        raise OSError(errno.ENOSPC, full, str(out)) from error


def record_self_test(
    folder: Path, config: Config, length: int, forward: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> None:
    """Write random tokens and a model's logits at some positions; forward: tokens (1, t), positions (n,) -> (n, v)."""
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, length))
    # The first chunk is to be read token by token, others at once: nothing inside them is kept.
    ends = np.arange(config.chunk_size, length + 1, config.chunk_size) - 1
    positions = np.unique([0, *ends[:2], *ends[-2:], length - 2, length - 1])
    found = {"tokens": tokens[0].astype(np.int32), "positions": positions, "logits": forward(tokens, positions)}
    save_file(found, folder / SELF_TEST)
