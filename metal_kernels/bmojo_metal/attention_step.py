"""One token against all memories of a layer, in one softmax: rings and pinned slots, read where they lie.

b batch, h query heads, g key/value heads, p head_dim, n slots.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from bmojo_metal.launch import (
    FLOATS,
    Kernel,
    kernels_available,
    require_dtypes,
    require_shapes,
    rounded_up,
    with_gradient,
)

POSITIONS = (mx.int64, mx.int32)
MAX_HEAD_DIM = 256
REGISTERS = 64  # floats a lane keeps of its queries, and again of its results
THREADGROUPS = 64  # enough to occupy an Apple GPU of up to 40 cores; computed, not measured
SHARE = 128  # keys below which a threadgroup of its own does not pay
MAX_PARTS = 8

_STEP = Kernel(
    "memory_attention_step",
    (
        *("position", "scale", "sizes", "q0", "k0", "v0", "q1", "k1", "v1"),
        *("q2", "k2", "v2", "held2", "q3", "k3", "v3", "held3"),
    ),
    ("out", "stats"),
    helpers=("memory_attention_step_header",),
)
_JOIN = Kernel("memory_attention_join", ("mixed", "stats"), ("out",))


class Slots(NamedTuple):
    """A memory of one token: its query, its slots and what says which of them are visible.

    A slot is visible when its position is at least `near` tokens back. held None: a ring, whose slot r of n has the
    last position congruent to r; else the slots' positions, negative = empty.
    mask: the same for the plain op, ready made: 0 where visible, else -inf, for the first m slots; the rest are empty.
    """

    q: mx.array  # (b, h, 1, p)
    k: mx.array  # (b, g, n, p)
    v: mx.array  # (b, g, n, p)
    near: int = 0
    held: mx.array | None = None  # (1 or b, n) integers
    mask: mx.array | None = None  # (1 or b, 1, 1, m) float32


def memory_attention_step(memories: Sequence[Slots], position: mx.array, scale: float) -> mx.array:
    """softmax(scale q k) v over all visible slots of all memories: (b, h, 1, p); docs/model.md, step 7.

    position (b,) integers: where each row's token stands; it is written already. The first memory is a ring with
    near 0, so that every token sees itself. Raises ValueError for shapes and dtypes that do not fit.

    Keys stay where they are. One memory alone is left to MLX's own fused attention, which does that as well.
    """
    _check(memories, position)
    if not kernels_available():
        return _plain(memories, position, scale)
    if len(memories) == 1:
        return _one_memory(memories[0], position, scale)
    if not _has_kernel(memories):
        return _plain(memories, position, scale)

    def repacked(*arrays: mx.array) -> list[Slots]:
        parts = [arrays[i : i + 3] for i in range(0, len(arrays), 3)]
        return [m._replace(q=q, k=k, v=v) for m, (q, k, v) in zip(memories, parts, strict=True)]

    attend = with_gradient(
        lambda *arrays: _metal(repacked(*arrays), position, scale),
        lambda *arrays: _plain(repacked(*arrays), position, scale),
    )
    return attend(*(x for m in memories for x in (m.q, m.k, m.v)))


def _check(memories: Sequence[Slots], position: mx.array) -> None:
    op = "memory_attention_step"
    if not memories or memories[0].held is not None or memories[0].near != 0:
        raise ValueError(f"{op}: the first memory must be a ring with near 0: a token sees at least itself")
    first = memories[0]
    if first.q.ndim != 4 or first.k.ndim != 4:
        raise ValueError(f"{op}: q must be (b, h, 1, p) and k (b, g, n, p), got {first.q.shape} and {first.k.shape}")
    (b, h, _, p), g = first.q.shape, first.k.shape[1]
    if g == 0 or h % g:
        raise ValueError(f"{op}: {h} query heads do not share {g} key/value heads evenly")
    require_shapes(op, position=(position, (b,)))
    require_dtypes(op, POSITIONS, position=position)
    for m in memories:
        n = m.k.shape[2] if m.k.ndim == 4 else 0
        require_shapes(op, q=(m.q, (b, h, 1, p)), k=(m.k, (b, g, n, p)), v=(m.v, (b, g, n, p)))
        require_dtypes(op, (first.q.dtype,) if first.q.dtype in FLOATS else FLOATS, q=m.q, k=m.k, v=m.v)
        if n == 0 or m.near < 0:
            raise ValueError(f"{op}: a memory needs slots and near >= 0, got {n} slots and near {m.near}")
        if m.held is not None:
            require_shapes(op, held=(m.held, (b if m.held.shape[0] != 1 else 1, n)))
            require_dtypes(op, POSITIONS, held=m.held)


def _has_kernel(memories: Sequence[Slots]) -> bool:
    """The kernel takes up to two rings, then up to two memories with positions, in this order."""
    rings = [m.held is None for m in memories]
    ordered = rings == sorted(rings, reverse=True)
    return ordered and sum(rings) <= 2 and len(rings) - sum(rings) <= 2 and memories[0].q.shape[3] <= MAX_HEAD_DIM


def heads_together(group: int, head_dim: int) -> int:
    """How many of `group` query heads that share keys one threadgroup takes: all that fit its registers."""
    width = -(-head_dim // 8)
    return max(n for n in range(1, group + 1) if group % n == 0 and (n == 1 or n * width <= REGISTERS))


def parts_of(threadgroups: int, slots: int) -> int:
    """Into how many shares the keys are split so that so many threadgroups become enough to fill a GPU."""
    return max(1, min(MAX_PARTS, THREADGROUPS // max(threadgroups, 1), slots // SHARE))


def _metal(memories: Sequence[Slots], position: mx.array, scale: float) -> mx.array:
    (b, h, _, p), g, dtype = memories[0].q.shape, memories[0].k.shape[1], memories[0].q.dtype
    rings = [m for m in memories if m.held is None]
    pinned = [m for m in memories if m.held is not None]
    heads = heads_together(h // g, p)
    parts = parts_of(b * h // heads, sum(m.k.shape[2] for m in memories))
    ring = rings[-1]
    pins = [*pinned, *([Slots(*memories[0][:3], held=position[:1, None])] * 2)][:2]
    sizes = mx.array([ring.near, pins[0].near, pins[1].near, parts], mx.int32)
    inputs = [position, mx.array(scale, mx.float32), sizes, *memories[0][:3], *ring[:3]]
    for m in pins:
        inputs += [m.q, m.k, m.v, m.held]
    out, stats = _STEP(
        inputs,
        [((parts, b, h, p), dtype if parts == 1 else mx.float32), ((parts, b * h, 2), mx.float32)],
        grid=(parts * 256, h // heads, b),
        threadgroup=(256, 1, 1),
        template=[
            *(("O", dtype if parts == 1 else mx.float32), ("HEAD_DIM", p), ("HEADS", heads)),
            *(("RING1", len(rings) == 2), ("PINNED2", len(pinned) >= 1), ("PINNED3", len(pinned) == 2)),
        ],
    )
    if parts > 1:
        size = b * h * p
        (out,) = _JOIN(
            [out, stats],
            [((b, h, 1, p), dtype)],
            grid=(size, 1, 1),
            threadgroup=(min(256, rounded_up(size, 32)), 1, 1),
            template=[("T", dtype), ("HEAD_DIM", p)],
        )
    return out.reshape(b, h, 1, p)


def _mask(memory: Slots, position: mx.array) -> mx.array:
    """0 where a slot is visible, else -inf: (1 or b, 1, 1, m) float32."""
    if memory.mask is not None:
        return memory.mask
    now, n = position[:, None], memory.k.shape[2]
    held = now - (now - mx.arange(n)) % n if memory.held is None else memory.held
    return mx.where((held >= 0) & (held <= now - memory.near), 0.0, -math.inf)[:, None, None]


def _one_memory(memory: Slots, position: mx.array, scale: float) -> mx.array:
    mask = _mask(memory, position)
    seen = mask.shape[-1]
    k, v = memory.k[:, :, :seen], memory.v[:, :, :seen]
    return mx.fast.scaled_dot_product_attention(memory.q, k, v, scale=scale, mask=mask.astype(memory.q.dtype))


def _plain(memories: Sequence[Slots], position: mx.array, scale: float) -> mx.array:
    """Only scores are put side by side; softmax is in float32, products in the values' dtype."""
    (b, h, _, p), g = memories[0].q.shape, memories[0].k.shape[1]
    masks = [_mask(m, position) for m in memories]
    sizes = [mask.shape[-1] for mask in masks]
    scores = []
    for m, mask, n in zip(memories, masks, sizes, strict=True):
        k = m.k if n == m.k.shape[2] else m.k[:, :, :n]
        products = (m.q * scale).reshape(b, g, h // g, p) @ k.swapaxes(-1, -2)
        scores.append(products.astype(mx.float32) + mask)
    if len(memories) == 1:
        weights = [mx.softmax(scores[0], axis=-1)]
    else:
        joined = mx.softmax(mx.concatenate(scores, axis=-1), axis=-1)
        weights = mx.split(joined, np.cumsum(sizes)[:-1].tolist(), axis=-1)
    parts = []
    for m, w in zip(memories, weights, strict=True):
        v = m.v if w.shape[-1] == m.v.shape[2] else m.v[:, :, : w.shape[-1]]
        parts.append(w.astype(v.dtype) @ v)
    return sum(parts[1:], start=parts[0]).reshape(b, h, 1, p)
