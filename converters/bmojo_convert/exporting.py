"""What exports made through PyTorch have in common: opening the model, its tokenizer and its recorded self-test."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from bmojo_convert.export_folder import check_exportable, record_self_test
from bmojo_edge import checkpoint, hub
from bmojo_edge.torch import Model, load


def open_exportable(source: str | Path) -> Model:
    """The PyTorch twin of a model folder in float32, without gradients. Raises ExportError or CheckpointError."""
    folder = hub.locate(source)
    config, _ = checkpoint.read(folder)
    check_exportable(config)
    lm = load(folder, dtype="float32").eval()
    for parameter in lm.parameters():
        parameter.requires_grad_(False)
    return lm


def record(folder: Path, lm: Model) -> None:
    """Write the tokenizer's files and a self-test: tokens, and the model's logits at some positions."""
    if lm.tokenizer is not None:
        lm.tokenizer.save(folder)

    def forward(tokens: np.ndarray, at: np.ndarray) -> np.ndarray:
        return lm.head(lm.hidden(torch.from_numpy(tokens))[0][0, at]).numpy()

    # Past the first chunks, and, with room, past the window.
    record_self_test(folder, lm.config, 2 * lm.config.chunk_size + lm.config.window + 3, forward)
