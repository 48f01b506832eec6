"""Blocks read back from storage as one more memory of a bmojo layer, and what goes to storage (docs/storage.md).

Recalled keys are unrotated and pinned at the distance `window`, as sinks and eidetic slots are. Nothing here knows
where blocks are kept or how they were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import mlx.core as mx

from bmojo_edge.config import Config
from bmojo_edge.mlx.layout import Layout, Step, choose_rows, turns_of
from bmojo_edge.mlx.ops import Pinned, Slots, rotary, rotate
from bmojo_edge.state import RecalledState, WindowState
from bmojo_edge.storage_blocks import Shape


def seen_recalled(positions: mx.array, kept: mx.array | None) -> mx.array:
    """Which recalled tokens (b, n) are read: (b, ..., n). One that is also among `kept` (b, ..., e) is read there."""
    full = positions != -1
    if kept is None:
        return full
    shape = (positions.shape[0], *(1,) * (kept.ndim - 2), positions.shape[1])
    spread = positions.reshape(shape)
    twice = ((spread[..., None] == kept[..., None, :]) & (spread >= 0)[..., None]).any(-1)
    return full.reshape(shape) & ~twice


def with_recalled(
    config: Config, pinned: Pinned | None, q: mx.array, recalled: RecalledState, sets: mx.array | None
) -> Pinned:
    """The pinned memory of a call with recalled blocks in it, which every chunk reads.

    q (b, h, t, p): pinned queries; sets (b, c, e): eidetic positions of each chunk, None without eidetic memory.
    """
    # They are seen from position 0 on, the others from `window` tokens on: positions say from when.
    since = mx.where(recalled.positions == -1, -1, 0)
    if pinned is None:
        return Pinned(q, recalled.k, recalled.v, since, None, near=0)
    index, first = pinned.index, pinned.k.shape[2]
    if index is not None:
        columns = mx.arange(first, first + recalled.k.shape[2], dtype=index.dtype)
        seen = seen_recalled(recalled.positions, sets)
        listed = mx.where(seen if sets is not None else seen[:, None], columns, mx.array(-1, index.dtype))
        listed = mx.broadcast_to(listed, (*index.shape[:2], listed.shape[-1]))
        index = mx.concatenate([index, listed], axis=-1)
    position = mx.where(pinned.position >= 0, pinned.position + config.window, -1)
    return Pinned(
        pinned.q,
        mx.concatenate([pinned.k, recalled.k], axis=2),
        mx.concatenate([pinned.v, recalled.v], axis=2),
        mx.concatenate([position, since.astype(position.dtype)], axis=1),
        index,
        near=0,
    )


def recalled_slots(q: mx.array, recalled: RecalledState, kept: mx.array | None) -> Slots:
    """Recalled blocks as a memory of one decoding step; q (b, h, 1, p): pinned queries, kept (b, e): as above."""
    held = mx.where(seen_recalled(recalled.positions, kept), 0, -1)
    return Slots(q, recalled.k, recalled.v, 0, held)


def last_queries(queries: mx.array, q: mx.array, layout: Layout) -> mx.array:
    """The last queries (b, n, h p) once those of a call, (b, h, t, p), are among them."""
    n, width = queries.shape[1:]
    new = q.transpose(0, 2, 1, 3).reshape(-1, layout.t, width).astype(queries.dtype)
    joined = mx.concatenate([queries, new], axis=1)
    if not layout.padded:
        return joined[:, layout.t :]
    columns = mx.array(layout.length)[:, None] + mx.arange(n)
    return mx.take_along_axis(joined, columns[..., None], axis=1)


def next_queries(queries: mx.array, q: mx.array, step: Step) -> mx.array:
    """The last queries (b, n, h p) once those of a token, (b, h, 1, p), are among them."""
    new = mx.concatenate([queries, q.reshape(len(q), 1, -1).astype(queries.dtype)], axis=1)[:, 1:]
    return new if step.active is None else choose_rows(step.active, new, queries)


def window_tokens(
    config: Config, window: WindowState, position: mx.array, offset: mx.array
) -> tuple[mx.array, mx.array]:
    """Keys, unrotated, and values (b, g, n, p) of the tokens at `position` (b, n), which the window still holds."""
    slots = (position % config.window)[:, None, :, None]
    k, v = (mx.take_along_axis(x, slots, axis=2) for x in (window.k, window.v))
    turns = turns_of(config)
    return k if turns is None else rotate(k, rotary(position + offset[:, None], turns), inverse=True), v


# --- blocks as a store keeps them -------------------------------------------------------------------------------------


def _unrotated(
    config: Config, windows: Sequence[WindowState], begin: int, count: int, offset: mx.array
) -> tuple[mx.array, mx.array]:
    """`window_tokens` of rows that all stand at one position, of some layers: (b, layers, g, count, p) both."""
    w, first, turns = config.window, begin % config.window, turns_of(config)
    end, rest = min(first + count, w), max(first + count - w, 0)

    def joined(name: str) -> mx.array:
        rings = [getattr(x, name) for x in windows]
        parts = [mx.stack([ring[:, :, first:end] for ring in rings], axis=1)]
        return (
            mx.concatenate([*parts, mx.stack([ring[:, :, :rest] for ring in rings], axis=1)], 3) if rest else parts[0]
        )

    k, v = joined("k"), joined("v")
    if turns is not None:
        position = mx.arange(begin, begin + count, dtype=mx.int64) + offset[:, None]
        k = rotate(k.flatten(1, 2), rotary(position, turns), inverse=True).reshape(k.shape)
    return k, v


def _filled(x: mx.array, block: int, skip: int) -> mx.array:
    """x (..., t, p) in float32 and whole blocks: the first `skip` as the token after them, the last one repeated."""
    t = x.shape[-2]
    tokens = mx.clip(mx.arange(-(-t // block) * block), skip, t - 1)
    return mx.take(x.astype(mx.float32), tokens, axis=-2)


def _bytes(x: mx.array, rows: int) -> mx.array:
    return mx.contiguous(x).reshape(rows, -1).view(mx.uint8)


def packed_window(
    config: Config, windows: Sequence[WindowState], router: WindowState, begin: int, count: int, offset: mx.array,
    shape: Shape,
) -> mx.array:  # fmt: skip
    """`storage_blocks.packed` of the tokens at positions begin .. begin + count - 1, which the windows still hold.

    windows: of the shape's layers; offset (b,). The same bytes as NumPy's, computed where the windows are.
    """
    s, b, skip = shape, len(offset), min(max(config.n_sinks - begin, 0), count - 1)
    n = -(-count // s.block)
    keys = _filled(_unrotated(config, [router], begin, count, offset)[0][:, 0], s.block, skip)
    pairs = keys.reshape(b, s.kv_heads, n, s.summaries, s.pool, s.head_dim)
    means = reduce(mx.add, [pairs[..., i, :] for i in range(s.pool)]) * (1 / s.pool)
    summaries = means.transpose(0, 2, 3, 1, 4).astype(mx.float16)
    kv = mx.stack([*_unrotated(config, windows, begin, count, offset)], axis=2)
    kv = _filled(kv, s.block, skip).reshape(*kv.shape[:4], n, s.block, s.head_dim).transpose(0, 4, 1, 2, 3, 5, 6)
    scales = (mx.abs(kv).max(-1) / 127).astype(mx.float16)
    wider = scales.astype(mx.float32)
    inverse = mx.where(wider > 0, 1 / wider, mx.array(0, mx.float32))
    values = mx.clip(mx.round(kv * inverse[..., None]), -127, 127).astype(mx.int8)
    payloads = mx.concatenate([_bytes(scales, b * n), _bytes(values, b * n)], axis=1)
    return mx.concatenate([payloads.reshape(-1), _bytes(summaries, 1)[0]])


def unpacked_blocks(payloads: mx.array, shape: Shape, dtype: mx.Dtype) -> list[mx.array]:
    """`storage_blocks.unpacked` of payloads (b, n, payload_bytes): keys, values (b, g, n * block, p) of each layer."""
    s, (b, n, _) = shape, payloads.shape
    size = (b, n, len(s.layers), 2, s.kv_heads, s.block)
    scales = mx.contiguous(payloads[..., : s.scales_bytes]).view(mx.float16).reshape(size)
    values = mx.contiguous(payloads[..., s.scales_bytes :]).view(mx.int8).reshape(*size, s.head_dim)
    found = (values.astype(mx.float32) * scales.astype(mx.float32)[..., None]).astype(mx.float16).astype(dtype)
    return list(found.transpose(2, 3, 0, 4, 1, 5, 6).flatten(4, 5).flatten(0, 1))
