"""Cases of innovation, the eidetic choice and its slots: ties, empty slots, chunks without candidates, odd sizes."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from bmojo_edge.config import Innovation
from bmojo_edge.reference_memory import innovations, rotate, top_positions
from bmojo_metal import innovation_scores, innovation_step, promote, select_eidetic
from bmojo_metal.selection import Eidetic, Ring
from tests.metal.case import BOUNDS, DTYPES, Case, rounded, to_mlx

TURNS = np.array([2**61 + 12345, 2**58 + 999], np.uint64)  # of a head of 4, in 2^-64 of a turn


def innovation(
    b: int = 2, t: int = 5, d: int = 37, taps: int = 3, error: str = "relative", lengths: list[int] | None = None
) -> Case:
    rng = np.random.default_rng(d * t)
    signal, past = (rounded(rng.standard_normal(shape), "float32") for shape in ((b, t, d), (b, taps, d)))
    rule = Innovation(error=error, taps=taps)
    scores, last = np.zeros((b, t)), np.zeros((b, taps, d))
    for row, length in enumerate(lengths or [t] * b):
        scores[row, :length] = innovations(signal[row, :length], past[row], rule)
        last[row] = np.concatenate([past[row], signal[row, :length]])[length:]

    def call() -> Sequence[mx.array]:
        given = None if lengths is None else mx.array(lengths)
        return innovation_scores(to_mlx(signal), to_mlx(past), rule.coefficients(), error, given)

    name = f"innovation {b} x {t} x {d}, {taps} taps, {error}, lengths {lengths}"
    return Case(name, ("innovation",), call, [scores, last], [BOUNDS["float32"], 0.0])


def innovation_one(
    b: int = 3, d: int = 37, taps: int = 3, w: int = 5, error: str = "relative", active: list[bool] | None = None
) -> Case:
    rng = np.random.default_rng(d * w)
    shapes = ((b, d), (b, taps, d), (b, w))
    signal, past, ring = (rounded(rng.standard_normal(shape), "float32") for shape in shapes)
    position, rule = np.arange(b) * 4 + w - 1, Innovation(error=error, taps=taps)
    scores, last = ring.copy(), past.copy()
    for row in range(b):
        if active is None or active[row]:
            scores[row, position[row] % w] = innovations(signal[row : row + 1], past[row], rule)[0]
            last[row] = np.concatenate([past[row, 1:], signal[row : row + 1]])

    def call() -> Sequence[mx.array]:
        moves = None if active is None else mx.array(active)
        arrays = to_mlx(signal), to_mlx(past), to_mlx(ring)
        return innovation_step(*arrays, mx.array(position), rule.coefficients(), error, moves)

    name = f"innovation step {b} x {d}, {taps} taps, ring of {w}, {error}, active {active}"
    return Case(name, ("innovation_step",), call, [scores, last], [BOUNDS["float32"], 0.0])


def select(
    b: int = 2, n: int = 70, c: int = 3, e: int = 5, first: int = 2, levels: int = 4, fine: bool = False
) -> Case:
    """Scores take few levels, so that most of them tie; some columns hold nothing, the last chunk has no candidate.

    fine: levels that differ in the last bit.
    """
    rng = np.random.default_rng(n + e)
    scores = rng.integers(0, levels, (b, n)).astype(np.float32) * np.float32(2**-23 if fine else 0.1) + np.float32(fine)
    position = np.where(rng.random((b, n)) < 0.2, -1, np.arange(n) + rng.integers(0, 4, (b, 1)))
    limits = np.sort(rng.integers(first, n + 3, (b, c)), axis=1)
    if c > 1:
        limits[:, -1] = 0
    index = np.full((b, c, e), -1)
    for row in range(b):
        for chunk in range(c):
            eligible = np.flatnonzero((position[row] >= first) & (position[row] < limits[row, chunk]))
            best = eligible[top_positions(scores[row, eligible], position[row, eligible], e)]
            index[row, chunk, : len(best)] = best

    def call() -> Sequence[mx.array]:
        return [select_eidetic(mx.array(scores), mx.array(position), mx.array(limits), first, e)]

    return Case(
        f"select {e} of {n}, {b} x {c} chunks, {levels} {'fine ' if fine else ''}levels",
        ("select",),
        call,
        [index],
        [0.0],
    )


def slots(
    dtype: str = "float32",
    position: list[int] | None = None,
    rows: list[bool] | None = None,
    g: int = 3,
    w: int = 8,
    e: int = 5,
    chunk: int = 3,
    p: int = 4,
    first: int = 2,
    rotated: bool = True,
) -> Case:
    position = position or [15, 12]
    b, rows = len(position), rows or [True] * len(position)
    rng = np.random.default_rng(w * e)
    ring_k, ring_v, k, v = (rounded(rng.standard_normal((b, g, n, p)), dtype) for n in (w, w, e, e))
    ring_scores, scores = (np.round(rng.random((b, n)), 1).astype(np.float32) for n in (w, e))
    old = np.full((b, e), -1)
    for row, at in enumerate(position):  # a slot stays empty where all earlier tokens are chosen
        earlier = np.arange(first, at - w)
        held = np.sort(rng.permutation(earlier)[: e - 1])
        old[row, : len(held)] = held
        scores[row, len(held) :], k[row, :, len(held) :], v[row, :, len(held) :] = 0, 0, 0
    turns = TURNS[: p // 2] if rotated else None
    want = [x.copy() for x in (k, v, scores.astype(np.float64), old)]
    for row, at in enumerate(position):
        if not rows[row]:
            continue
        new = np.arange(max(at - w, first), max(at - w + chunk, first))
        unrotated = np.moveaxis(rotate(np.moveaxis(ring_k[row][:, new % w], 0, 1), new, turns, inverse=True), 0, 1)
        full = old[row] >= 0
        places = np.concatenate([old[row][full], new])
        points = np.concatenate([scores[row][full], ring_scores[row, new % w]])
        keys = np.concatenate([k[row][:, full], unrotated], axis=1)
        values = np.concatenate([v[row][:, full], ring_v[row][:, new % w]], axis=1)
        keep = top_positions(points, places, e)
        for array, found in zip(want, (keys[:, keep], values[:, keep], points[keep], places[keep]), strict=True):
            part = array[row] if array.ndim == 2 else np.moveaxis(array[row], 1, 0)
            part[:] = -1 if array is want[3] else 0
            part[: len(keep)] = found if array.ndim == 2 else np.moveaxis(found, 1, 0)
    leaving = np.array(position)[:, None] - w + np.arange(chunk)
    with np.errstate(over="ignore"):
        phase = (leaving.astype(np.uint64)[..., None] * TURNS[: p // 2]).astype(np.int64)
    angle = phase * (2 * np.pi / 2.0**64)

    def call() -> Sequence[mx.array]:
        ring = Ring(to_mlx(ring_k, dtype), to_mlx(ring_v, dtype), mx.array(ring_scores))
        before = Eidetic(to_mlx(k, dtype), to_mlx(v, dtype), mx.array(scores), mx.array(old))
        angles = (to_mlx(np.cos(angle)), to_mlx(np.sin(angle))) if rotated else None
        return promote(ring, before, mx.array(position, mx.int64), mx.array(rows), chunk, first, angles)

    name = f"slots {dtype} at {position}, rows {rows}, {g} x {w} x {p}, {e} slots, rotated {rotated}"
    return Case(name, ("eidetic_slots", "select"), call, want, [BOUNDS[dtype], 0.0, 0.0, 0.0])


def cases() -> list[Case]:
    return [
        innovation(),
        innovation(b=3, t=2, taps=4, error="l2", lengths=[2, 1, 0]),
        innovation(b=1, t=1, d=1, taps=1),
        innovation(b=2, t=7, d=96, taps=2, lengths=[7, 3]),
        innovation_one(),
        innovation_one(d=70, taps=1, w=40, error="l2", active=[True, False, True]),
        innovation_one(b=1, d=1, taps=2, w=1),
        select(),
        select(b=1, n=1, c=1, e=1, first=0),
        select(b=1, n=4, c=1, e=6, first=0),
        select(b=2, n=300, c=2, e=17, levels=2),
        select(b=1, n=290, c=2, e=40, levels=1000),
        select(b=1, n=33, c=4, e=33, levels=1),
        select(n=60, c=6, e=6, levels=4, fine=True),
        select(b=1, n=20, c=1, e=70),
        *(slots(dtype) for dtype in DTYPES),
        slots(position=[6, 30, 9], rows=[True, False, True]),
        slots(position=[27], g=1, e=1, p=5, rotated=False),
        slots(position=[3], g=1, w=2, e=1, chunk=1, p=2),
    ]
