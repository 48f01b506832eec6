"""Operations of a model: norms, rotation, convolution, scan, innovation, selection, attention.

Everything here is a function of arrays. Nothing here knows a config, a parameter or a state. Those that have a Metal
kernel come from `bmojo_metal`, which runs it on an Apple GPU and plain MLX elsewhere.

b batch, t tokens of the call, d channels, n state or columns, h query heads, g key/value heads, p head_dim, c chunks.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import mlx.core as mx
import numpy as np

import bmojo_metal
from bmojo_metal import Eidetic as Eidetic
from bmojo_metal import Ring as Ring
from bmojo_metal import innovation_scores as innovation_scores
from bmojo_metal import promote as promote
from bmojo_metal import selective_scan as selective_scan
from bmojo_metal import selective_scan_step as selective_scan_step
from bmojo_metal import silu_conv as silu_conv
from bmojo_metal.selection import ascending

QUERY_TILE = 128  # queries whose scores exist at one time


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in float32, in the wider dtype of the two."""
    return mx.fast.rms_norm(x, weight, eps)


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """SiLU(gate) * up in one kernel."""
    return gate * mx.sigmoid(gate) * up


# --- rotary positions (docs/model.md section 3, step 4) ---------------------------------------------------------------


class Rotary(NamedTuple):
    """Cosine and sine of each pair's angle at some positions, as the two halves of a head need them."""

    cos: mx.array  # (b, 1, n, 1, p / 2) float32
    sin: mx.array  # (b, 1, n, 2, p / 2) float32: minus the sine, then the sine


def rotary(positions: mx.array, turns: mx.array) -> Rotary:
    """Angles of positions (b, n) int64 at `turns` (p / 2,) uint64, in 2^-64 of a turn a token.

    The product wraps modulo 2^64, so positions may run for ever; only the fraction of a turn left becomes a float.
    """
    phase = (positions[..., None].astype(mx.uint64) * turns).view(mx.int64)
    angle = (phase.astype(mx.float32) * (2 * math.pi / 2.0**64))[:, None, :, None]
    sin = mx.sin(angle)
    return Rotary(mx.cos(angle), mx.concatenate([-sin, sin], axis=-2))


def rotate(x: mx.array, at: Rotary | None, inverse: bool = False) -> mx.array:
    """Rotate the pairs (j, j + p/2) of x (b, heads, n, p), in float32, back to x's dtype; `at` None: as it is."""
    if at is None:
        return x
    halves = x.reshape(*x.shape[:-1], 2, -1)
    turned = halves[..., ::-1, :] * at.sin
    rotated = halves * at.cos - turned if inverse else halves * at.cos + turned
    return rotated.reshape(x.shape).astype(x.dtype)


# --- eidetic choice (step 6) ------------------------------------------------------------------------------------------


class Candidates(NamedTuple):
    """Tokens that may be kept, in order of position where they have one."""

    scores: mx.array  # (b, n) float32, none negative
    position: mx.array  # (b, n) int64, -1 = nothing there


class Chunks(NamedTuple):
    """The chunks of a call, counted per row as they come."""

    limit: mx.array  # (b, c) int64: a chunk's set holds positions below this


def _eligible(candidates: Candidates, chunks: Chunks, first: int) -> mx.array:
    """(b, c, n): which candidates compete for which chunk."""
    position = candidates.position[:, None]
    return (position >= first) & (position < chunks.limit[..., None])


def select_eidetic(candidates: Candidates, chunks: Chunks, first: int, e: int) -> mx.array:
    """The e most surprising candidates of every chunk: (b, c, e) int32 columns, ascending, -1 = empty.

    Those at a position below `first` never compete. Ties go to the earlier column.
    """
    return bmojo_metal.select_eidetic(candidates.scores, candidates.position, chunks.limit, first, e)


def find_eidetic(candidates: Candidates, chunks: Chunks, first: int, wanted: mx.array) -> mx.array:
    """Columns of the wanted positions (b, c, e), -1 = none, in place of a choice; arguments of `select_eidetic`.

    Raises ValueError naming a position that the chunk cannot keep.
    """
    n = candidates.position.shape[1]
    equal = candidates.position[:, None, None] == wanted[..., None]  # (b, c, e, n)
    found = equal & _eligible(candidates, chunks, first)[:, :, None] & (wanted >= 0)[..., None]
    missing = np.array((wanted >= 0) & ~found.any(-1))
    if missing.any():
        raise ValueError(f"eidetic_index: position {np.array(wanted)[missing][0]} is not one this chunk can keep")
    return ascending(mx.where(found.any(-1), found.argmax(-1).astype(mx.int32), n), n, wanted.shape[-1])


# --- one softmax over every memory (step 7) ---------------------------------------------------------------------------


class Queries(NamedTuple):
    """Where the t query tokens of a call stand."""

    start: tuple[int, ...]  # position of each row's first token
    position: mx.array  # (b, t) int64
    chunk: mx.array | None  # (b, t) ordinal of the token's chunk; None where nothing is chosen by chunk
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
    position: mx.array  # (b, n) int64
    # (b, c, e) columns, -1 = none; None: every chunk has all of them
    index: mx.array | None  # pyright: ignore[reportIncompatibleMethodOverride]
    near: int


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
    unwritten = first < -min(at.start)
    far, n = band.far or end - first, seen.stop - seen.start
    geometry = (end - begin, begin - first, n, band.near, far, first if unwritten else 0)
    if geometry not in at.masks:
        columns = first + np.arange(n)
        distance = np.arange(begin, end)[:, None] - columns
        visible = ((distance >= band.near) & (distance < far))[None]
        if unwritten:
            visible = visible & (columns >= -np.array(at.start)[:, None])[:, None]
        at.masks[geometry] = mx.array(np.where(visible, np.float32(0), np.float32(-np.inf))[:, None])
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
    visible = pinned.position[:, None] <= (at.position[:, begin:end] - pinned.near)[..., None]
    if members is not None and at.chunk is not None:
        visible = visible & mx.take_along_axis(members, at.chunk[:, begin:end, None], axis=1)
    return mx.where(visible, 0.0, -math.inf)[:, None]


def memory_attention(bands: list[Band], pinned: Pinned | None, at: Queries, scale: float) -> mx.array:
    """One softmax over all memories of each of t tokens: (b, h, t, p).

    The first band must let every token see itself. Scores exist for QUERY_TILE tokens at a time, softmax is in float32,
    products in the values' dtype.
    """
    t, out = bands[0].q.shape[2], []
    members = None if pinned is None else _members(pinned)
    for begin in range(0, t, QUERY_TILE):
        end = min(begin + QUERY_TILE, t)
        seen = [_in_sight(band, begin, end) for band in bands]
        bands_seen = [(band, part) for band, part in zip(bands, seen, strict=True) if part.start < part.stop]
        pins = pinned is not None and max(at.start) + end > pinned.near
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
    if band.far is None and len(set(at.start)) == 1:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask="causal")
    mask = _band_mask(band, at, begin, end, seen).astype(q.dtype)
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask)


class Slots(NamedTuple):
    """A memory of one decoding step: its query and its slots."""

    q: mx.array  # (b, h, 1, p)
    k: mx.array  # (b, g, n, p)
    v: mx.array  # (b, g, n, p)
    mask: mx.array  # (1 or b, 1, 1, n) float32: 0 where visible, else -inf


def memory_attention_step(memories: list[Slots], scale: float) -> mx.array:
    """`memory_attention` for one token: (b, h, 1, p). Keys stay where they are; only scores are put side by side."""
    (b, h, _, p), g = memories[0].q.shape, memories[0].k.shape[1]
    scores = []
    for m in memories:
        products = (m.q * scale).reshape(b, g, h // g, p) @ m.k.swapaxes(-1, -2)
        scores.append(products.astype(mx.float32) + m.mask)
    if len(memories) == 1:
        weights = [mx.softmax(scores[0], axis=-1)]
    else:
        joined = mx.softmax(mx.concatenate(scores, axis=-1), axis=-1)
        ends = np.cumsum([m.k.shape[2] for m in memories])[:-1].tolist()
        weights = mx.split(joined, ends, axis=-1)
    parts = [w.astype(m.v.dtype) @ m.v for w, m in zip(weights, memories, strict=True)]
    return sum(parts[1:], start=parts[0]).reshape(b, h, 1, p)
