"""The oracle and both twins behind one face, so that one test compares a converted folder on all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bmojo_edge import checkpoint, reference
from bmojo_edge.quantize import dequantized
from tests.helpers import to_numpy

NAMES = ("oracle", "torch", "mlx")

# tokens (1, t), state or None -> logits (1, t, v), state
Forward = Callable[[np.ndarray, Any], tuple[np.ndarray, Any]]


@contextmanager
def opened(engine: str, folder: Path) -> Iterator[Forward]:
    """A folder of ours on one engine, in float32, or float64 in the oracle."""
    if engine == "oracle":
        config, stored = checkpoint.read(folder)
        weights = dict(dequantized(stored, config.quantization))
        yield lambda ids, state: reference.forward(config, weights, ids, state)
    elif engine == "torch":
        yield from _torch(folder)
    else:
        from bmojo_edge.mlx import load

        model = load(folder)

        def forward(ids: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
            logits, state = model.forward(ids, model.init_state() if state is None else state)
            return to_numpy(logits), state

        yield forward


def _torch(folder: Path) -> Iterator[Forward]:
    import torch

    from bmojo_edge.torch import load

    model = load(folder)

    def forward(ids: np.ndarray, state: Any) -> tuple[np.ndarray, Any]:
        with torch.inference_mode():
            logits, state = model(torch.from_numpy(ids), state)
        return to_numpy(logits), state

    with torch.inference_mode():
        yield forward


def in_pieces(forward: Forward, ids: np.ndarray, pieces: list[int]) -> np.ndarray:
    """Logits (1, t, v) of a text given in pieces of these lengths, the last one to the end, with the state carried."""
    state, out, start = None, [], 0
    while start < ids.shape[1]:
        size = pieces[min(len(out), len(pieces) - 1)]
        logits, state = forward(ids[:, start : start + size], state)
        out.append(logits)
        start += size
    return np.concatenate(out, axis=1)
