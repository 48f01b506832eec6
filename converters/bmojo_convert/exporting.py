"""What exports to other runtimes have in common: opening the model, their folder, the recorded self-test."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from bmojo_convert.step import ExportError, check_exportable
from bmojo_edge import checkpoint, hub
from bmojo_edge.staging import staged
from bmojo_edge.torch import Model, load

MANIFEST, SELF_TEST = "manifest.json", "self_test.safetensors"


class Target(StrEnum):
    """What a manifest calls its format."""

    onnx = "bmojo-edge onnx"
    coreml = "bmojo-edge coreml"


def open_exportable(source: str | Path) -> Model:
    """The PyTorch twin of a model folder in float32, without gradients. Raises ExportError or CheckpointError."""
    folder = hub.locate(source)
    config, _ = checkpoint.read(folder)
    check_exportable(config)
    lm = load(folder, dtype="float32").eval()
    for parameter in lm.parameters():
        parameter.requires_grad_(False)
    return lm


def exported_folder(out: Path, target: Target, overwrite: bool) -> AbstractContextManager[Path]:
    """A folder that takes its name when it is complete; an export of ours is replaced where `overwrite`."""

    def check(folder: Path) -> None:
        if folder.is_dir() and not any(folder.iterdir()):
            return
        if not overwrite:
            raise ExportError(f"{folder}: exists; choose another name or ask for it to be overwritten")
        try:
            found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["format"]
        except (OSError, ValueError, KeyError, TypeError):
            found = None
        if found != target.value:
            raise ExportError(f"{folder}: exists and is no {target.value} export, so it is not replaced")

    return staged(out, check)


@torch.no_grad()
def record(folder: Path, lm: Model) -> None:
    """Write the tokenizer's files and a self-test: tokens, and the model's logits at some positions."""
    if lm.tokenizer is not None:
        lm.tokenizer.save(folder)
    config = lm.config
    length = 2 * config.chunk_size + config.window + 3  # past the first chunks, and, with room, past the window
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, length)
    # The first chunk is to be read token by token, others at once: nothing inside them is kept.
    ends = np.arange(config.chunk_size, length + 1, config.chunk_size) - 1
    positions = np.unique([0, *ends[:2], *ends[-2:], length - 2, length - 1])
    logits = lm.head(lm.hidden(torch.from_numpy(tokens)[None])[0][0, positions])
    found = {"tokens": tokens.astype(np.int32), "positions": positions, "logits": logits.numpy()}
    save_file(found, folder / SELF_TEST)
