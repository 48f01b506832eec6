"""Cases of the eidetic choice, and the bounded memory it is held to: insert, and if over e evict the smallest."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bmojo_cuda.documents import document_bounds


def segments_of(segments: Tensor) -> tuple[Tensor, Tensor]:
    """First row and the row after the last of every row's document."""
    return document_bounds(segments)


def streamed(
    scores: Tensor, segments: Tensor | None, *, window: int, chunk: int, n_eidetic: int, n_sinks: int
) -> Tensor:
    """The choice made token by token: as a chunk begins, the tokens about to leave the window compete for slots."""
    b, l = scores.shape
    index = torch.full((b, -(-l // chunk), n_eidetic), -1, dtype=torch.int32)
    for n in range(b):
        held: list[tuple[float, int]] = []
        start = 0
        for c in range(-(-l // chunk)):
            if segments is not None and c and segments[n, c * chunk] != segments[n, c * chunk - 1]:
                held, start = [], c * chunk
            for j in range(max(c * chunk - window, start + n_sinks), max((c + 1) * chunk - window, start + n_sinks)):
                held.append((-float(scores[n, j]), j))
                if len(held) > n_eidetic:
                    held.remove(max(held))
            kept = sorted(j for _, j in held)
            index[n, c, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
    return index


def _documents(l: int, chunk: int) -> Tensor:
    segments = torch.zeros(2, l, dtype=torch.int64)
    segments[0, 3 * chunk :] = 1
    segments[1, 2 * chunk :], segments[1, 5 * chunk :] = 4, 5
    return segments


def cases() -> dict[str, tuple[Tensor, Tensor | None, dict[str, Any]]]:
    """scores, segment ids, options."""
    torch.manual_seed(0)
    sizes = {"window": 8, "chunk": 4, "n_eidetic": 3, "n_sinks": 0}
    return {
        "random": (torch.rand(2, 37), None, sizes),
        "ties": (torch.randint(0, 3, (2, 45)).float(), None, {**sizes, "n_eidetic": 5, "n_sinks": 2}),
        "all equal": (torch.ones(1, 50), None, sizes),
        "chunk of the window, falling": (torch.arange(40.0, 0, -1)[None], None, {**sizes, "chunk": 8}),
        "chunk of one, rising": (torch.arange(30.0)[None], None, {**sizes, "chunk": 1}),
        "documents": (torch.randint(0, 5, (2, 37)).float(), _documents(37, 4), {**sizes, "n_sinks": 1}),
        "more slots than tokens": (torch.rand(1, 11), None, {**sizes, "n_eidetic": 40}),
        "one token": (torch.rand(1, 1), None, sizes),
    }


SCORES = cases()
