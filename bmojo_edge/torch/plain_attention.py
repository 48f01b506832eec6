"""One softmax over every memory in plain PyTorch, for many tokens and for one (docs/model.md section 3, step 7).

Rows may stand at different positions, documents and chunks may begin anywhere. It knows no config and no state.

b batch, t tokens of the call, h query heads, g key/value heads, p head_dim, n columns, c chunks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from bmojo_edge.torch.precision import wide

QUERY_TILE = 128  # queries whose scores exist at one time


class Queries(NamedTuple):
    """Where t tokens stand that read memories."""

    position: Tensor  # (b, t) within the document
    document: Tensor | None  # (b, t), -1 = padding; None: the call holds one document a row
    chunk: Tensor  # (b, t) ordinal of the token's chunk within the call
    place: Tensor  # (b, t) its place in the grid of c chunks of chunk_size tokens, c * chunk_size = padding
    chunk_size: int
    aligned: bool = False  # place = column, but for padding


class Band(NamedTuple):
    """A memory read by distance: its columns are m carried slots (of document 0), then the call's t tokens, in order.

    A token sees the columns of its document with near <= its position - theirs < far; far None: all from near on.
    """

    q: Tensor  # (b, h, t, p)
    k: Tensor  # (b, g, m + t, p)
    v: Tensor  # (b, g, m + t, p)
    position: Tensor  # (b, m + t), negative = nothing written
    document: Tensor | None  # (b, m + t)
    near: int
    far: int | None


class Pinned(NamedTuple):
    """A memory read by index: each chunk lists the columns its tokens may see, from `near` tokens on."""

    q: Tensor  # (b, h, t, p)
    k: Tensor  # (b, g, n, p)
    v: Tensor  # (b, g, n, p)
    position: Tensor  # (b, n)
    columns: Tensor  # (b, c, e) of the chunk's own document, -1 = none
    near: int
    own: int = 0  # column of the call's first token; those before were carried


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled products of q (b, h, t, p) and k (b, g, n, p): (b, h, t, n) in `wide` precision."""
    (b, h, t, p), g = q.shape, k.shape[1]
    products = q.reshape(b, g, h // g * t, p) @ k.transpose(-1, -2)
    return products.view(b, h, t, -1).to(wide(q.dtype)) * scale


def _mix(weights: Tensor, v: Tensor) -> Tensor:
    """weights (b, h, t, n) over v (b, g, n, p): (b, h, t, p)."""
    (b, h, t, n), g = weights.shape, v.shape[1]
    return (weights.reshape(b, g, h // g * t, n) @ v).view(b, h, t, -1)


def _in_sight(band: Band, begin: int, end: int) -> slice:
    """Columns that tokens begin .. end - 1 may see, from the order of columns alone: shapes never depend on data."""
    t = band.q.shape[2]
    m = band.k.shape[2] - t
    sees_carried = band.far is None or begin + 1 < band.far
    oldest = 0 if sees_carried or band.far is None else m + begin - band.far + 1
    return slice(oldest, max(oldest, m + end - band.near if end > band.near else m))


def _band_scores(band: Band, at: Queries, begin: int, end: int, scale: float) -> tuple[Tensor, Tensor]:
    """Scores of tokens begin .. end - 1, -inf where nothing is visible, and the values they weigh."""
    seen = _in_sight(band, begin, end)
    position = band.position[:, None, seen]
    distance = at.position[:, begin:end, None] - position  # (b, tile, n)
    visible = (distance >= band.near) & (position >= 0)
    if band.far is not None:
        visible &= distance < band.far
    if at.document is not None and band.document is not None:
        visible &= at.document[:, begin:end, None] == band.document[:, None, seen]
    scores = _scores(band.q[:, :, begin:end], band.k[:, :, seen], scale)
    return scores.masked_fill(~visible[:, None], -math.inf), band.v[:, :, seen]


class _PinnedReader:
    """A pinned memory read chunk by chunk: tokens are laid out on a grid of chunks, lists are gathered once a chunk."""

    def __init__(self, memory: Pinned, at: Queries) -> None:
        b, c, e = memory.columns.shape
        g, p = memory.k.shape[1], memory.k.shape[3]
        self.q, self.g, self.c, self.size = memory.q, g, c, at.chunk_size
        columns = memory.columns.clamp(min=0).view(b, c * e)
        rows = columns[:, None, :, None].expand(b, g, c * e, p)
        self.k, self.v = (x.gather(2, rows).view(b, g, c, e, p) for x in (memory.k, memory.v))
        self.place = at.place[:, None, :, None]
        position = memory.position.gather(1, columns).view(b, c, e)
        position = position.masked_fill(memory.columns < 0, torch.iinfo(torch.int64).max)
        position = position.gather(1, at.chunk[..., None].expand(-1, -1, e))
        self.visible = position <= (at.position - memory.near)[..., None]  # (b, t, e)

    def _to_grid(self, x: Tensor) -> Tensor:
        """(b, h, t, y) as (b, g, c, h / g * size, y), zeros where no token stands."""
        (b, h, _, y), cells = x.shape, self.c * self.size
        grid = x.new_zeros(b, h, cells + 1, y).scatter(2, self.place.expand_as(x), x)[:, :, :cells]
        return grid.view(b, self.g, h // self.g, self.c, self.size, y).transpose(2, 3).flatten(3, 4)

    def _from_grid(self, x: Tensor) -> Tensor:
        """The inverse of `_to_grid`; what padding gets is of no consequence."""
        b, g, c, _, y = x.shape
        grid = x.view(b, g, c, -1, self.size, y).transpose(2, 3).reshape(b, -1, c * self.size, y)
        place = self.place.clamp(max=c * self.size - 1)
        return grid.gather(2, place.expand(b, grid.shape[1], -1, y))

    def scores(self, scale: float) -> Tensor:
        """(b, h, t, e), -inf where a column is not visible."""
        scores = self._from_grid(self._to_grid(self.q) @ self.k.transpose(-1, -2)).to(wide(self.q.dtype)) * scale
        return scores.masked_fill(~self.visible[:, None], -math.inf)

    def mix(self, weights: Tensor) -> Tensor:
        """weights (b, h, t, e) over each chunk's values: (b, h, t, p)."""
        return self._from_grid(self._to_grid(weights) @ self.v)


def plain_attention(bands: list[Band], pinned: Pinned | None, at: Queries, scale: float) -> Tensor:
    """`ops.memory_attention` of any tokens: (b, h, t, p)."""
    reader = None if pinned is None else _PinnedReader(pinned, at)
    pinned_scores = None if reader is None else reader.scores(scale)
    t, out, pinned_weights = bands[0].q.shape[2], [], []
    for begin in range(0, t, QUERY_TILE):
        end = min(begin + QUERY_TILE, t)
        scores, values = zip(*(_band_scores(band, at, begin, end, scale) for band in bands), strict=True)
        scores = [*scores] if pinned_scores is None else [*scores, pinned_scores[:, :, begin:end]]
        weights = torch.cat(scores, dim=-1).softmax(dim=-1).to(values[0].dtype)
        parts = weights.split([s.shape[-1] for s in scores], dim=-1)
        out.append(sum(_mix(w, v) for w, v in zip(parts, values, strict=False)))
        pinned_weights.append(parts[-1])
    mixed = torch.cat(out, dim=2)
    return mixed if reader is None else mixed + reader.mix(torch.cat(pinned_weights, dim=2))


class Slots(NamedTuple):
    """A memory of one decoding step: its query, its slots, and which of them are visible."""

    q: Tensor  # (b, h, 1, p)
    k: Tensor  # (b, g, n, p)
    v: Tensor  # (b, g, n, p)
    visible: Tensor  # (b, n)


def memory_attention_step(memories: list[Slots], scale: float) -> Tensor:
    """`memory_attention` for one token: (b, h, 1, p). Keys stay where they are; only scores are put side by side."""
    scores = [_scores(m.q, m.k, scale).masked_fill(~m.visible[:, None, None], -math.inf) for m in memories]
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).to(memories[0].v.dtype)
    parts = weights.split([s.shape[-1] for s in scores], dim=-1)
    return torch.stack([_mix(w, m.v) for w, m in zip(parts, memories, strict=True)]).sum(0)
