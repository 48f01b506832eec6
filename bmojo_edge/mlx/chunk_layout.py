"""A whole chunk whose position the device alone knows: `Model.hidden` traced with it fits every chunk of a sequence.

The rings are then read whole, and masks hide what was never written. Nothing here knows layers, weights or files.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from bmojo_edge.config import Config
from bmojo_edge.mlx.layout import Layout, turns_of
from bmojo_edge.mlx.ops import Chunks, Queries, rotary


class ChunkLayout(Layout):
    """The `chunk` tokens from `position` (b,), a multiple of `chunk`, of sequences rotated from `offset` (b,) on."""

    def __init__(self, config: Config, position: mx.array, offset: mx.array) -> None:
        b, t = len(position), config.chunk_size
        self.t, self.padded, self.first, self.offset = t, False, position, offset
        self.position = position[:, None] + mx.arange(t, dtype=mx.int64)
        turns = turns_of(config)
        self._turns, self.rotary = turns, None if turns is None else rotary(self.position + offset[:, None], turns)
        self.chunk = mx.zeros((b, t), mx.int64)
        self.chunks, self.last_chunk = Chunks((position + (t - config.window))[:, None]), mx.zeros(b, mx.int64)
        self.begun, self.used = mx.zeros(b, mx.bool_), mx.ones((b, 1), mx.bool_)
        self._masks: dict[tuple[int, ...], mx.array] = {}
        self._columns: dict[tuple[str, int], mx.array | list[slice]] = {}

    @property
    def queries(self) -> Queries:
        """The tokens as readers of memories."""
        return Queries(None, self.position, self.chunk, self._masks)

    def carried(self, slots: int) -> int:
        """All slots of a memory."""
        return slots

    def joined(self, ring: mx.array, new: mx.array, axis: int = 2) -> mx.array:
        """All slots of a ring in order of position, then the call's own; those never written come first."""
        n = ring.shape[axis]
        if ("joined", n) not in self._columns:
            self._columns["joined", n] = (self.first[:, None] - n + mx.arange(n, dtype=mx.int64)) % n
        return mx.concatenate([*self._taken(ring, ("joined", n), axis), new], axis=axis)

    def kept(self, joined: mx.array, slots: int, axis: int = 2) -> mx.array:
        """The ring of so many slots after the call."""
        if ("kept", slots) not in self._columns:
            last = (self.first + (self.t - 1))[:, None]
            age = (last - mx.arange(slots, dtype=mx.int64)) % slots  # of what a slot holds, counted from the last token
            self._columns["kept", slots] = slots + self.t - 1 - age
        (ring,) = self._taken(joined, ("kept", slots), axis)
        return ring

    def opened(self, sinks: int) -> tuple[mx.array, mx.array] | None:
        """As in `Layout`."""
        column = mx.arange(sinks, dtype=mx.int64) - self.first[:, None]
        return mx.clip(column, 0, self.t - 1), (column >= 0) & (column < self.t)

    def leavers(self, m: int, chunk: int, window: int) -> tuple[Any, mx.array]:
        """The chunk's own set takes the oldest tokens of the window, as many as leave it within the chunk."""
        columns = self.first[:, None] - m + mx.arange(chunk, dtype=mx.int64)
        return columns, mx.maximum(columns, -1)
