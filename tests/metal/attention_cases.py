"""Cases of the attention over all memories: every dtype, ragged rows, sizes that divide nothing, few elements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

import bmojo_metal.attention_step
from bmojo_edge.reference_memory import slot_positions
from bmojo_metal import memory_attention, memory_attention_step
from bmojo_metal.attention import Band, Pinned, Queries
from bmojo_metal.attention_step import Slots
from tests.metal.case import BOUNDS, DTYPES, Case, rounded, to_mlx

DEFAULTS: dict[str, Any] = {"SHARE": bmojo_metal.attention_step.SHARE}
SPLIT: dict[str, Any] = {"SHARE": 4, "THREADGROUPS": 12}


@dataclass(frozen=True)
class Memory:
    """A memory of one row for the oracle: a query for each head, keys and values of those tokens that are visible."""

    q: np.ndarray  # (h, p)
    k: np.ndarray  # (g, n, p)
    v: np.ndarray  # (g, n, p)


def attend(memories: Sequence[Memory], scale: float) -> np.ndarray:
    """One softmax over all memories, head by head, in float64: (h, p)."""
    h, g = memories[0].q.shape[0], memories[0].k.shape[0]
    out = np.zeros(memories[0].q.shape)
    for head in range(h):
        kv = head * g // h
        scores = np.concatenate([m.k[kv] @ m.q[head] for m in memories]) * scale
        weights = np.exp(scores - scores.max())
        out[head] = weights @ np.concatenate([m.v[kv] for m in memories]) / weights.sum()
    return out


def step(
    dtype: str = "float32",
    positions: Sequence[int] = (11, 30),
    heads: tuple[int, int] = (4, 2),
    p: int = 8,
    window: int = 5,
    fading: int = 3,
    sinks: int = 2,
    eidetic: int = 4,
    sizes: dict[str, Any] | None = None,
) -> Case:
    """`sizes`: constants of bmojo_metal.attention_step, small enough for few keys to be split."""
    b, (h, g), w = len(positions), heads, window
    rng = np.random.default_rng(sum(positions) + p + w)
    scale = p**-0.5

    def array(*shape: int) -> np.ndarray:
        return rounded(rng.standard_normal(shape), dtype)

    held_eidetic = np.full((b, eidetic), -1)
    for row, position in enumerate(positions):  # the last of them are too young, or there is none
        recent = rng.permutation(min(position, 500))[: max(eidetic - row, 0)]
        old = position - 1 - recent
        held_eidetic[row, : len(old)] = np.sort(old)
    shapes = [("ring", w, 0)] + [("ring", w + fading, w)] * (fading > 0)
    shapes += [("sinks", sinks, w)] * (sinks > 0) + [("eidetic", eidetic, w)] * (eidetic > 0)
    memories, read = [], [[] for _ in positions]
    q_pinned = array(b, h, p)
    for kind, n, near in shapes:
        q = array(b, h, p) if kind == "ring" else q_pinned
        k, v = array(b, g, n, p), array(b, g, n, p)
        held = np.arange(n)[None] if kind == "sinks" else held_eidetic
        for row, position in enumerate(positions):
            there = slot_positions(n, position) if kind == "ring" else held[-1 if kind == "sinks" else row]
            seen = (there >= 0) & (there <= position - near)
            read[row].append(Memory(q[row], k[row][:, seen], v[row][:, seen]))
        given = None if kind == "ring" else mx.array(held)
        q, k, v = (to_mlx(x, dtype) for x in (q[:, :, None], k, v))
        memories.append(Slots(q, k, v, near, given))
    want = np.stack([attend(row, scale) for row in read])[:, :, None]

    def call() -> Sequence[mx.array]:
        with patch.multiple(bmojo_metal.attention_step, **(sizes or DEFAULTS)):
            return [memory_attention_step(memories, mx.array(list(positions), mx.int64), scale)]

    bodies = ("memory_attention_step", "memory_attention_step_header") + ("memory_attention_join",) * (
        sizes is not None
    )
    name = f"step {dtype} at {positions}, {heads} heads of {p}, {w} + {fading} + {sinks} + {eidetic}, sizes {sizes}"
    return Case(name, bodies, call, [want], [BOUNDS[dtype]])


def step_cases() -> list[Case]:
    return [
        *(step(dtype) for dtype in DTYPES),
        *(step(dtype, positions=(400, 3, 64), heads=(6, 2), p=20, window=48, sizes=SPLIT) for dtype in DTYPES),
        step(positions=(0,), heads=(1, 1), p=2, window=1, fading=1, sinks=1, eidetic=1),  # constant address space
        step(positions=(1,), heads=(1, 1), p=2, window=1, fading=1, sinks=1, eidetic=1),
        step(positions=(2,), heads=(1, 1), p=2, window=1, fading=1, sinks=1, eidetic=1),
        step(positions=(3, 4, 5), heads=(3, 1), p=6, window=4, fading=0, sinks=0, eidetic=3),
        step(positions=(4, 70), heads=(5, 5), p=33, window=4, fading=0, sinks=3, eidetic=0),
        step(positions=(90,), heads=(8, 1), p=12, window=33, fading=31, sinks=0, eidetic=0, sizes=SPLIT),
        step(positions=(5,), heads=(2, 1), p=4, window=5, fading=2, sinks=1, eidetic=5),
        step(positions=(2**33 + 7,), window=5, eidetic=0),
        step("bfloat16", positions=(300,), heads=(4, 1), p=128, window=64, fading=32, sinks=4, eidetic=40),
    ]


def prefill(
    dtype: str = "float32",
    start: Sequence[int] = (9, 3),
    t: int = 37,
    heads: tuple[int, int] = (2, 1),
    p: int = 8,
    window: int = 12,
    fading: int = 7,
    sinks: int = 2,
    eidetic: int = 5,
    chunk: int = 8,
) -> Case:
    """sinks or eidetic 0: no pinned memory has such columns; eidetic 0: all chunks read all columns."""
    b, (h, g), w = len(start), heads, window
    rng = np.random.default_rng(sum(start) + t + p)
    scale = p**-0.5
    position = np.array(start)[:, None] + np.arange(t)
    ordinal = position // chunk - position[:, :1] // chunk

    def array(*shape: int) -> np.ndarray:
        return rounded(rng.standard_normal(shape), dtype)

    read: list[list[list[Memory]]] = [[[] for _ in range(t)] for _ in start]
    bands: list[Band] = []
    for near, far in [(0, w)] + [(w, w + fading)] * (fading > 0):
        carried = min(far, max(start))
        q, k, v = array(b, h, t, p), array(b, g, carried + t, p), array(b, g, carried + t, p)
        for row in range(b):
            column = start[row] - carried + np.arange(carried + t)
            k[row][:, column < 0] = v[row][:, column < 0] = 1e3  # never written
            for i, now in enumerate(position[row]):
                seen = (column >= 0) & (now - column >= near) & (now - column < far)
                read[row][i].append(Memory(q[row][:, i], k[row][:, seen], v[row][:, seen]))
        bands.append(Band(to_mlx(q, dtype), to_mlx(k, dtype), to_mlx(v, dtype), near, far))
    pinned, n = None, sinks + 4 * eidetic
    if n:
        q, k, v = array(b, h, t, p), array(b, g, n, p), array(b, g, n, p)
        held = np.full((b, n), -1)
        held[:, :sinks] = np.arange(sinks)
        for row, first in enumerate(start):
            old = np.sort(rng.permutation(min(first + t, 1000))[: max(n - sinks - 1, 0)])
            held[row, sinks : sinks + len(old)] = old
        index = np.full((b, ordinal.max() + 1, sinks + eidetic), -1)
        for row, lists in enumerate(index):
            for c, columns in enumerate(lists):
                chosen = np.sort(rng.permutation(n - sinks)[: max(eidetic - c % 3, 0)]) + sinks
                chosen = chosen[held[row][chosen] >= 0]
                columns[: sinks + len(chosen)] = [*range(sinks), *chosen]
        for row in range(b):
            for i, now in enumerate(position[row]):
                listed = np.isin(np.arange(n), index[row, ordinal[row, i]]) if eidetic else np.full(n, True)
                seen = listed & (held[row] >= 0) & (held[row] <= now - w)
                read[row][i].append(Memory(q[row][:, i], k[row][:, seen], v[row][:, seen]))
        lists = mx.array(index.astype(np.int32)) if eidetic else None
        q, k, v = (to_mlx(x, dtype) for x in (q, k, v))
        pinned = Pinned(q, k, v, mx.array(held), lists, w)
    want = np.stack([np.stack([attend(memories, scale) for memories in row], axis=1) for row in read])

    def call() -> Sequence[mx.array]:
        at = Queries(tuple(start), mx.array(position), mx.array(ordinal), {})
        return [memory_attention(bands, pinned, at, scale)]

    bodies = ("memory_attention", "memory_attention_header")
    name = f"prefill {dtype} {t} from {start}, {heads} heads of {p}, {w} + {fading} + {sinks} + {eidetic} by {chunk}"
    return Case(name, bodies, call, [want], [BOUNDS[dtype]])


def prefill_cases() -> list[Case]:
    return [
        *(prefill(dtype) for dtype in DTYPES),
        *(prefill(dtype, (70, 0), 67, (4, 2), 20, 33, 40, 1, 6, 16) for dtype in DTYPES),
        prefill(start=(1,), t=1, heads=(1, 1), p=2, window=1, fading=1, sinks=1, eidetic=1, chunk=1),
        prefill(start=(2,), t=1, heads=(1, 1), p=2, window=1, fading=1, sinks=2, eidetic=0, chunk=1),
        prefill(start=(0,), t=3, heads=(1, 1), p=3, window=1, fading=0, sinks=1, eidetic=0, chunk=1),
        prefill(start=(0, 5, 40), t=33, heads=(3, 3), p=5, window=4, fading=0, sinks=0, eidetic=40, chunk=64),
        prefill(start=(0,), t=8, window=7, fading=0, sinks=1, eidetic=0),  # only the last token sees the sink
        prefill(start=(40,), t=64, heads=(1, 1), p=8, window=40, fading=0, sinks=3, eidetic=0),
        prefill(start=(2**33 + 5,), t=9, p=8, window=5, fading=3, sinks=1, eidetic=0),
        prefill(start=(30, 31), t=21, p=72, window=6, fading=30, sinks=0, eidetic=0),
        prefill("bfloat16", start=(17,), t=12, heads=(2, 1), p=130, window=9, fading=6, sinks=1, eidetic=9, chunk=5),
    ]


def cases() -> list[Case]:
    return [*step_cases(), *prefill_cases()]
