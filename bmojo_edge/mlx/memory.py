"""The memories of a bmojo layer: what attention reads, what a call or a token leaves in them (docs/model.md, 5 to 7).

Rings hold rotated keys, sinks and eidetic slots unrotated ones. Nothing here has parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from bmojo_edge.config import Config
from bmojo_edge.mlx import ops
from bmojo_edge.mlx.attribution import attention_shares
from bmojo_edge.mlx.layout import Layout, Step, pinned_rotary, put, turns_of
from bmojo_edge.mlx.ops import (
    Band,
    Candidates,
    Pinned,
    Slots,
    find_eidetic,
    memory_attention,
    memory_attention_step,
    rotary,
    rotate,
    rotate_token,
    select_eidetic,
)
from bmojo_edge.mlx.recalled import recalled_slots, with_recalled
from bmojo_edge.rope import softmax_scale
from bmojo_edge.state import BMojoState, EideticState, FadingState, SinkState, WindowState


class Projected(NamedTuple):
    """Queries, keys and values of a bmojo layer, normalised per head but not rotated; t = 1 in decoding."""

    q: mx.array  # (b, h, t, p)
    k: mx.array  # (b, g, t, p)
    v: mx.array  # (b, g, t, p)
    q_fading: mx.array  # (b, h, t, p): q itself where the fading projections are tied
    k_fading: mx.array | None  # (b, g, t, p)
    v_fading: mx.array | None  # (b, g, t, p)


# --- a call of many tokens --------------------------------------------------------------------------------------------


def band(ring: Any, q: mx.array, k: mx.array, v: mx.array, layout: Layout, near: int, far: int | None) -> Band:
    """The carried tokens of a ring (its k and v as stored) and the call's tokens as one band."""
    return Band(q, layout.joined(ring.k, k), layout.joined(ring.v, v), near, far)


class _Pool(NamedTuple):
    """All unrotated keys a call may pin: sinks, eidetic slots, the ring's leavers, the call's own tokens."""

    k: mx.array  # (b, g, n, p)
    v: mx.array  # (b, g, n, p)
    position: mx.array  # (b, n), -1 = nothing
    candidates: Candidates | None  # all but the sinks


def _sinks(config: Config, sinks: SinkState, x: Projected, layout: Layout) -> SinkState:
    """Sinks after the call. No token sees one before it is `window` tokens old, so the call reads these."""
    opened = layout.opened(config.n_sinks)
    if opened is None:
        return sinks
    column, chosen = (x[:, None, :, None] for x in opened)
    new = (
        mx.where(chosen, mx.take_along_axis(y, column, axis=2), old) for y, old in zip((x.k, x.v), sinks, strict=True)
    )
    return SinkState(*new)


def _pool(
    config: Config, x: Projected, window: Band, scores: mx.array | None, sinks: Any, state: BMojoState, layout: Layout
) -> _Pool:
    """Everything that sinks and eidetic sets of this call can name; scores (b, m + t) go with the window's columns."""
    b, s, e = len(x.k), config.n_sinks, config.n_eidetic
    ks, vs, positions = [], [], []
    if s:
        ks, vs, positions = [sinks.k], [sinks.v], [mx.broadcast_to(mx.arange(s, dtype=mx.int64), (b, s))]
    if not e or scores is None:
        return _Pool(ks[0], vs[0], positions[0], None)
    m = window.k.shape[2] - layout.t
    columns, position = layout.leavers(m, config.chunk_size, config.window)
    leaving = position.shape[1]
    carried, own = min(m, leaving), max(0, leaving - m)
    if carried:
        k = rotate(window.k[:, :, :carried], layout.rotary_at(columns[:, :carried]), inverse=True)
        ks, vs = [*ks, state.eidetic.k, k], [*vs, state.eidetic.v]
    else:
        ks, vs = [*ks, state.eidetic.k], [*vs, state.eidetic.v]
    ks, vs = [*ks, x.k[:, :, :own]], [*vs, window.v[:, :, :leaving]]
    found = [state.eidetic.positions, position]
    candidates = Candidates(
        mx.concatenate([state.eidetic.scores, scores[:, :leaving]], axis=1), mx.concatenate(found, axis=1)
    )
    return _Pool(
        mx.concatenate(ks, axis=2),
        mx.concatenate(vs, axis=2),
        mx.concatenate([*positions, candidates.position], axis=1),
        candidates,
    )


def _eidetic_index(config: Config, candidates: Candidates, layout: Layout, forced: mx.array | None) -> mx.array:
    """Columns (b, c, e) of each chunk's eidetic set, chosen or forced, -1 = none."""
    index = select_eidetic(candidates, layout.chunks, config.n_sinks, config.n_eidetic)
    if forced is None:
        return index
    # A chunk that began in an earlier call has its set already; rows with fewer chunks have none.
    begun = ((mx.arange(index.shape[1]) == 0) & layout.begun[:, None])[..., None]
    wanted = mx.where(begun | ~layout.used[..., None], -1, forced)
    return mx.where(begun, index, find_eidetic(candidates, layout.chunks, config.n_sinks, wanted))


def _take(k: mx.array, v: mx.array, candidates: Candidates, index: mx.array) -> EideticState:
    """Eidetic slots filled with the columns index (b, e) of k and v (b, g, n, p) and of the candidates."""
    full, column = index >= 0, mx.maximum(index, 0)
    k, v = (
        mx.where(full[:, None, :, None], mx.take_along_axis(y, column[:, None, :, None], axis=2), mx.array(0, y.dtype))
        for y in (k, v)
    )
    scores, positions = (mx.take_along_axis(y, column, axis=1) for y in candidates)
    return EideticState(k, v, mx.where(full, scores, 0.0), mx.where(full, positions, -1))


def read_memories(
    config: Config, x: Projected, scores: mx.array | None, state: BMojoState, layout: Layout, forced: mx.array | None
) -> tuple[mx.array, BMojoState, mx.array | None]:
    """Attention of t tokens over all memories: (b, h, t, p), the state without history and ssm, and the sets.

    scores (b, t): innovations, None without eidetic memory; forced (b, c, e): sets to take, -1 = empty.
    The sets (b, c, e) are positions, -1 = empty.
    """
    w, f, s = config.window, config.fading, config.n_sinks
    at = layout.rotary
    context = band(state.window, rotate(x.q, at), rotate(x.k, at), x.v, layout, 0, w)
    bands, window = [context], WindowState(layout.kept(context.k, w), layout.kept(context.v, w), ())
    all_scores = None
    if scores is not None:
        all_scores = layout.joined(state.window.scores, scores, axis=1)
        window = window._replace(scores=layout.kept(all_scores, w, axis=1))
    fading, sinks, eidetic, pinned, sets = state.fading, state.sinks, state.eidetic, None, None
    if f and x.k_fading is not None and x.v_fading is not None:
        faded = band(state.fading, rotate(x.q_fading, at), rotate(x.k_fading, at), x.v_fading, layout, w, w + f)
        bands.append(faded)
        fading = FadingState(layout.kept(faded.k, w + f), layout.kept(faded.v, w + f))
    if s:
        sinks = _sinks(config, state.sinks, x, layout)
    if s or scores is not None:
        pool, index = _pool(config, x, context, all_scores, sinks, state, layout), None
        if pool.candidates is not None:
            chosen = _eidetic_index(config, pool.candidates, layout, forced)
            last = mx.take_along_axis(chosen, layout.last_chunk[:, None, None], axis=1)[:, 0]
            eidetic = _take(pool.k[:, :, s:], pool.v[:, :, s:], pool.candidates, last)
            columns = mx.maximum(chosen, 0).reshape(chosen.shape[0], -1)
            positions = mx.take_along_axis(pool.candidates.position, columns, axis=1).reshape(chosen.shape)
            sets = mx.where((chosen >= 0) & layout.used[..., None], positions, -1)
            index = mx.where(chosen >= 0, chosen + s, -1)
            if s:
                every = mx.broadcast_to(mx.arange(s, dtype=index.dtype), (*index.shape[:2], s))
                index = mx.concatenate([every, index], axis=-1)
        pinned = Pinned(rotate(x.q, pinned_rotary(config)), pool.k, pool.v, pool.position, index, near=w)
    columns = 0 if pinned is None else pinned.k.shape[2]
    if state.recalled:  # () without storage
        q = rotate(x.q, pinned_rotary(config)) if pinned is None else pinned.q
        pinned = with_recalled(config, pinned, q, state.recalled, sets)
    if layout.watch is not None:
        stored = 0 if pinned is None else pinned.k.shape[2] - columns
        pins = {"sinks": s, "eidetic": columns - s, "storage": stored}
        layout.watch.append(_shares(config, bands, pinned, pins, layout))
    o = memory_attention(bands, pinned, layout.queries, softmax_scale(config))
    return o, state._replace(window=window, fading=fading, sinks=sinks, eidetic=eidetic), sets


def _shares(
    config: Config, bands: list[Band], pinned: Pinned | None, pins: dict[str, int], layout: Layout
) -> dict[str, mx.array]:
    """How attention divided; pins: how many columns of the pinned memory each name has, in order."""
    names = ["window", "fading"][: len(bands)]
    owner = np.repeat(np.arange(len(names), len(names) + len(pins)), list(pins.values()))
    at, scale = layout.queries, softmax_scale(config)
    return attention_shares([*names, *pins], bands, pinned, mx.array(owner), at, scale)


# --- one token --------------------------------------------------------------------------------------------------------


def promote(config: Config, state: BMojoState, position: mx.array, offset: mx.array, rows: mx.array) -> EideticState:
    """Before the token at `position` (b,), a multiple of `chunk` in `rows` (b,), the tokens about to leave compete."""
    turns, angles = turns_of(config), None
    if turns is not None:
        leaving = (position - config.window)[:, None] + mx.arange(config.chunk_size, dtype=mx.int64)  # (b, chunk)
        at = rotary(leaving + offset[:, None], turns)
        angles = (at.cos[:, 0, :, 0], at.sin[:, 0, :, 1])
    ring, old = ops.Ring(*state.window), ops.Eidetic(*state.eidetic)
    return EideticState(*ops.promote(ring, old, position, rows, config.chunk_size, config.n_sinks, angles))


def step_memories(
    config: Config, x: Projected, scores: mx.array | None, state: BMojoState, step: Step
) -> tuple[mx.array, BMojoState]:
    """One token against all memories: (b, h, 1, p), and the state without history and ssm.

    scores (b, w): the ring of scores with the token's in it, None without eidetic memory.
    """
    w, s = config.window, config.n_sinks
    fading, sinks, eidetic = state.fading, state.sinks, state.eidetic
    if scores is not None and step.promotes is not None:  # before the token takes the place of one that leaves
        eidetic = promote(config, state, step.position, step.offset, step.promotes)
    turned = _rotated(config, x, step)
    k, v = put(state.window.k, turned.k, step), put(state.window.v, x.v, step)
    window = WindowState(k, v, () if scores is None else scores)
    if turned.k_fading is not None and x.v_fading is not None:
        fading = FadingState(put(state.fading.k, turned.k_fading, step), put(state.fading.v, x.v_fading, step))
    if s and step.opening:
        sinks = _opened(sinks, x, step)
    memories = [slots_seen(turned.q, window.k, window.v, step)]
    if step.aged and fading:  # () in a layer without an SSM
        memories.append(slots_seen(turned.q_fading, fading.k, fading.v, step, near=w))
    if step.aged and (s or scores is not None):
        q = turned.q_pinned
        if s:
            memories.append(Slots(q, sinks.k, sinks.v, w, step.sinks_held(s), step.sinks_mask(s)))
        if scores is not None:
            memories.append(Slots(q, eidetic.k, eidetic.v, w, eidetic.positions))
    if state.recalled:
        q, kept = rotate(x.q, pinned_rotary(config)), None if scores is None else eidetic.positions
        memories.append(recalled_slots(q, state.recalled, kept))
    o = memory_attention_step(memories, step.position, softmax_scale(config))
    return o, state._replace(window=window, fading=fading, sinks=sinks, eidetic=eidetic)


class _Rotated(NamedTuple):
    """A token's queries and keys at its position, and its queries as they meet unrotated keys."""

    q: mx.array  # (b, h, 1, p)
    k: mx.array  # (b, g, 1, p)
    q_pinned: mx.array  # (b, h, 1, p), q itself where nothing is pinned yet
    q_fading: mx.array  # (b, h, 1, p)
    k_fading: mx.array | None  # (b, g, 1, p), None without fading memory


def _rotated(config: Config, x: Projected, step: Step) -> _Rotated:
    at, pinned = step.rotary, pinned_rotary(config)
    k_fading = x.k_fading if config.fading else None
    if at is None or pinned is None:
        return _Rotated(x.q, x.k, x.q, x.q_fading, k_fading)
    wanted = {"q": (x.q, at), "k": (x.k, at)}
    if step.aged and (config.n_sinks or config.n_eidetic):
        wanted["q_pinned"] = x.q, pinned
    if k_fading is not None:
        wanted["k_fading"] = k_fading, at
        if step.aged and x.q_fading is not x.q:
            wanted["q_fading"] = x.q_fading, at
    turned = dict(zip(wanted, rotate_token(*zip(*wanted.values(), strict=True)), strict=True))
    return _Rotated(**{"q_pinned": x.q, "q_fading": turned["q"], "k_fading": None, **turned})


def slots_seen(q: mx.array, k: mx.array, v: mx.array, step: Step, near: int = 0) -> Slots:
    """The slots of a ring that may hold something."""
    return Slots(q, k, v, near, mask=step.mask(k.shape[2], near))


def _opened(sinks: SinkState, x: Projected, step: Step) -> SinkState:
    """Sinks with the token among them where it is one of the first."""
    here = mx.arange(sinks.k.shape[2]) == step.position[:, None]
    here = (here if step.active is None else here & step.active[:, None])[:, None, :, None]
    return SinkState(mx.where(here, x.k, sinks.k), mx.where(here, x.v, sinks.v))
