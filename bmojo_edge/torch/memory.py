"""The memories of a bmojo layer: what attention reads, what a call or a token leaves in them (docs/model.md, 5 to 7).

Rings hold rotated keys, sinks and eidetic slots unrotated ones. Nothing here has parameters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bmojo_edge.config import Config
from bmojo_edge.rope import softmax_scale
from bmojo_edge.state import BMojoState, EideticState, FadingState, SinkState, WindowState
from bmojo_edge.torch.attribution import attention_shares
from bmojo_edge.torch.layout import Layout, Step, choose_rows, overwritten, put, slot_positions
from bmojo_edge.torch.ops import (
    Band,
    Candidates,
    Chunks,
    Grid,
    Pinned,
    Slots,
    find_eidetic,
    memory_attention,
    memory_attention_step,
    rotary,
    rotate,
    select_eidetic,
    wide,
)
from bmojo_edge.torch.recalled import recalled_columns, recalled_positions, recalled_slots


class Projected(NamedTuple):
    """Queries, keys and values of a bmojo layer, normalised per head but not rotated; t = 1 in decoding."""

    q: Tensor  # (b, h, t, p)
    k: Tensor  # (b, g, t, p)
    v: Tensor  # (b, g, t, p)
    q_fading: Tensor  # (b, h, t, p): q itself where the fading projections are tied
    k_fading: Tensor | None  # (b, g, t, p)
    v_fading: Tensor | None  # (b, g, t, p)


# --- a call of many tokens --------------------------------------------------------------------------------------------


def band(ring: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, near: int, far: int | None) -> Band:
    """The slots of a ring (its k and v as stored), in order of position, and the call's tokens as one band."""
    if layout.fresh:
        return Band(q, k, v, layout.position, layout.document, near, far)
    n = ring.k.shape[2]
    held = layout.start[:, None] + torch.arange(-n, 0, device=k.device)
    slots = (held % n)[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    document = None if layout.document is None else torch.cat([torch.zeros_like(held), layout.document], dim=1)
    k, v = (torch.cat([old.gather(2, slots), new], dim=2) for old, new in ((ring.k, k), (ring.v, v)))
    return Band(q, k, v, torch.cat([held, layout.position], dim=1), document, near, far)


class _Pool(NamedTuple):
    """All unrotated keys a call may pin: sinks, eidetic slots, the ring's leavers, recalled blocks, the call's own."""

    k: Tensor  # (b, g, n, p)
    v: Tensor  # (b, g, n, p)
    scores: Tensor | None  # (b, n)
    position: Tensor  # (b, n), -1 = nothing
    document: Tensor | None  # (b, n)
    own: int  # the column of the call's first token
    slots: int  # the column of the first eidetic slot


def _leavers(config: Config, window: WindowState, position: Tensor, at: Layout | Step) -> tuple[Tensor, Tensor, Tensor]:
    """Keys (unrotated), values and scores of tokens at `position` (b, n) that sit in the in-context ring."""
    slot = position % config.window
    index = slot[:, None, :, None].expand(-1, window.k.shape[1], -1, window.k.shape[3])
    k = window.k.gather(2, index)
    angles = None if at.turns is None else rotary(position + at.offset[:, None], at.turns, wide(k.dtype))
    return rotate(k, angles, inverse=True), window.v.gather(2, index), window.scores.gather(1, slot)


def _take(k: Tensor, v: Tensor, scores: Tensor, position: Tensor, index: Tensor) -> EideticState:
    """Eidetic slots filled with the columns index (b, e) of k and v (b, g, n, p), scores and position (b, n)."""
    empty, column = index < 0, index.clamp(min=0)
    rows = column[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    k, v = (x.gather(2, rows).masked_fill(empty[:, None, :, None], 0) for x in (k, v))
    return EideticState(
        k, v, scores.gather(1, column).masked_fill(empty, 0), position.gather(1, column).masked_fill(empty, -1)
    )


def _pool(config: Config, x: Projected, scores: Tensor | None, state: BMojoState, layout: Layout) -> _Pool:
    """Everything that sinks and eidetic sets of this call can name."""
    if layout.fresh:
        return _Pool(x.k, x.v, scores, layout.position, layout.document, 0, 0)
    (b, t), device = layout.position.shape, layout.position.device
    own = max(0, min(t, t - 1 + config.chunk_size - config.window))  # later tokens leave no window in this call
    ks, vs, positions = [], [], []
    marks = [torch.zeros(b, config.n_sinks, dtype=wide(x.k.dtype), device=device)]
    if config.n_sinks:
        ks, vs = [state.sinks.k], [state.sinks.v]
        sink = torch.arange(config.n_sinks, device=device).expand(b, -1)
        positions = [torch.where(sink < layout.start[:, None], sink, -1)]
    if config.n_eidetic:
        ks, vs = [*ks, state.eidetic.k], [*vs, state.eidetic.v]
        positions, marks = [*positions, state.eidetic.positions], [*marks, state.eidetic.scores]
        first = -(-layout.start // config.chunk_size) * config.chunk_size - config.window
        count = min(config.window, t - 1 + config.chunk_size)
        leaving = first[:, None] + torch.arange(count, device=device)
        k, v, mark = _leavers(config, state.window, leaving, layout)
        ks, vs, marks = [*ks, k], [*vs, v], [*marks, mark]
        positions = [*positions, torch.where(leaving < layout.start[:, None], leaving, -1)]
    if state.recalled:  # () without storage; never candidates, and seen by the first token already
        always = layout.recalled[0] if layout.recalled else recalled_positions(config, state.recalled)
        ks, vs, positions = [*ks, state.recalled.k], [*vs, state.recalled.v], [*positions, always]
        marks = marks if scores is None else [*marks, torch.zeros_like(always, dtype=scores.dtype)]
    carried = sum(p.shape[1] for p in positions)
    ks, vs = [*ks, x.k[:, :, :own]], [*vs, x.v[:, :, :own]]
    position = torch.cat([*positions, layout.position[:, :own]], dim=1)
    document = None
    if layout.document is not None:
        document = torch.cat([position.new_zeros(b, carried), layout.document[:, :own]], dim=1)
    all_scores = None if scores is None else torch.cat([*marks, scores[:, :own]], dim=1)
    return _Pool(torch.cat(ks, dim=2), torch.cat(vs, dim=2), all_scores, position, document, carried, config.n_sinks)


def _sink_columns(config: Config, pool: _Pool, chunks: Chunks, layout: Layout) -> Tensor:
    """Columns (b, c, s) of the sinks each chunk may see, -1 = none."""
    assert layout.origin is not None
    sink = torch.arange(config.n_sinks, device=pool.position.device)
    carried = sink < layout.start[:, None, None]
    if chunks.document is not None:
        carried = carried & (chunks.document == 0)[..., None]
    column = torch.where(carried, sink, pool.own + sink + layout.origin[..., None])
    return torch.where(sink < chunks.limit[..., None], column, -1)


def _eidetic_columns(config: Config, pool: _Pool, chunks: Chunks, layout: Layout, forced: Tensor | None) -> Tensor:
    """Columns (b, c, e) of each chunk's eidetic set, chosen or forced, -1 = none."""
    assert pool.scores is not None
    document = None if pool.document is None else pool.document[:, pool.slots :]
    candidates = Candidates(pool.scores[:, pool.slots :], pool.position[:, pool.slots :], document)
    if layout.fresh and layout.aligned:
        chunks = chunks._replace(grid=Grid(config.chunk_size, config.window))
    index = select_eidetic(candidates, chunks, config.n_sinks, config.n_eidetic)
    if forced is not None:
        # A chunk that began in an earlier call has its set already; rows with fewer chunks have none.
        first = torch.arange(index.shape[1], device=index.device) == 0
        begun = first & (layout.start % config.chunk_size != 0)[:, None]
        wanted = forced.masked_fill((begun | (chunks.limit <= 0))[..., None], -1)
        found = find_eidetic(candidates, chunks, config.n_sinks, wanted)
        index = torch.where(begun[..., None], index, found)
    return torch.where(index >= 0, index + pool.slots, -1)


def _kept(state: EideticState, pool: _Pool, index: Tensor, layout: Layout) -> EideticState:
    """The eidetic slots after the call: the set of each row's last chunk, index (b, c, e)."""
    assert layout.chunk is not None
    assert pool.scores is not None
    b, e = index.shape[0], index.shape[2]
    last = layout.chunk.gather(1, layout.last_column.clamp(min=0)[:, None])
    index = index.gather(1, last[..., None].expand(b, 1, e))[:, 0]
    idle = torch.where(state.positions >= 0, torch.arange(e, device=index.device) + pool.slots, -1)
    index = torch.where((layout.last_column < 0)[:, None], idle, index)
    return _take(pool.k, pool.v, pool.scores, pool.position, index)


def read_memories(
    config: Config, x: Projected, scores: Tensor | None, state: BMojoState, layout: Layout, forced: Tensor | None
) -> tuple[Tensor, BMojoState, Tensor | None]:
    """Attention of t tokens over all memories: (b, h, t, p), the state without history and ssm, and the sets.

    scores (b, t): innovations, None without eidetic memory; forced (b, c, e): sets to take, -1 = empty.
    The sets (b, c, e) are positions, -1 = empty.
    """
    w, f = config.window, config.fading
    q, k = rotate(x.q, layout.rotary), rotate(x.k, layout.rotary)
    bands = [band(state.window, q, k, x.v, layout, 0, w)]
    held = slot_positions(w, layout.last_position)
    rings = [overwritten(ring, new, held, layout) for ring, new in ((state.window.k, k), (state.window.v, x.v))]
    window = WindowState(rings[0], rings[1], ())
    if scores is not None:
        ring = overwritten(state.window.scores[:, None, :, None], scores[:, None, :, None], held, layout)
        window = WindowState(window.k, window.v, ring[:, 0, :, 0])
    fading, sinks, eidetic, pinned, sets = state.fading, state.sinks, state.eidetic, None, None
    if f and x.k_fading is not None and x.v_fading is not None:
        k_fading = rotate(x.k_fading, layout.rotary)
        q_fading = q if x.q_fading is x.q else rotate(x.q_fading, layout.rotary)
        bands.append(band(state.fading, q_fading, k_fading, x.v_fading, layout, w, w + f))
        held = slot_positions(w + f, layout.last_position)
        pairs = ((state.fading.k, k_fading), (state.fading.v, x.v_fading))
        fading = FadingState(*(overwritten(ring, new, held, layout) for ring, new in pairs))
    if config.n_sinks:
        slots = torch.arange(config.n_sinks, device=x.k.device)
        held = torch.where(slots <= layout.last_position[:, None], slots, -1)
        sinks = SinkState(*(overwritten(s, new, held, layout) for s, new in ((sinks.k, x.k), (sinks.v, x.v))))
    if config.n_sinks or scores is not None or state.recalled:
        assert layout.chunks is not None
        pool, columns = _pool(config, x, scores, state, layout), []
        if config.n_sinks:
            columns.append(_sink_columns(config, pool, layout.chunks, layout))
        if scores is not None:
            chosen = _eidetic_columns(config, pool, layout.chunks, layout, forced)
            eidetic, columns = _kept(state.eidetic, pool, chosen, layout), [*columns, chosen]
            sets = pool.position.gather(1, chosen.clamp(min=0).flatten(1)).view_as(chosen)
            sets = sets.masked_fill(chosen < 0, -1)
        if state.recalled:
            first = pool.own - state.recalled.positions.shape[1]
            shared = layout.recalled[1] if layout.recalled else None
            columns.append(recalled_columns(state.recalled, sets, layout.chunks, first) if shared is None else shared)
        t = layout.position.shape[1]
        if not layout.fresh or t - 1 + config.chunk_size > w:  # else nothing has left a window
            q = rotate(x.q, layout.pinned)
            pinned = Pinned(q, pool.k, pool.v, pool.position, torch.cat(columns, dim=2), w, pool.own)
    o = memory_attention(bands, pinned, layout.queries(config.chunk_size), softmax_scale(config))
    if layout.watch is not None:
        layout.watch.append(_shares(config, bands, pinned, state, layout))
    rest = state.history, state.ssm, state.recalled, state.queries  # _replace fails under torch 2.11's compiler
    return o, BMojoState(window, fading, sinks, eidetic, *rest), sets


def _shares(
    config: Config, bands: list[Band], pinned: Pinned | None, state: BMojoState, layout: Layout
) -> dict[str, Tensor]:
    """How attention divided among the bands, sinks, eidetic slots and recalled blocks."""
    names, owner = ["window", "fading"][: len(bands)], None
    if pinned is not None:
        owner = torch.where(pinned.position < config.n_sinks, 0, 1)
        if state.recalled:
            owner[:, pinned.own - state.recalled.positions.shape[1] : pinned.own] = 2
        owner += len(names)
    at, scale = layout.queries(config.chunk_size), softmax_scale(config)
    return attention_shares([*names, "sinks", "eidetic", "storage"], bands, pinned, owner, at, scale)


# --- one token --------------------------------------------------------------------------------------------------------


def promote(config: Config, state: BMojoState, step: Step) -> EideticState:
    """Before a row's token at a multiple of `chunk` is written, the tokens about to leave its window compete."""
    assert step.promotes is not None
    old: EideticState = state.eidetic
    leaving = (step.position - config.window)[:, None] + torch.arange(config.chunk_size, device=step.position.device)
    k, v, scores = _leavers(config, state.window, leaving, step)
    k, v = torch.cat([old.k, k], dim=2), torch.cat([old.v, v], dim=2)
    position, scores = torch.cat([old.positions, leaving], dim=1), torch.cat([old.scores, scores], dim=1)
    limit = (step.position - config.window + config.chunk_size)[:, None]
    index = select_eidetic(Candidates(scores, position, None), Chunks(limit, None), config.n_sinks, config.n_eidetic)
    new = _take(k, v, scores, position, index[:, 0])
    return choose_rows(step.promotes, new, old)


def step_memories(
    config: Config, x: Projected, score: Tensor | None, state: BMojoState, step: Step
) -> tuple[Tensor, BMojoState]:
    """One token against all memories: (b, h, 1, p), and the state without history and ssm; score (b,)."""
    w, f, i = config.window, config.fading, step.position
    eidetic = state.eidetic if step.promotes is None or score is None else promote(config, state, step)
    slot = i % w
    window = WindowState(
        put(state.window.k, slot, rotate(x.k, step.rotary), step.active),
        put(state.window.v, slot, x.v, step.active),
        (),
    )
    if score is not None:
        scores = put(state.window.scores[:, None, :, None], slot, score[:, None, None, None], step.active)
        window = WindowState(window.k, window.v, scores[:, 0, :, 0])
    read = [Slots(rotate(x.q, step.rotary), window.k, window.v, slot_positions(w, i) >= 0)]
    fading, sinks, leaving = state.fading, state.sinks, (i - w)[:, None]
    if f and x.k_fading is not None and x.v_fading is not None:
        slot = i % (w + f)
        k = put(state.fading.k, slot, rotate(x.k_fading, step.rotary), step.active)
        fading, held = FadingState(k, put(state.fading.v, slot, x.v_fading, step.active)), slot_positions(w + f, i)
        read.append(Slots(rotate(x.q_fading, step.rotary), *fading, (held >= 0) & (held <= leaving)))
    if config.n_sinks or score is not None or state.recalled:
        q, pinned = rotate(x.q, step.pinned), []
        if config.n_sinks:
            slots = torch.arange(config.n_sinks, device=i.device)
            first = i < config.n_sinks if step.active is None else step.active & (i < config.n_sinks)
            slot = i.clamp(max=config.n_sinks - 1)
            sinks = SinkState(put(sinks.k, slot, x.k, first), put(sinks.v, slot, x.v, first))
            pinned.append(Slots(q, *sinks, slots <= leaving))
        if score is not None:
            seen = (eidetic.positions >= 0) & (eidetic.positions <= leaving)
            pinned.append(Slots(q, eidetic.k, eidetic.v, seen))
        if state.recalled:
            kept = None if score is None else eidetic.positions
            pinned.append(recalled_slots(q, state.recalled, kept))
        read.append(_side_by_side(pinned))
    o = memory_attention_step(read, softmax_scale(config))
    return o, state._replace(window=window, fading=fading, sinks=sinks, eidetic=eidetic)


def _side_by_side(pinned: list[Slots]) -> Slots:
    """Memories read by one query as one: three copies in place of products each."""
    if len(pinned) == 1:
        return pinned[0]
    k, v = torch.cat([m.k for m in pinned], dim=2), torch.cat([m.v for m in pinned], dim=2)
    return Slots(pinned[0].q, k, v, torch.cat([m.visible for m in pinned], dim=1))
