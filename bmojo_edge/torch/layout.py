"""Where the tokens of one call stand: positions, documents, padding, chunks. Computed once, read by every layer.

All of it follows from the carried positions, `segment_ids` and `lengths`; it knows nothing of layers or weights.
Rows of a batch may stand at different positions. Documents are counted per row, 0 continues the carried state.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bmojo_edge.config import Config
from bmojo_edge.rope import turns_per_token
from bmojo_edge.state import Leaf, map_leaves
from bmojo_edge.torch.ops import Chunks, Queries, Rotary, rotary, wide


class Layout(NamedTuple):
    """Where b x t tokens stand. None where a call needs no such thing: no padding, one document a row, no chunks."""

    position: Tensor  # (b, t) within the document, the carried position counted in
    document: Tensor | None  # (b, t), -1 = padding
    real: Tensor | None  # (b, t) bool; None: no padding
    start: Tensor  # (b,) carried position
    offset: Tensor  # (b,)
    last_column: Tensor  # (b,) of the last real token, -1 = none
    last_position: Tensor  # (b,) of the last real token, start - 1 = none
    last_document: Tensor | None  # (b,)
    chunk: Tensor  # (b, t) ordinal of the token's chunk
    place: Tensor  # (b, t) place in the grid of chunks, see ops.Queries
    chunks: Chunks
    origin: Tensor  # (b, c): column - position of the tokens of a chunk
    turns: Tensor | None  # (p / 2,), see turns_of
    rotary: Rotary | None  # at position + offset
    fresh: bool  # no state is carried: rings hold nothing
    aligned: bool  # every chunk begins at a multiple of `chunk` columns, as the kernels need it
    tokens: int  # most tokens a growing cache must hold; 0 where none grows
    idle: bool  # a row has no token in this call; only known where a cache grows
    pinned: Rotary | None  # (1, 1, p / 2) at the distance `window`, see pinned_rotary
    recalled: tuple[Tensor, Tensor] | None = None  # what all layers have in common of storage, see recalled.shared
    watch: list[dict[str, Tensor]] | None = None  # where layers note their memories' shares; None: they do not

    @property
    def lookback(self) -> Tensor | None:
        """(b, t): earlier tokens of its document a token may see; None where documents do not matter."""
        return None if self.document is None else self.position

    @property
    def reset(self) -> Tensor | None:
        """(b, t): tokens that begin a document of their own."""
        return None if self.document is None else (self.document > 0) & (self.position == 0)

    def queries(self, chunk_size: int) -> Queries:
        """The tokens as readers of memories."""
        return Queries(self.position, self.document, self.chunk, self.place, chunk_size, self.aligned)


class Step(NamedTuple):
    """Where the one token of a decoding step stands."""

    position: Tensor  # (b,)
    offset: Tensor  # (b,)
    active: Tensor | None  # (b,) bool: rows that move; None: all
    promotes: Tensor | None  # (b,) bool: rows that enter a chunk; None: no row does
    turns: Tensor | None  # (p / 2,), see turns_of
    rotary: Rotary | None  # (b, 1, p / 2) at position + offset
    tokens: int  # as in Layout
    idle: bool
    pinned: Rotary | None = None  # as in Layout


def turns_of(config: Config, device: torch.device) -> Tensor | None:
    """Turns a token of each pair, (p / 2,) int64, in 2^-64 of a turn; None without positions."""
    turns = turns_per_token(config)
    return None if turns is None else _sent_once(turns.tobytes(), device)


@functools.lru_cache(maxsize=64)
def _sent_once(numbers: bytes, device: torch.device) -> Tensor:
    """int64 numbers on a device: a copy at every call makes the host wait, and can be no part of a CUDA graph."""
    with torch.inference_mode(False):
        return torch.frombuffer(bytearray(numbers), dtype=torch.int64).to(device)


def pinned_rotary(config: Config, turns: Tensor | None, dtype: torch.dtype) -> Rotary | None:
    """Angles of queries that meet unrotated keys, at one distance; None where no layer has such, or no positions."""
    if turns is None or "bmojo" not in config.layer_types:
        return None
    return rotary(torch.full((1, 1), config.window, dtype=torch.int64, device=turns.device), turns, dtype)


class Segments(NamedTuple):
    """Documents of a call, with padding before a row's first token turned to its end by `order`."""

    order: Tensor  # (b, t) columns
    real: Tensor  # (b, t) bool
    document: Tensor  # (b, t), -1 = padding
    column: Tensor  # (b, t): column of the first token of the token's document


def segments_of(segment_ids: Tensor, lengths: Tensor | None) -> Segments:
    """Runs of one segment id (b, t); -1 and tokens beyond `lengths` are padding."""
    b, t = segment_ids.shape
    columns = torch.arange(t, device=segment_ids.device).expand(b, t)
    label = segment_ids if lengths is None else segment_ids.masked_fill(columns >= lengths[:, None], -1)
    leading = (label >= 0).int().argmax(dim=1, keepdim=True)
    order = (columns + leading) % t
    label = label.gather(1, order)
    begins = (label >= 0) & (columns == 0)
    begins[:, 1:] = (label[:, 1:] >= 0) & (label[:, 1:] != label[:, :-1])
    first = torch.where(begins, columns, 0).cummax(dim=1).values
    document = (begins.cumsum(dim=1) - 1).masked_fill(label < 0, -1)
    return Segments(order, label >= 0, document, first)


def layout_of(
    config: Config,
    shape: tuple[int, int],
    start: Tensor,
    offset: Tensor,
    segments: Segments | None = None,
    lengths: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    fresh: bool = False,
    aligned: bool = False,
) -> Layout:
    """The layout of (b, t) tokens after carried positions `start` (b,); angles in `dtype`; aligned: see Layout."""
    (b, t), device = shape, start.device
    columns = torch.arange(t, device=device).expand(b, t)
    real, document, last_document, position = None, None, None, start[:, None] + columns
    if segments is not None:
        real, document = segments.real, segments.document
        position = columns - segments.column + torch.where(document == 0, start[:, None], 0)
        position = position.masked_fill(~real, 0)
    elif lengths is not None:
        real = columns < lengths[:, None]
    last_column = torch.full_like(start, t - 1) if real is None else torch.where(real, columns, -1).amax(dim=1)
    idle, at_last = last_column < 0, last_column.clamp(min=0)[:, None]
    last_position = torch.where(idle, start - 1, position.gather(1, at_last)[:, 0])
    if document is not None:
        last_document = document.gather(1, at_last)[:, 0].clamp(min=0)
    if real is not None and document is not None and aligned:
        counted = _count_aligned_chunks(config, position, document, real)
    elif real is None or document is None:
        counted = _count_chunks(config, start, position, last_position, idle, fresh)
    else:
        counted = _count_packed_chunks(config, position, document, real)
    turns = turns_of(config, device)
    angles = None if turns is None else rotary(position + offset[:, None], turns, dtype)
    return Layout(
        position, document, real, start, offset, last_column, last_position, last_document,
        *counted, turns, angles, fresh, aligned, 0, False, pinned_rotary(config, turns, dtype),
    )  # fmt: skip


class _Counted(NamedTuple):
    """The chunks of a call: the fields of Layout from `chunk` to `origin`."""

    chunk: Tensor
    place: Tensor
    chunks: Chunks
    origin: Tensor


def _count_chunks(
    config: Config, start: Tensor, position: Tensor, last_position: Tensor, idle: Tensor, fresh: bool
) -> _Counted:
    """One document a row. Shapes follow from t alone: where a row enters its first chunk is data."""
    size, (b, t) = config.chunk_size, position.shape
    c = -(-t // size) if fresh else (t + size - 2) // size + 1
    first, ordinals = start[:, None] // size, torch.arange(c, device=start.device).expand(b, c)
    chunk = position // size - first
    unused = (ordinals > last_position[:, None] // size - first) | idle[:, None]
    limit = ((first + ordinals + 1) * size - config.window).masked_fill(unused, 0)
    return _Counted(chunk, chunk * size + position % size, Chunks(limit, None), -start[:, None].expand(b, c))


def _count_packed_chunks(config: Config, position: Tensor, document: Tensor, real: Tensor) -> _Counted:
    """Packed documents: a chunk begins at a row's first token, at every document and at multiples of `chunk`."""
    size, (b, t) = config.chunk_size, position.shape
    columns = torch.arange(t, device=position.device).expand(b, t)
    chunk = (((position % size == 0) | (columns == 0)) & real).cumsum(dim=1) - 1
    c = max(int(chunk.max()) + 1, 1)
    cell = torch.where(real, chunk, c)  # padding writes to a cell of its own

    def per_chunk(x: Tensor, empty: int) -> Tensor:
        return torch.full((b, c + 1), empty, device=x.device).scatter(1, cell, x)[:, :c]

    limit = per_chunk((position // size + 1) * size - config.window, 0)
    chunks = Chunks(limit, per_chunk(document, -2))
    place = torch.where(real, chunk * size + position % size, c * size)
    return _Counted(chunk.clamp(min=0), place, chunks, per_chunk(columns - position, 0))


def _count_aligned_chunks(config: Config, position: Tensor, document: Tensor, real: Tensor) -> _Counted:
    """Packed documents that begin at multiples of `chunk`: shapes follow from t alone, nothing waits for data."""
    size, (b, t) = config.chunk_size, position.shape
    columns = torch.arange(t, device=position.device).expand(b, t)
    used, first = real[:, ::size], position[:, ::size]
    limit = (first + size - config.window).masked_fill(~used, 0)
    origin = (columns[:, ::size] - first).masked_fill(~used, 0)
    place = columns.masked_fill(~real, used.shape[1] * size)
    return _Counted(columns // size, place, Chunks(limit, document[:, ::size].masked_fill(~used, -2)), origin)


def is_aligned(config: Config, start: Tensor | None, segment_ids: Tensor | None, lengths: Tensor | None) -> bool:
    """Whether chunks of a call begin at multiples of `chunk` columns; start (b,): carried positions, None = all 0.

    Reads its tensors, so it waits for a GPU that holds them: segment_ids and lengths are best kept on the CPU.
    """
    size = config.chunk_size
    if start is not None and bool((start % size != 0).any()):
        return False
    if segment_ids is None:
        return True
    _, real, document, column = segments_of(segment_ids, lengths)
    used = real[:, ::size]  # chunks of padding stand behind all others
    return bool(((column % size == 0) | (document < 0)).all() & (used[:, 1:] <= used[:, :-1]).all())


def growth_of(config: Config, last_position: Tensor, idle: Tensor) -> tuple[int, bool]:
    """Tokens a growing cache must hold, and whether a row is idle. It waits for data, so only where states are kept."""
    if not config.growing_layers:
        return 0, False
    tokens, any_idle = torch.stack([last_position.max() + 1, idle.any().long()]).tolist()
    return tokens, bool(any_idle)


def step_of(config: Config, position: Tensor, offset: Tensor, active: Tensor | None, dtype: torch.dtype) -> Step:
    """The step of one token at `position` (b,) of each row."""
    promotes = None
    if "bmojo" in config.layer_types and config.n_eidetic:
        promotes = position % config.chunk_size == 0
        promotes = promotes if active is None else promotes & active
        promotes = promotes if bool(promotes.any()) else None
    turns = turns_of(config, position.device)
    at = None if turns is None else rotary((position + offset)[:, None], turns, dtype)
    idle = torch.zeros_like(position, dtype=torch.bool) if active is None else ~active
    growth = growth_of(config, position - idle.long(), idle)
    return Step(position, offset, active, promotes, turns, at, *growth, pinned=pinned_rotary(config, turns, dtype))


# --- what a call leaves behind ----------------------------------------------------------------------------------------


def fresh_state(spec: Any, batch: int, dtype: torch.dtype, like: Tensor) -> Any:
    """The state before the first token of `batch` sequences in a model of `dtype`; spec is for one of them."""

    def fresh(leaf: Leaf) -> Tensor:
        kind = torch.int64 if leaf.dtype == "int64" else wide(dtype) if leaf.dtype == "float32" else dtype
        return torch.full((batch, *leaf.shape[1:]), leaf.fill, dtype=kind, device=like.device)

    return map_leaves(fresh, spec)


def slot_positions(n: int, last: Tensor) -> Tensor:
    """Position held by each slot of a ring of n once position `last` (b,) is written: (b, n); negative = none yet."""
    slots = torch.arange(n, device=last.device)
    return last[:, None] - (last[:, None] - slots) % n


def overwritten(slots: Tensor, new: Tensor, held: Tensor, layout: Layout) -> Tensor:
    """Slots (b, g, n, p) after the call's tokens new (b, g, t, p) are written; `held` (b, n): the position each holds.

    A slot whose position is not of this call keeps its content, or is zero in a document that began in this call.
    """
    b, g, n, p = slots.shape
    if new.shape[2] == 0 or n == 0:
        return slots
    first, column = layout.start, held + (layout.last_column - layout.last_position)[:, None]
    if layout.last_document is not None:
        continued = layout.last_document == 0
        first = torch.where(continued, first, 0)
        slots = torch.where(continued[:, None, None, None], slots, 0)
    written = (held >= first[:, None])[:, None, :, None]
    index = column.clamp(0, new.shape[2] - 1)[:, None, :, None].expand(b, g, n, p)
    return torch.where(written, new.gather(2, index), slots)


def put(slots: Tensor, slot: Tensor, value: Tensor, active: Tensor | None) -> Tensor:
    """Slots (b, g, n, p) with `value` (b, g, 1, p) at `slot` (b,) of each active row; a new array."""
    index = slot[:, None, None, None].expand(value.shape)
    if active is not None:
        value = torch.where(active[:, None, None, None], value, slots.gather(2, index))
    return slots.scatter(2, index, value)


def choose_rows(rows: Tensor, new: Any, old: Any) -> Any:
    """A state with the leaves of `new` where rows (b,) is true and of `old` elsewhere."""

    def choose(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(rows.view(-1, *(1,) * (a.dim() - 1)), a, b)

    return map_leaves(choose, new, old)


def last_values(past: Tensor, x: Tensor, layout: Layout) -> Tensor:
    """The last `taps` of the values past (b, taps, d) and x (b, t, d), up to each row's last real token."""
    b, taps, d = past.shape
    padded = torch.cat([past, x.to(past.dtype)], dim=1)
    if layout.real is None:
        return padded[:, x.shape[1] :]
    steps = torch.arange(taps, device=x.device)
    index = (layout.last_column[:, None] + 1 + steps)[..., None].expand(b, taps, d)
    kept = padded.gather(1, index)
    if layout.document is None:
        return kept
    return torch.where((taps - 1 - steps <= layout.last_position[:, None])[..., None], kept, 0)
