"""Where the tokens of one call stand: positions, padding, chunks. Computed once, read by every layer.

A call of many tokens knows its rows' positions on the host, so shapes and masks never wait for the device; a decoding
step keeps them on the device, so that it can be compiled once for all positions. Nothing here knows layers or weights.
Rows of a batch may stand at different positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from bmojo_edge.config import Config
from bmojo_edge.mlx.ops import Chunks, Queries, Rotary, rotary
from bmojo_edge.rope import turns_per_token
from bmojo_edge.state import capacity, map_leaves

LIVE_STEP = 128  # a decoding step reads whole multiples of this many slots of a ring, and is traced once for each


@lru_cache
def turns_of(config: Config) -> mx.array | None:
    """Turns a token of each pair, (p / 2,) uint64, in 2^-64 of a turn."""
    turns = turns_per_token(config)
    return None if turns is None else mx.array(turns)


@lru_cache
def pinned_rotary(config: Config) -> Rotary | None:
    """Angles at the fixed distance `window`, at which queries meet unrotated keys."""
    turns = turns_of(config)
    if turns is None:
        return None
    at = rotary(mx.array([[config.window]], mx.int64), turns)
    mx.eval(at)
    return at


def as_mask(values: Any) -> mx.array:
    """A NumPy array of truth values, which MLX takes although its type hints do not say so."""
    return mx.array(values)


# --- a call of many tokens --------------------------------------------------------------------------------------------


class Layout:
    """Where b x t tokens stand, row by row.

    start (b,) and length (b,): carried positions and real tokens, on the host. position (b, t), chunk (b, t) ordinals
    within the call, chunks: what each chunk's set may hold, last_chunk (b,), rotary at position + offset.
    watch: where each layer of attention notes its memories' shares, see `attention_shares`; None: it does not.
    """

    watch: list[dict[str, mx.array]] | None = None

    def __init__(self, config: Config, t: int, start: Sequence[int], offset: mx.array, lengths: Sequence[int]) -> None:
        self.t, self.start, self.length = t, np.array(start, np.int64), np.array(lengths, np.int64)
        self.padded = bool((self.length < t).any())
        self.last_position = self.start + self.length - 1  # (b,)
        position = self.start[:, None] + np.arange(t)
        self.position = mx.array(position)
        turns = turns_of(config)
        self.rotary: Rotary | None = None if turns is None else rotary(self.position + offset[:, None], turns)
        self.offset, self._turns = offset, turns
        self._set_chunks(position, config.chunk_size, config.window)
        self._masks: dict[tuple[int, ...], mx.array] = {}
        self._columns: dict[tuple[str, int], mx.array | list[slice]] = {}

    def _set_chunks(self, position: np.ndarray, size: int, window: int) -> None:
        first = self.start // size
        last = np.maximum(self.last_position // size - first, 0)
        ordinals = np.arange(last.max() + 1)
        used = (ordinals <= last[:, None]) & (self.length > 0)[:, None]
        end = np.where(used, (first[:, None] + ordinals + 1) * size, 0)
        idle = self.length == 0  # such a row keeps the set it carries: nothing new competes
        end[idle] = (-(-self.start // size) * size)[idle, None]
        self.chunk = mx.array(np.minimum(position // size - first[:, None], ordinals[-1]))
        self.chunks, self.last_chunk = Chunks(mx.array(end - window)), mx.array(last)
        self.begun = as_mask((self.start % size != 0) | idle)  # the first chunk's set is that of an earlier call
        self.used = as_mask(used)

    @property
    def real(self) -> mx.array | None:
        """(b, t) bool, None without padding."""
        return as_mask(np.arange(self.t) < self.length[:, None]) if self.padded else None

    @property
    def lengths(self) -> mx.array | None:
        """(b,) int32: real tokens of each row, None without padding."""
        return mx.array(self.length.astype(np.int32)) if self.padded else None

    @property
    def queries(self) -> Queries:
        """The tokens as readers of memories."""
        return Queries(tuple(self.start.tolist()), self.position, self.chunk, self._masks)

    def opened(self, sinks: int) -> tuple[mx.array, mx.array] | None:
        """Which column of the call each of the first slots gets, and whether it gets one: (b, sinks); None: no slot."""
        column = np.arange(sinks) - self.start[:, None]
        written = (column >= 0) & (column < self.length[:, None])
        return (mx.array(np.clip(column, 0, self.t - 1)), as_mask(written)) if written.any() else None

    def leavers(self, m: int, chunk: int, window: int) -> tuple[Any, mx.array]:
        """Positions (b, n) of the first of m carried and the call's tokens, and the same with -1 where none competes.

        A chunk's set takes tokens that leave the window before the chunk ends: none later than these.
        """
        n = max(0, min(m + self.t, m + self.t - 1 - window + chunk))
        columns = self.start[:, None] - m + np.arange(n)
        competed = -(-self.start // chunk) * chunk - window  # before: had their chance
        position = np.where((columns >= 0) & (columns >= competed[:, None]), columns, -1)
        return columns, mx.array(position.reshape(len(columns), n))

    def rotary_at(self, positions: Any) -> Rotary | None:
        """Angles at other positions (b, n) of the rows' sequences."""
        return None if self._turns is None else rotary(mx.array(positions) + self.offset[:, None], self._turns)

    def carried(self, slots: int) -> int:
        """How many columns the tokens before the call need that a memory of so many slots still holds."""
        return int(min(slots, self.start.max(initial=0)))

    def joined(self, ring: mx.array, new: mx.array, axis: int = 2) -> mx.array:
        """The carried tokens of a ring in order of position, then the call's own: a column is one position a row.

        ring (b, ..., n, ...), new (b, ..., t, ...) along `axis`. Rows that carry fewer tokens start with anything.
        """
        n, m = ring.shape[axis], self.carried(ring.shape[axis])
        if m == 0:
            return new
        if ("joined", n) not in self._columns:
            self._columns["joined", n] = self._index((self.start[:, None] - m + np.arange(m)) % n)
        return mx.concatenate([*self._taken(ring, ("joined", n), axis), new], axis=axis)

    def kept(self, joined: mx.array, slots: int, axis: int = 2) -> mx.array:
        """The ring of so many slots after the call: `joined` columns by slot, zeros where nothing was written yet."""
        m = self.carried(slots)
        last = self.last_position[:, None]
        held = last - (last - np.arange(slots)) % slots  # (b, slots)
        if ("kept", slots) not in self._columns:
            self._columns["kept", slots] = self._index(np.maximum(held - self.start[:, None] + m, 0))
        pieces = self._taken(joined, ("kept", slots), axis)
        ring = pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=axis)
        if (held >= 0).all():
            return ring
        shape = [1] * ring.ndim
        shape[0], shape[axis] = held.shape
        return mx.where(as_mask(held >= 0).reshape(shape), ring, mx.array(0, ring.dtype))

    @staticmethod
    def _index(columns: np.ndarray) -> mx.array | list[slice]:
        """Columns (b, n) as the cheapest index that selects them: slices, one list for all rows, a list for each."""
        if (columns != columns[:1]).any():
            return mx.array(columns)
        row = columns[0]
        runs = np.split(row, np.flatnonzero(np.diff(row) != 1) + 1)
        if len(runs) > 2:  # a ring from any slot on is two runs
            return mx.array(row)
        return [slice(int(run[0]), int(run[-1]) + 1) if run.size else slice(0) for run in runs]

    def _taken(self, x: mx.array, name: tuple[str, int], axis: int) -> list[mx.array]:
        """The columns of an index, in pieces."""
        index = self._columns[name]
        if isinstance(index, list):
            return [x[(slice(None),) * axis + (piece,)] for piece in index]
        if index.ndim == 1:
            return [mx.take(x, index, axis=axis)]
        shape = [1] * x.ndim
        shape[0], shape[axis] = index.shape
        return [mx.take_along_axis(x, index.reshape(shape), axis=axis)]


def layout_of(config: Config, t: int, start: Sequence[int], offset: mx.array, lengths: Sequence[int]) -> Layout:
    """The layout of (b, t) tokens after carried positions `start` (b,), of which `lengths` (b,) are real."""
    return Layout(config, t, start, offset, lengths)


# --- one token --------------------------------------------------------------------------------------------------------


class Step:
    """Where the one token of a decoding step stands, row by row, on the device.

    rows (b,): whose token each row writes where some rows rest, so that these write again what an active row writes;
    None: every row its own. live: how many slots may hold something, see `live_slots`; None: perhaps all. opening: a
    row may still fill its sinks. promotes (b,) bool: rows that must promote within the step; None: that is done.
    """

    def __init__(
        self,
        config: Config,
        position: mx.array,
        offset: mx.array,
        rows: mx.array | None = None,
        live: int | None = None,
        opening: bool = True,
        promotes: mx.array | None = None,
    ) -> None:
        self.position, self.offset, self.rows = position, offset, rows
        self.live, self.opening, self.promotes = live, opening, promotes
        self.window, turns = config.window, turns_of(config)
        self.rotary = None if turns is None else rotary((position + offset)[:, None], turns)
        self.active = None if rows is None else rows == mx.arange(rows.size)
        # Real tokens of each row, (b,) int32, as in `Layout`.
        self.lengths = None if self.active is None else self.active.astype(mx.int32)
        self._slots: dict[int, mx.array] = {}
        self._places: dict[tuple[int, int], mx.array] = {}
        self._masks: dict[tuple[int, int, int], mx.array] = {}

    def seen(self, slots: int) -> int:
        """How many of the first slots of a memory must be read."""
        return slots if self.live is None else min(slots, self.live)

    @property
    def aged(self) -> bool:
        """Whether a row may have tokens older than its window: what only they are read by is left out before."""
        return self.live is None or self.live > self.window

    def mask(self, slots: int, near: int = 0) -> mx.array:
        """0 where a slot of a ring holds a token at least `near` tokens old, else -inf: (b, 1, 1, seen)."""
        n = self.seen(slots)
        if (slots, near, n) not in self._masks:
            held = slot_positions(slots, self.position)[:, :n]
            visible = (held >= 0) & (held <= self.position[:, None] - near)
            self._masks[slots, near, n] = mx.where(visible, 0.0, -float("inf"))[:, None, None]
        return self._masks[slots, near, n]

    def sinks_held(self, sinks: int) -> mx.array:
        """Positions that the sinks hold or will hold: (1, sinks)."""
        if (sinks, -2, sinks) not in self._masks:
            self._masks[sinks, -2, sinks] = mx.arange(sinks)[None]
        return self._masks[sinks, -2, sinks]

    def sinks_mask(self, sinks: int) -> mx.array:
        """0 where a sink is at least `window` tokens old, else -inf: (b, 1, 1, sinks)."""
        if (sinks, -1, sinks) not in self._masks:
            visible = mx.arange(sinks) <= self.position[:, None] - self.window
            self._masks[sinks, -1, sinks] = mx.where(visible, 0.0, -float("inf"))[:, None, None]
        return self._masks[sinks, -1, sinks]

    def slot(self, slots: int) -> mx.array:
        """Where in a ring of so many slots each row's token goes: (b,)."""
        if slots not in self._slots:
            self._slots[slots] = self.position % slots
        return self._slots[slots]

    def places(self, heads: int, slots: int) -> mx.array:
        """Where in a ring (b, heads, slots, p), seen as rows of p, each row's token goes: (b * heads, 1)."""
        if (heads, slots) not in self._places:
            slot = self.slot(slots)
            rows = mx.arange(slot.size) if self.rows is None else self.rows
            slot = slot if self.rows is None else mx.take(slot, rows)
            place = (rows[:, None] * heads + mx.arange(heads)) * slots + slot[:, None]
            self._places[heads, slots] = place.reshape(-1, 1)
        return self._places[heads, slots]


def live_slots(config: Config, tokens: int) -> int:
    """How many first slots of its memories a sequence of so many tokens may have written, in few different numbers."""
    if config.growing_layers:
        return capacity(tokens)
    windows = (config.attention_window_of(i) or 0 for i in range(len(config.layer_types)))
    longest = max(config.window + max(config.fading, 1), *windows)  # one more than the window: `aged` is known of it
    return -(-min(tokens, longest) // LIVE_STEP) * LIVE_STEP


def step_of(
    config: Config, position: mx.array, offset: mx.array, rows: mx.array | None, live: int | None, opening: bool
) -> Step:
    """The step of one token at `position` (b,) of each row, see `Step`."""
    return Step(config, position, offset, rows, live, opening)


def slot_positions(n: int, last: mx.array) -> mx.array:
    """Position held by each slot of a ring of n once position `last` (b,) is written: (b, n); negative = none yet."""
    return last[:, None] - (last[:, None] - mx.arange(n)) % n


def put(slots: mx.array, value: mx.array, step: Step) -> mx.array:
    """Slots (b, g, n, p) with the token's `value` (b, g, 1, p) in its place; the array given stays as it is.

    The new array takes over the memory of the old one where nothing else holds that: it must not be read before.
    """
    b, g, n, p = slots.shape
    if b == 1:
        return mx.slice_update(slots, value, step.slot(n), (2,))
    value = value if step.rows is None else mx.take(value, step.rows, axis=0)
    place = mx.broadcast_to(step.places(g, n), (b * g, p))
    return mx.put_along_axis(slots.reshape(-1, p), place, value.reshape(-1, p), axis=0).reshape(slots.shape)


def choose_rows(rows: mx.array, new: Any, old: Any) -> Any:
    """A state with the leaves of `new` where rows (b,) is true and of `old` elsewhere."""

    def choose(a: mx.array, b: mx.array) -> mx.array:
        return mx.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    return map_leaves(choose, new, old)
