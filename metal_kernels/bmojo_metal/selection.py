"""Which tokens are surprising, which of them are kept, and the slots they are kept in (docs/model.md, steps 5 and 6).

b batch, t tokens of the call, d channels, n candidates, c chunks, e slots, g key/value heads, p head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx

from bmojo_metal.launch import (
    FLOATS,
    SIMD,
    Kernel,
    kernels_available,
    require_dtypes,
    require_shapes,
    rounded_up,
    with_gradient,
)

_INNOVATION = Kernel("innovation", ("signal", "past", "coefficients", "lengths"), ("scores", "last"))
_INNOVATION_STEP = Kernel(
    "innovation_step", ("signal", "past", "ring", "position", "active", "coefficients"), ("new_ring", "last")
)
_SELECT = Kernel("select", ("scores", "position", "limits", "first", "e"), ("index",))
_SLOTS = Kernel(
    "eidetic_slots",
    ("index", "ring_k", "ring_v", "k", "v", "scores", "position", "rows", "cos", "sin"),
    ("new_k", "new_v", "new_scores", "new_position"),
)
_GROUPS = 8  # SIMD-groups of a threadgroup that selects, at most


# --- innovation -------------------------------------------------------------------------------------------------------


def innovation_scores(
    signal: mx.array,
    past: mx.array,
    coefficients: Sequence[float],
    error: str,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """How badly a fixed average of the past predicts a signal, (b, t) float32, and the new past.

    signal (b, t, d) and past (b, taps, d), oldest first, float32; coefficients[0] weighs the latest value; error
    "relative" (to the signal's square) or "l2"; lengths (b,) int32: a row's tokens after so many score 0 and are not
    remembered. Raises ValueError for other shapes, dtypes and errors.
    """
    taps = len(coefficients)
    if error not in ("relative", "l2"):
        raise ValueError(f"innovation_scores: error must be 'relative' or 'l2', got {error!r}")
    if signal.ndim != 3 or 0 in signal.shape:
        raise ValueError(f"innovation_scores: signal must be (b, t, d), none of them 0, got {signal.shape}")
    require_shapes("innovation_scores", past=(past, (len(signal), taps, signal.shape[2])))
    require_dtypes("innovation_scores", (mx.float32,), signal=signal, past=past)
    if lengths is not None:
        require_shapes("innovation_scores", lengths=(lengths, (len(signal),)))
    given, relative = tuple(float(c) for c in coefficients), error == "relative"
    if not kernels_available() or taps == 0:
        return _innovation_reference(given, relative, lengths, signal, past)
    run = with_gradient(
        lambda *a: _innovation_metal(given, relative, lengths, *a),
        lambda *a: _innovation_reference(given, relative, lengths, *a),
    )
    return run(signal, past)


def _innovation_metal(
    coefficients: tuple[float, ...], relative: bool, lengths: mx.array | None, signal: mx.array, past: mx.array
) -> tuple[mx.array, mx.array]:
    b, t, _ = signal.shape
    lengths = mx.array([t] * b, mx.int32) if lengths is None else lengths.astype(mx.int32)
    scores, last = _INNOVATION(
        [signal, past, mx.array(coefficients, mx.float32), lengths],
        [((b, t), mx.float32), (past.shape, mx.float32)],
        grid=(SIMD, t, b),
        threadgroup=(SIMD, 1, 1),
        template=[("TAPS", len(coefficients)), ("RELATIVE", relative)],
    )
    return scores, last


def _innovation_reference(
    coefficients: tuple[float, ...], relative: bool, lengths: mx.array | None, signal: mx.array, past: mx.array
) -> tuple[mx.array, mx.array]:
    t, taps = signal.shape[1], len(coefficients)
    padded, miss = mx.concatenate([past, signal], axis=1), signal
    for j, c in enumerate(coefficients, start=1):
        miss = miss - c * padded[:, taps - j : taps - j + t]
    score = miss.square().sum(-1)
    score = score / (signal.square().sum(-1) + 1e-6) if relative else score
    if lengths is None:
        return score, padded[:, t:]
    index = lengths[:, None] + mx.arange(taps)
    last = mx.take_along_axis(padded, index[..., None], axis=1)
    return mx.where(mx.arange(t) < lengths[:, None], score, 0.0), last


def innovation_step(
    signal: mx.array,
    past: mx.array,
    ring: mx.array,
    position: mx.array,
    coefficients: Sequence[float],
    error: str,
    active: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """One token of `innovation_scores`, signal (b, d): the ring of scores with the token's in it, and the new past.

    ring (b, w) float32: slot = position mod w; position (b,) int64; active (b,) bool, not all
    false: rows that rest keep both.
    """
    taps = len(coefficients)
    if error not in ("relative", "l2"):
        raise ValueError(f"innovation_step: error must be 'relative' or 'l2', got {error!r}")
    if signal.ndim != 2 or 0 in signal.shape or ring.ndim != 2:
        raise ValueError(f"innovation_step: signal must be (b, d) and ring (b, w), got {signal.shape} and {ring.shape}")
    b, d = signal.shape
    require_shapes(
        "innovation_step", past=(past, (b, taps, d)), ring=(ring, (b, ring.shape[1])), position=(position, (b,))
    )
    require_dtypes("innovation_step", (mx.float32,), signal=signal, past=past, ring=ring)
    if active is not None:
        require_shapes("innovation_step", active=(active, (b,)))
    given, relative = tuple(float(c) for c in coefficients), error == "relative"
    if kernels_available() and taps:
        new, last = _INNOVATION_STEP(
            [
                signal,
                past,
                ring,
                position,
                mx.array([True] * b) if active is None else active,
                mx.array(given, mx.float32),
            ],
            [(ring.shape, mx.float32), (past.shape, mx.float32)],
            grid=(SIMD, b, 1),
            threadgroup=(SIMD, 1, 1),
            template=[("TAPS", taps), ("RELATIVE", relative)],
        )
        return new, last
    lengths = None if active is None else active.astype(mx.int32)
    score, last = _innovation_reference(given, relative, lengths, signal[:, None], past)
    slot = position[:, None] % ring.shape[1]
    if active is None:
        return mx.put_along_axis(ring, slot, score, axis=1), last
    # Rows that rest write again what an active one writes: the ring, read by nothing else, is then changed in place.
    rows = mx.where(active, mx.arange(b), mx.argmax(active))
    place = rows[:, None] * ring.shape[1] + mx.take(slot, rows, axis=0)
    return mx.put_along_axis(ring.reshape(-1, 1), place, mx.take(score, rows, axis=0), axis=0).reshape(ring.shape), last


# --- the choice -------------------------------------------------------------------------------------------------------


def select_eidetic(scores: mx.array, position: mx.array, limits: mx.array, first: int, e: int) -> mx.array:
    """The e most surprising candidates of every chunk: (b, c, e) int32 columns, ascending, -1 = empty.

    scores (b, n) float32, those below 0 never chosen; position (b, n) int64, -1 = nothing there; limits (b, c) int64: a
    chunk's set holds positions from `first` up to, not with, its limit. Ties go to the earlier column.
    """
    b, n = scores.shape
    require_shapes("select_eidetic", position=(position, (b, n)), limits=(limits, (b, limits.shape[-1])))
    require_dtypes("select_eidetic", (mx.float32,), scores=scores)
    require_dtypes("select_eidetic", (mx.int64,), position=position, limits=limits)
    if e < 1 or n < 1:
        raise ValueError(f"select_eidetic: nothing to choose: {e} of {n} candidates")
    scores = mx.stop_gradient(scores)
    if not kernels_available():
        return _select_reference(scores, position, limits, first, e)
    groups = min(_GROUPS, rounded_up(n, SIMD) // SIMD)
    (index,) = _SELECT(
        [scores, position, limits, first, e],
        [((*limits.shape, e), mx.int32)],
        grid=(groups * SIMD, limits.shape[1], b),
        threadgroup=(groups * SIMD, 1, 1),
        template=[("GROUPS", groups)],
    )
    return index


def _select_reference(scores: mx.array, position: mx.array, limits: mx.array, first: int, e: int) -> mx.array:
    n, place = scores.shape[1], position[:, None]
    # Bits of non-negative floats order as the floats do; the column below them makes every key unique.
    bits = scores.view(mx.int32).astype(mx.int64) * 2**32
    key = (bits + (n - mx.arange(n, dtype=mx.int64)))[:, None]
    key = mx.where((place >= first) & (place < limits[..., None]), key, 0)  # (b, c, n)
    best = mx.argsort(-key, axis=-1)[..., :e].astype(mx.int32)
    best = mx.where(mx.take_along_axis(key, best, axis=-1) > 0, best, n)
    return ascending(best, n, e)


def ascending(columns: mx.array, n: int, size: int) -> mx.array:
    """Columns (b, c, m), n = none, in order and in `size` places, -1 = none."""
    columns = mx.sort(columns, axis=-1)[..., :size]
    columns = mx.where(columns == n, -1, columns)
    missing = size - columns.shape[-1]
    return mx.pad(columns, [(0, 0), (0, 0), (0, missing)], constant_values=-1) if missing else columns


# --- slots ------------------------------------------------------------------------------------------------------------


class Ring(NamedTuple):
    """The in-context ring: slot = position mod w, keys rotated."""

    k: mx.array  # (b, g, w, p)
    v: mx.array  # (b, g, w, p)
    scores: mx.array  # (b, w) float32


class Eidetic(NamedTuple):
    """Eidetic slots sorted by position, empty ones (position -1, all else 0) last, keys not rotated."""

    k: mx.array  # (b, g, e, p)
    v: mx.array  # (b, g, e, p)
    scores: mx.array  # (b, e) float32
    positions: mx.array  # (b, e) int64


def promote(
    ring: Ring,
    old: Eidetic,
    position: mx.array,
    rows: mx.array,
    chunk: int,
    first: int,
    angles: tuple[mx.array, mx.array] | None,
) -> Eidetic:
    """The eidetic slots once the `chunk` tokens that leave the window next have competed for them.

    position (b,) int64: of the token about to be written, a multiple of `chunk` in `rows` (b,) bool; other rows keep
    their slots. Positions below `first` never compete. angles: cosine and sine (b, chunk, p / 2) float32 by which the
    keys of the leaving tokens, oldest first, were rotated; None: they were not.
    """
    (b, g, w, p), e = ring.k.shape, old.k.shape[2]
    require_shapes(
        "promote",
        ring_v=(ring.v, (b, g, w, p)),
        ring_scores=(ring.scores, (b, w)),
        k=(old.k, (b, g, e, p)),
        v=(old.v, (b, g, e, p)),
        scores=(old.scores, (b, e)),
        positions=(old.positions, (b, e)),
        position=(position, (b,)),
        rows=(rows, (b,)),
    )
    require_dtypes("promote", FLOATS, ring_k=ring.k)
    require_dtypes("promote", (ring.k.dtype,), ring_v=ring.v, k=old.k, v=old.v)
    require_dtypes("promote", (mx.bool_,), rows=rows)
    if angles is not None:
        require_shapes("promote", cos=(angles[0], (b, chunk, p // 2)), sin=(angles[1], (b, chunk, p // 2)))
    leaving = (position - w)[:, None] + mx.arange(chunk, dtype=mx.int64)  # (b, chunk)
    slot = leaving % w
    scores = mx.concatenate([old.scores, mx.take_along_axis(ring.scores, slot, axis=1)], axis=1)
    positions = mx.concatenate([old.positions, leaving], axis=1)
    index = select_eidetic(scores, positions, (position - w + chunk)[:, None], first, e)[:, 0]
    if not kernels_available():
        return _slots_reference(index, ring, old, scores, positions, slot, rows, angles)
    cos, sin = (scores, scores) if angles is None else angles  # not read where keys are not rotated
    new = _SLOTS(
        [index, ring.k, ring.v, old.k, old.v, scores, positions, rows, cos, sin],
        [
            (old.k.shape, old.k.dtype),
            (old.v.shape, old.v.dtype),
            (old.scores.shape, mx.float32),
            (old.positions.shape, mx.int64),
        ],
        grid=(p, e, b * g),
        threadgroup=(min(p, 256), 1, 1),
        template=[("T", old.k.dtype), ("ROTATED", angles is not None)],
    )
    return Eidetic(*new)


def _slots_reference(
    index: mx.array,
    ring: Ring,
    old: Eidetic,
    scores: mx.array,
    positions: mx.array,
    slot: mx.array,
    rows: mx.array,
    angles: tuple[mx.array, mx.array] | None,
) -> Eidetic:
    k, v = (mx.take_along_axis(y, slot[:, None, :, None], axis=2) for y in (ring.k, ring.v))
    if angles is not None:
        cos, sin = (y[:, None] for y in angles)
        a, b = mx.split(k.astype(mx.float32), 2, axis=-1)
        k = mx.concatenate([a * cos + b * sin, b * cos - a * sin], axis=-1).astype(k.dtype)
    full, column = index >= 0, mx.maximum(index, 0)
    k, v = (
        mx.where(
            full[:, None, :, None],
            mx.take_along_axis(mx.concatenate([before, y], axis=2), column[:, None, :, None], axis=2),
            mx.array(0, y.dtype),
        )
        for before, y in ((old.k, k), (old.v, v))
    )
    scores, positions = (mx.take_along_axis(y, column, axis=1) for y in (scores, positions))
    new = Eidetic(k, v, mx.where(full, scores, 0.0), mx.where(full, positions, -1))
    chosen = (mx.where(rows.reshape(-1, *(1,) * (a.ndim - 1)), a, b) for a, b in zip(new, old, strict=True))
    return Eidetic(*chosen)
