"""The memories of a B'MOJO layer in the oracle: positions, innovation, eidetic choice, one softmax over them all.

Two readers of the same memories: `read_streaming` holds bounded state and moves token by token, `read_parallel` is the
definition over a whole sequence. Steps and sections are those of docs/model.md. One sequence at a time, no batch axis:
t tokens, h query heads, g key/value heads, p head_dim, w window, f n_fading, e n_eidetic, s n_sinks, n slots.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bmojo_edge.config import Config, Innovation
from bmojo_edge.rope import softmax_scale, turns_per_token
from bmojo_edge.state import BMojoState, EideticState

Array = np.ndarray


class Projected(NamedTuple):
    """Queries, keys and values of a bmojo or attention layer (step 3), normalised per head but not rotated."""

    q: Array  # (t, h, p)
    k: Array  # (t, g, p)
    v: Array  # (t, g, p)
    q_fading: Array  # (t, h, p): q itself where the fading projections are tied
    k_fading: Array | None  # (t, g, p)
    v_fading: Array | None  # (t, g, p)


# --- positions (step 4) ---------------------------------------------------------------------------------------------


def rotate(x: Array, positions: Array, turns: Array | None, inverse: bool = False) -> Array:
    """Rotate the pairs (j, j + p/2) of x (t, heads, p) by positions (t,) int64; `turns` None leaves x as it is."""
    if turns is None:
        return x
    with np.errstate(over="ignore"):
        phase = (positions.astype(np.uint64)[:, None] * turns).astype(np.int64)  # (t, p/2), 2^-64 turns, wrapped
    angle = phase.astype(np.float64) * (2 * np.pi / 2.0**64)
    cos = np.cos(angle)[:, None].astype(x.dtype)
    sin = np.sin(angle)[:, None].astype(x.dtype) * (-1 if inverse else 1)
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


# --- innovation and the eidetic choice (steps 5 and 6) --------------------------------------------------------------


def innovations(signal: Array, history: Array, rule: Innovation) -> Array:
    """eps (t,) of a signal (t, d) whose previous `taps` values are history (taps, d), oldest first."""
    past = np.concatenate([history, signal])
    taps = len(history)
    predicted = sum(c * past[taps - j : len(past) - j] for j, c in enumerate(rule.coefficients(), start=1))
    error = ((signal - predicted) ** 2).sum(-1)
    return error if rule.error == "l2" else error / ((signal**2).sum(-1) + 1e-6)


def top_positions(scores: Array, positions: Array, e: int) -> Array:
    """Indices of the e largest scores, ties to the earlier position, in order of position."""
    best = np.lexsort((positions, -scores))[:e]
    return best[np.argsort(positions[best])]


def _padded(positions: Array, e: int) -> Array:
    return np.concatenate([positions, np.full(e - len(positions), -1)]).astype(np.int64)


# --- one softmax over every memory (step 7) -------------------------------------------------------------------------


def attend(queries: list[Array], keys: list[Array], values: list[Array], scale: float) -> Array:
    """One query token (h, p) per memory against that memory's keys (n, g, p), ONE softmax over all of them: (h, p)."""
    h, g = queries[0].shape[0], keys[0].shape[1]
    kv_head = np.arange(h) // (h // g)
    scores = [np.einsum("hp,nhp->hn", q, k[:, kv_head]) * scale for q, k in zip(queries, keys, strict=True)]
    weights = np.exp(np.concatenate(scores, -1) - max(s.max(initial=-np.inf) for s in scores))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hn,nhp->hp", weights, np.concatenate(values)[:, kv_head])


def slot_positions(n: int, last: int) -> Array:
    """Position held by each slot of a ring of n after position `last` was written; negative = not yet written."""
    return last - (last - np.arange(n)) % n


class _Streaming:
    """The bounded memories of one bmojo layer, moved one token at a time (section 6)."""

    def __init__(self, config: Config, state: BMojoState, offset: int, turns: Array | None) -> None:
        self.c, self.offset, self.turns, self.scale = config, offset, turns, softmax_scale(config)
        self.window, self.fading, self.sinks, self.eidetic = state[:4]
        self.recalled = state.recalled

    def promote(self, i: int, forced: Array | None, x: Projected, innovation: Array, start: int) -> None:
        """Before token i = cC is written, the C tokens about to leave the window compete for the eidetic slots."""
        w, s = self.c.window, self.c.n_sinks
        old, new = self.eidetic.positions >= 0, np.arange(max(i - w, s), max(i - w + self.c.chunk_size, s))
        k_new = rotate(rows(self.window.k, new % w), new + self.offset, self.turns, inverse=True)
        positions = np.concatenate([self.eidetic.positions[old], new])
        scores = np.concatenate([self.eidetic.scores[old], self.window.scores[new % w]])
        k = np.concatenate([rows(self.eidetic.k, old), k_new])
        v = np.concatenate([rows(self.eidetic.v, old), rows(self.window.v, new % w)])
        if forced is None:
            keep = top_positions(scores, positions, self.c.n_eidetic)
        else:  # any other earlier token of this call will do as well
            others = np.setdiff1d(np.arange(max(start, s), max(i - w, start, s)), positions)
            positions, scores = np.append(positions, others), np.append(scores, innovation[others - start])
            k, v = np.concatenate([k, x.k[others - start]]), np.concatenate([v, x.v[others - start]])
            keep = _find(positions, forced)
        slots = EideticState(*(np.zeros_like(leaf) for leaf in self.eidetic))
        slots.positions[:] = -1
        n = len(keep)
        slots.k[:, :n], slots.v[:, :n] = np.moveaxis(k[keep], 0, 1), np.moveaxis(v[keep], 0, 1)
        slots.scores[:n], slots.positions[:n] = scores[keep], positions[keep]
        self.eidetic = slots

    def write(self, i: int, x: Projected, t: int, score: float | None) -> None:
        """Token i, the t-th of this call, enters the rings and, if it is one of the first, the sinks."""
        c, at = self.c, np.array([i + self.offset])
        self.window.k[:, i % c.window] = rotate(x.k[t : t + 1], at, self.turns)[0]
        self.window.v[:, i % c.window] = x.v[t]
        if score is not None:
            self.window.scores[i % c.window] = score
        if c.fading and x.k_fading is not None and x.v_fading is not None:
            slot = i % (c.window + c.fading)
            self.fading.k[:, slot] = rotate(x.k_fading[t : t + 1], at, self.turns)[0]
            self.fading.v[:, slot] = x.v_fading[t]
        if i < c.n_sinks:
            self.sinks.k[:, i], self.sinks.v[:, i] = x.k[t], x.v[t]

    def read(self, i: int, x: Projected, t: int) -> Array:
        """Query i against every memory: (h, p). Slots are always there; positions decide which are visible."""
        c, w = self.c, self.c.window
        at = np.array([i + self.offset])
        q, q_fading = (rotate(y[t : t + 1], at, self.turns)[0] for y in (x.q, x.q_fading))
        q_pinned = rotate(x.q[t : t + 1], np.array([w]), self.turns)[0]
        held = slot_positions(w, i)
        reads: list[tuple[Array, Any, Array]] = [(q, self.window, held >= 0)]
        if self.fading:  # () in a layer without an SSM
            held = slot_positions(w + c.fading, i)
            reads.append((q_fading, self.fading, (held >= 0) & (held <= i - w)))
        if c.n_sinks:
            reads.append((q_pinned, self.sinks, np.arange(c.n_sinks) <= i - w))
        if c.n_eidetic:
            held = self.eidetic.positions
            reads.append((q_pinned, self.eidetic, (held >= 0) & (held <= i - w)))
        if self.recalled:  # () without storage; a token that is also kept as eidetic is read there
            held = self.recalled.positions
            kept = self.eidetic.positions if c.n_eidetic else np.array([-1])
            reads.append((q_pinned, self.recalled, (held != -1) & ~np.isin(held, kept[kept >= 0])))
        queries, memories, visible = zip(*reads, strict=True)
        keys, values = ([rows(m[j], seen) for m, seen in zip(memories, visible, strict=True)] for j in (0, 1))
        return attend(list(queries), keys, values, self.scale)


def rows(ring: Array, index: Array) -> Array:
    """Slots of a ring (g, n, p) as rows (n', g, p)."""
    return np.moveaxis(ring[:, index], 0, 1)


def _find(positions: Array, wanted: Array) -> Array:
    """Indices of forced positions; one that is no longer kept anywhere is an error."""
    wanted = np.sort(wanted[wanted >= 0])
    missing = np.setdiff1d(wanted, positions)
    if len(missing):
        raise ValueError(f"eidetic_index: position {missing[0]} is not one this chunk can keep")
    return np.array([int(np.flatnonzero(positions == j)[0]) for j in wanted], dtype=np.int64)


def chunks_of(start: int, t: int, chunk: int) -> Array:
    """Ordinal within the call of each token's chunk, (t,), for positions start .. start + t - 1."""
    return (start + np.arange(t)) // chunk - start // chunk


def read_streaming(
    config: Config, x: Projected, scores: Array | None, state: BMojoState, at: tuple[int, int], forced: Array | None
) -> tuple[Array, BMojoState, Array | None]:
    (start, offset), t = at, len(x.q)
    memory = _Streaming(config, state, offset, turns_per_token(config))
    chunk_of, sets, out = chunks_of(start, t, config.chunk_size), [], []
    for n in range(t):
        i = start + n
        if scores is not None and i % config.chunk_size == 0:
            memory.promote(i, None if forced is None else forced[chunk_of[n]], x, scores, start)
        if scores is not None and (n == 0 or i % config.chunk_size == 0):
            sets.append(memory.eidetic.positions)
        memory.write(i, x, n, None if scores is None else scores[n])
        out.append(memory.read(i, x, n))
    state = state._replace(window=memory.window, fading=memory.fading, sinks=memory.sinks, eidetic=memory.eidetic)
    return np.stack(out), state, np.stack(sets) if sets else None


def read_parallel(
    config: Config, x: Projected, scores: Array | None, offset: int, forced: Array | None
) -> tuple[Array, Array | None]:
    """Steps 6 and 7 as written: sets by sorting everything eligible, visibility by comparing positions."""
    c, w, turns = config, config.window, turns_per_token(config)
    position = np.arange(len(x.q))
    q, k, q_fading = (rotate(y, position + offset, turns) for y in (x.q, x.k, x.q_fading))
    q_pinned = rotate(x.q, np.full_like(position, w), turns)
    k_fading = None if x.k_fading is None else rotate(x.k_fading, position + offset, turns)
    sets = []
    for c_index in range(-(-len(position) // c.chunk_size) if c.n_eidetic else 0):
        eligible = position[(position >= c.n_sinks) & (position < (c_index + 1) * c.chunk_size - w)]
        if forced is not None:
            best = _find(eligible, forced[c_index])
        else:
            assert scores is not None
            best = top_positions(scores[eligible], eligible, c.n_eidetic)
        sets.append(_padded(eligible[best], c.n_eidetic))
    out = []
    for i in position:
        context = (position > i - w) & (position <= i)
        queries, keys, values = [q[i]], [k[context]], [x.v[context]]
        if c.fading and k_fading is not None and x.v_fading is not None:
            faded = (position > i - w - c.fading) & (position <= i - w)
            queries, keys, values = [*queries, q_fading[i]], [*keys, k_fading[faded]], [*values, x.v_fading[faded]]
        kept = (position < c.n_sinks) | np.isin(position, sets[i // c.chunk_size] if sets else [])
        kept &= position <= i - w
        queries, keys, values = [*queries, q_pinned[i]], [*keys, x.k[kept]], [*values, x.v[kept]]
        out.append(attend(queries, keys, values, softmax_scale(config)))
    return np.stack(out), np.stack(sets) if sets else None
