"""A look inside models trained on MQAR: which tokens the eidetic memory keeps, how far back answers reach."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bmojo_edge.torch import Model

BATCH, SHOWN = 100, 4


def by_distance(tokens: np.ndarray, right: np.ndarray, columns: np.ndarray, pairs: int, step: int) -> list[list[float]]:
    """How many questions were asked and answered, by how many tokens their key lies back.

    tokens (n, t); right, columns (n, q). A row [distance, asked, answered] for every `step` distances from there on.
    """
    keys = tokens[:, 0 : 2 * pairs : 2]
    back = columns - 2 * (keys[:, None] == np.take_along_axis(tokens, columns, 1)[..., None]).argmax(-1)
    bins = back // step
    return [[int(step * b), int((bins == b).sum()), int(right[bins == b].sum())] for b in np.unique(bins)]


@torch.no_grad()
def what_is_kept(model: Model, tokens: np.ndarray, targets: np.ndarray, pairs: int) -> dict[str, Any]:
    """What the memory of each layer holds when a row has been read.

    tokens, targets (n, t). Returned are `share`, a table a layer: of all keys at the start, of all values, of all
    queries and of all blanks, how many are kept; and `positions`, those kept of the first rows, as text.
    """
    kinds = _kinds(tokens, targets, pairs)
    held = np.zeros((len(model.blocks()), *tokens.shape), bool)
    for first in range(0, len(tokens), BATCH):
        rows = torch.from_numpy(tokens[first : first + BATCH]).to(model.device, torch.int64)
        _, state = model.prefill(rows, model.init_state(len(rows)))
        for layer, memory in enumerate(state.layers):
            positions = memory.eidetic.positions.cpu().numpy()
            row, slot = np.nonzero(positions >= 0)
            held[layer, first + row, positions[row, slot]] = True
    share = [{name: float(layer[of].mean()) for name, of in kinds.items() if of.any()} for layer in held]
    positions = [[" ".join(map(str, np.flatnonzero(row))) for row in layer[:SHOWN]] for layer in held]
    return {"share": share, "positions": positions}


def _kinds(tokens: np.ndarray, targets: np.ndarray, pairs: int) -> dict[str, np.ndarray]:
    column = np.arange(tokens.shape[1])[None]
    start = np.broadcast_to(column < 2 * pairs, tokens.shape)
    return {
        "keys": start & (column % 2 == 0),
        "values": start & (column % 2 == 1),
        "queries": targets >= 0,
        "blanks": ~start & (tokens == 0),
    }
