"""The tokens of a call against all memories of a layer, in one softmax: bands by distance, pinned columns by index.

b batch, h query heads, g key/value heads, t tokens of the call, p head_dim, c chunks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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

QUERY_TILE = 128  # queries whose scores exist at one time in the plain op
INDICES = (mx.int32, mx.int64)
MAX_HEAD_DIM = 256

_ATTENTION = Kernel(
    "memory_attention",
    (
        *("position", "chunk", "scale", "sizes", "q0", "k0", "v0", "q1", "k1", "v1"),
        *("q2", "k2", "v2", "held", "lists"),
    ),
    ("out",),
    helpers=("memory_attention_header",),
)


class Queries(NamedTuple):
    """Where the t query tokens of a call stand."""

    start: tuple[int, ...] | None  # position of each row's first token, None = known to the device alone
    position: mx.array  # (b, t) int64: neighbours in every row
    chunk: mx.array | None  # (b, t) ordinal of the token's chunk, ascending; None where nothing is chosen by chunk
    masks: dict[tuple[int, ...], mx.array]  # masks made so far: layers of one call share them


class Band(NamedTuple):
    """A memory read by distance: columns are the m tokens before the call, oldest first, then the call's t tokens.

    Token i sees columns with near <= i - position < far; `far` None: all earlier ones.
    """

    q: mx.array  # (b, h, t, p)
    k: mx.array  # (b, g, m + t, p)
    v: mx.array  # (b, g, m + t, p)
    near: int
    far: int | None


class Pinned(NamedTuple):
    """A memory read by index: every chunk has a short list of columns, seen from `near` tokens on."""

    q: mx.array  # (b, h, t, p)
    k: mx.array  # (b, g, n, p)
    v: mx.array  # (b, g, n, p)
    position: mx.array  # (b, n) int64, negative = nothing there
    # (b, c, e) columns, each at most once in a list, -1 = none; None: every chunk has all of them
    index: mx.array | None  # pyright: ignore[reportIncompatibleMethodOverride]
    near: int


def memory_attention(bands: Sequence[Band], pinned: Pinned | None, at: Queries, scale: float) -> mx.array:
    """softmax(scale q k) v over all memories of each of t tokens: (b, h, t, p); docs/model.md, step 7.

    The first band must let every token see itself. Raises ValueError for shapes and dtypes that do not fit.

    Where only one band is in sight MLX's own fused attention does as well, and does it.
    """
    _check(bands, pinned, at)
    if kernels_available() and _has_kernel(bands, pinned):
        # What is not nearer than this, no token sees.
        reach = math.inf if at.start is None else max(at.start) + bands[0].q.shape[2]
        seen = [band for band in bands if band.near < reach]
        pins = pinned if pinned is not None and pinned.near < reach else None
        if len(seen) > 1 or pins is not None:
            return _with_gradient(seen, pins, at, scale)
    return _plain(bands, pinned, at, scale)


def _check(bands: Sequence[Band], pinned: Pinned | None, at: Queries) -> None:
    op = "memory_attention"
    if not bands or bands[0].near != 0 or bands[0].far == 0:
        raise ValueError(f"{op}: the first band must have near 0 and far > 0: a token sees at least itself")
    if bands[0].q.ndim != 4 or bands[0].k.ndim != 4:
        raise ValueError(f"{op}: q must be (b, h, t, p) and k (b, g, m + t, p)")
    (b, h, t, p), g = bands[0].q.shape, bands[0].k.shape[1]
    if g == 0 or h % g:
        raise ValueError(f"{op}: {h} query heads do not share {g} key/value heads evenly")
    dtypes = (bands[0].q.dtype,) if bands[0].q.dtype in FLOATS else FLOATS
    require_shapes(op, position=(at.position, (b, t)))
    if at.start is not None and len(at.start) != b:
        raise ValueError(f"{op}: start must have {b} positions, got {len(at.start)}")
    for m in (*bands, *(() if pinned is None else (pinned,))):
        n = m.k.shape[2] if m.k.ndim == 4 else 0
        require_shapes(op, q=(m.q, (b, h, t, p)), k=(m.k, (b, g, n, p)), v=(m.v, (b, g, n, p)))
        require_dtypes(op, dtypes, q=m.q, k=m.k, v=m.v)
        if isinstance(m, Band) and n < t:
            raise ValueError(f"{op}: a band's columns end with the call's {t} tokens, but it has {n}")
    if pinned is None:
        return
    require_shapes(op, position=(pinned.position, (b, pinned.k.shape[2])))
    require_dtypes(op, INDICES, position=pinned.position)
    if pinned.index is not None:
        if at.chunk is None or pinned.index.ndim != 3 or pinned.index.shape[0] != b:
            raise ValueError(f"{op}: lists of columns must be ({b}, c, e), and the queries must have chunks")
        require_shapes(op, chunk=(at.chunk, (b, t)))
        require_dtypes(op, INDICES, index=pinned.index, chunk=at.chunk)


def _has_kernel(bands: Sequence[Band], pinned: Pinned | None) -> bool:
    """The kernel takes up to two bands and a pinned memory with columns."""
    listed = pinned is None or (pinned.k.shape[2] > 0 and (pinned.index is None or pinned.index.size > 0))
    return len(bands) <= 2 and listed and bands[0].q.shape[3] <= MAX_HEAD_DIM


def _with_gradient(bands: Sequence[Band], pinned: Pinned | None, at: Queries, scale: float) -> mx.array:
    def repacked(*arrays: mx.array) -> tuple[list[Band], Pinned | None]:
        parts = [arrays[i : i + 3] for i in range(0, len(arrays), 3)]
        new = [m._replace(q=q, k=k, v=v) for m, (q, k, v) in zip(bands, parts, strict=False)]
        return new, None if pinned is None else pinned._replace(q=parts[-1][0], k=parts[-1][1], v=parts[-1][2])

    attend = with_gradient(
        lambda *arrays: _metal(*repacked(*arrays), at, scale),
        lambda *arrays: _plain(*repacked(*arrays), at, scale),
    )
    memories = (*bands, *(() if pinned is None else (pinned,)))
    return attend(*(x for m in memories for x in m[:3]))


def _metal(bands: Sequence[Band], pinned: Pinned | None, at: Queries, scale: float) -> mx.array:
    (b, h, t, p), dtype = bands[0].q.shape, bands[0].q.dtype
    one, two = bands[0], bands[-1]
    pins = pinned or Pinned(one.q, one.k, one.v, at.position, None, 0)
    far = [band.k.shape[2] if band.far is None else min(band.far, band.k.shape[2]) for band in (one, two)]
    lists = pins.position if pins.index is None else pins.index
    sizes = mx.array([one.near, far[0], two.near, far[1], pins.near], mx.int32)
    (out,) = _ATTENTION(
        [
            *(at.position, at.position if at.chunk is None else at.chunk, mx.array(scale, mx.float32), sizes),
            *(*one[:3], *two[:3], *pins[:3], pins.position, lists),
        ],
        [((b, t, h, p), dtype)],
        grid=(rounded_up(t, 32) * 4, h, b),
        threadgroup=(128, 1, 1),
        template=[
            *(("T", dtype), ("HEAD_DIM", p), ("BAND1", len(bands) == 2)),
            *(("PINNED", pinned is not None), ("LISTS", pins.index is not None)),
        ],
    )
    return out.swapaxes(1, 2)  # heads side by side, as the output projection wants them


# --- plain MLX --------------------------------------------------------------------------------------------------------


def _scores(q: mx.array, k: mx.array) -> mx.array:
    """Products of scaled q (b, h, t, p) and k (b, g, n, p): (b, h, t, n) float32."""
    (b, h, t, p), g = q.shape, k.shape[1]
    products = q.reshape(b, g, h // g * t, p) @ k.swapaxes(-1, -2)
    return products.reshape(b, h, t, -1).astype(mx.float32)


def _mix(weights: mx.array, v: mx.array) -> mx.array:
    """weights (b, h, t, n) over v (b, g, n, p): (b, h, t, p)."""
    (b, h, t, n), g = weights.shape, v.shape[1]
    return (weights.reshape(b, g, h // g * t, n) @ v).reshape(b, h, t, -1)


def _in_sight(band: Band, begin: int, end: int) -> slice:
    """Columns that tokens begin .. end - 1 may see."""
    m = band.k.shape[2] - band.q.shape[2]
    oldest = 0 if band.far is None else max(0, m + begin - band.far + 1)
    return slice(oldest, max(oldest, m + end - band.near))


def _band_mask(band: Band, at: Queries, begin: int, end: int, seen: slice) -> mx.array:
    """0 where token begin .. end - 1 sees a column, else -inf: (1 or b, 1, tile, n) float32."""
    first = seen.start - (band.k.shape[2] - band.q.shape[2])  # of the columns, counted from the call's first token
    unwritten = at.start is None or first < -min(at.start)
    far, n = band.far or end - first, seen.stop - seen.start
    geometry = (end - begin, begin - first, n, band.near, far, first if unwritten else 0)
    if geometry not in at.masks:
        columns = first + np.arange(n)
        distance = np.arange(begin, end)[:, None] - columns
        visible: Any = ((distance >= band.near) & (distance < far))[None]
        if at.start is None:
            written = mx.array(columns) >= -at.position[:, :1]
            visible = mx.array(visible) & written[:, None]
        elif unwritten:
            visible = visible & (columns >= -np.array(at.start)[:, None])[:, None]
        at.masks[geometry] = mx.where(mx.array(visible), 0.0, -math.inf)[:, None]
    return at.masks[geometry]


def _members(pinned: Pinned) -> mx.array | None:
    """(b, c, n) bool: which columns are on which chunk's list."""
    if pinned.index is None:
        return None
    (b, c, _), n = pinned.index.shape, pinned.position.shape[1]
    columns = mx.where(pinned.index < 0, n, pinned.index)
    return mx.put_along_axis(mx.zeros((b, c, n + 1), mx.bool_), columns, mx.array(True), axis=-1)[..., :n]


def _pinned_mask(pinned: Pinned, members: mx.array | None, at: Queries, begin: int, end: int) -> mx.array:
    """0 where token begin .. end - 1 sees a column, else -inf: (b, 1, tile, n)."""
    position = pinned.position[:, None]
    visible = (position >= 0) & (position <= (at.position[:, begin:end] - pinned.near)[..., None])
    if members is not None and at.chunk is not None:
        visible = visible & mx.take_along_axis(members, at.chunk[:, begin:end, None], axis=1)
    return mx.where(visible, 0.0, -math.inf)[:, None]


def _plain(bands: Sequence[Band], pinned: Pinned | None, at: Queries, scale: float) -> mx.array:
    """Scores exist for QUERY_TILE tokens at a time, softmax is in float32, products in the values' dtype."""
    t, out = bands[0].q.shape[2], []
    members = None if pinned is None else _members(pinned)
    for begin in range(0, t, QUERY_TILE):
        end = min(begin + QUERY_TILE, t)
        seen = [_in_sight(band, begin, end) for band in bands]
        bands_seen = [(band, part) for band, part in zip(bands, seen, strict=True) if part.start < part.stop]
        pins = pinned is not None and (at.start is None or max(at.start) + end > pinned.near)
        if len(bands_seen) == 1 and not pins:
            out.append(_one_band(*bands_seen[0], at, begin, end, scale))
            continue
        scores = [
            _scores(band.q[:, :, begin:end] * scale, band.k[:, :, part]) + _band_mask(band, at, begin, end, part)
            for band, part in bands_seen
        ]
        values = [band.v[:, :, part] for band, part in bands_seen]
        if pinned is not None and pins:
            mask = _pinned_mask(pinned, members, at, begin, end)
            scores.append(_scores(pinned.q[:, :, begin:end] * scale, pinned.k) + mask)
            values.append(pinned.v)
        weights = mx.softmax(mx.concatenate(scores, axis=-1), axis=-1)
        out.append(_mix(weights.astype(values[0].dtype), mx.concatenate(values, axis=2)))
    return out[0] if len(out) == 1 else mx.concatenate(out, axis=2)


def _one_band(band: Band, seen: slice, at: Queries, begin: int, end: int, scale: float) -> mx.array:
    """MLX's own attention does where there is a single memory: (b, h, tile, p)."""
    q, k, v = band.q[:, :, begin:end], band.k[:, :, seen], band.v[:, :, seen]
    if band.far is None and at.start is not None and len(set(at.start)) == 1:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
    mask = _band_mask(band, at, begin, end, seen).astype(q.dtype)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)
