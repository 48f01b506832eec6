"""Blocks read back from storage as one more memory of a bmojo layer, and what goes to storage (docs/storage.md).

Recalled keys are unrotated and pinned at the distance `window`, as sinks and eidetic slots are. Nothing here knows
where blocks are kept or how they were chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bmojo_edge.config import Config
from bmojo_edge.rope import turns_per_token
from bmojo_edge.state import RecalledState, WindowState
from bmojo_edge.torch.layout import Layout, Step, choose_rows, last_values
from bmojo_edge.torch.ops import Chunks, Pinned, Slots, rotary, rotate, wide


def seen_recalled(positions: Tensor, kept: Tensor | None) -> Tensor:
    """Which recalled tokens (b, n) are read: (b, ..., n). One that is also among `kept` (b, ..., e) is read there."""
    full = positions != -1
    if kept is None:
        return full
    spread = positions.view(positions.shape[0], *(1,) * (kept.dim() - 2), positions.shape[1])
    twice = ((spread[..., None] == kept[..., None, :]) & (spread >= 0)[..., None]).any(-1)
    return full.view(spread.shape) & ~twice


def with_recalled(
    config: Config, pinned: Pinned | None, q: Tensor, recalled: RecalledState, sets: Tensor | None, chunks: Chunks
) -> Pinned:
    """The pinned memory of a call with recalled blocks in it, which every chunk of the carried document reads.

    q (b, h, t, p): pinned queries; sets (b, c, e): eidetic positions of each chunk, None without eidetic memory.
    """
    b, n = recalled.positions.shape
    first = 0 if pinned is None else pinned.k.shape[2]
    seen = seen_recalled(recalled.positions, sets)
    seen = seen if sets is not None else seen[:, None].expand(-1, chunks.limit.shape[1], -1)
    if chunks.document is not None:
        seen = seen & (chunks.document == 0)[..., None]
    columns = torch.where(seen, first + torch.arange(n, device=q.device), -1)
    always = torch.full((b, n), -config.window, device=q.device)  # seen by the first token already
    if pinned is None:
        return Pinned(q, recalled.k, recalled.v, always, columns, near=config.window)
    return pinned._replace(
        k=torch.cat([pinned.k, recalled.k], dim=2),
        v=torch.cat([pinned.v, recalled.v], dim=2),
        position=torch.cat([pinned.position, always], dim=1),
        columns=torch.cat([pinned.columns, columns], dim=2),
    )


def recalled_slots(q: Tensor, recalled: RecalledState, kept: Tensor | None) -> Slots:
    """Recalled blocks as a memory of one decoding step; q (b, h, 1, p): pinned queries, kept (b, e): as above."""
    return Slots(q, recalled.k, recalled.v, seen_recalled(recalled.positions, kept))


def last_queries(queries: Tensor, q: Tensor, layout: Layout) -> Tensor:
    """The last queries (b, n, h p) once those of a call, (b, h, t, p), are among them."""
    return last_values(queries, q.detach().transpose(1, 2).flatten(2), layout)


def next_queries(queries: Tensor, q: Tensor, step: Step) -> Tensor:
    """The last queries (b, n, h p) once those of a token, (b, h, 1, p), are among them."""
    new = torch.cat([queries, q.transpose(1, 2).flatten(2).to(queries.dtype)], dim=1)[:, 1:]
    return new if step.active is None else choose_rows(step.active, new, queries)


def window_tokens(config: Config, window: WindowState, position: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Keys, unrotated, and values (b, g, n, p) of the tokens at `position` (b, n), which the window still holds."""
    index = (position % config.window)[:, None, :, None].expand(-1, window.k.shape[1], -1, window.k.shape[3])
    k, v, turns = window.k.gather(2, index), window.v.gather(2, index), turns_per_token(config)
    if turns is None:
        return k, v
    turns = torch.from_numpy(turns.view("int64")).to(k.device)
    return rotate(k, rotary(position + offset[:, None], turns, wide(k.dtype)), inverse=True), v
