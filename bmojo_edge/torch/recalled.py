"""Blocks read back from storage as one more memory of a bmojo layer, and what goes to storage (docs/storage.md).

Recalled keys are unrotated and pinned at the distance `window`, as sinks and eidetic slots are. Nothing here knows
where blocks are kept or how they were chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from bmojo_edge.config import Config
from bmojo_edge.rope import turns_per_token
from bmojo_edge.state import BMojoState, RecalledState, State, WindowState
from bmojo_edge.storage_blocks import Shape
from bmojo_edge.torch.layout import Layout, Step, choose_rows, last_values
from bmojo_edge.torch.ops import Chunks, Slots, rotary, rotate, wide

AT_ONCE = 2**26  # values that are made into blocks at one time, a layer's at least: a bound on memory


def seen_recalled(positions: Tensor, kept: Tensor | None) -> Tensor:
    """Which recalled tokens (b, n) are read: (b, ..., n). One that is also among `kept` (b, ..., e) is read there."""
    full = positions != -1
    if kept is None:
        return full
    spread = positions.view(positions.shape[0], *(1,) * (kept.dim() - 2), positions.shape[1])
    twice = ((spread[..., None] == kept[..., None, :]) & (spread >= 0)[..., None]).any(-1)
    return full.view(spread.shape) & ~twice


def recalled_columns(recalled: RecalledState, sets: Tensor | None, chunks: Chunks, first: int) -> Tensor:
    """Columns (b, c, n) of recalled blocks that each chunk of the carried document reads, -1 = none.

    sets (b, c, e): eidetic positions of each chunk, None without eidetic memory; first: the column of the first.
    """
    seen = seen_recalled(recalled.positions, sets)
    seen = seen if sets is not None else seen[:, None].expand(-1, chunks.limit.shape[1], -1)
    if chunks.document is not None:
        seen = seen & (chunks.document == 0)[..., None]
    columns = torch.arange(first, first + recalled.positions.shape[1], device=seen.device)
    return torch.where(seen, columns, -1)


def recalled_positions(config: Config, recalled: RecalledState) -> Tensor:
    """Where recalled tokens (b, n) stand for a call: the first token sees them already."""
    return torch.full_like(recalled.positions, -config.window)


def shared(config: Config, state: State, chunks: Chunks) -> tuple[Tensor, Tensor] | None:
    """`recalled_positions` and `recalled_columns` where all layers have the same: one array, no eidetic memory."""
    found = [layer.recalled for layer in state.layers if isinstance(layer, BMojoState) and layer.recalled]
    if config.n_eidetic or not found or any(other.positions is not found[0].positions for other in found):
        return None
    recalled: RecalledState = found[0]
    return recalled_positions(config, recalled), recalled_columns(recalled, None, chunks, config.n_sinks)


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


# --- blocks as a store keeps them -------------------------------------------------------------------------------------


def _unrotated(
    config: Config, windows: Sequence[WindowState], begin: int, count: int, offset: Tensor
) -> tuple[Tensor, Tensor]:
    """`window_tokens` of rows that all stand at one position, of some layers: (b, layers, g, count, p) both."""
    w, turns = config.window, turns_per_token(config)
    first = begin % w
    spans = [(first, min(count, w - first)), (0, count - min(count, w - first))]

    def joined(name: str) -> Tensor:
        rings = torch.stack([getattr(x, name) for x in windows], dim=1)  # all of them: one operation, not one a layer
        parts = [rings.narrow(3, *span) for span in spans if span[1]]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=3)

    k, v = joined("k"), joined("v")
    if turns is not None:
        position = torch.arange(begin, begin + count, device=k.device) + offset[:, None]
        at = rotary(position, torch.from_numpy(turns.view("int64")).to(k.device), wide(k.dtype))
        k = rotate(k.flatten(1, 2), at, inverse=True).view(k.shape)
    return k, v


def _filled(x: Tensor, block: int, skip: int) -> Tensor:
    """x (..., t, p) in float32 and whole blocks: the first `skip` as the token after them, the last one repeated."""
    t = x.shape[-2]
    x = x.float()
    if skip:
        x = torch.cat([x[..., skip : skip + 1, :].expand(*x.shape[:-2], skip, -1), x[..., skip:, :]], dim=-2)
    if t % block:
        x = torch.cat([x, x[..., -1:, :].expand(*x.shape[:-2], -t % block, -1)], dim=-2)
    return x


def packed_window(
    config: Config, windows: Sequence[WindowState], router: WindowState, begin: int, count: int, offset: Tensor,
    shape: Shape,
) -> Tensor:  # fmt: skip
    """`storage_blocks.packed` of the tokens at positions begin .. begin + count - 1, which the windows still hold.

    windows: of the shape's layers; offset (b,). The same bytes as NumPy's, computed where the windows are.
    """
    s, b, skip = shape, len(offset), min(max(config.n_sinks - begin, 0), count - 1)
    n, layers, device = -(-count // s.block), len(windows), offset.device
    keys = _filled(_unrotated(config, [router], begin, count, offset)[0][:, 0], s.block, skip)
    pairs = keys.view(b, s.kv_heads, n, s.summaries, s.pool, s.head_dim).unbind(4)
    summaries = (reduce(torch.add, pairs) * (1 / s.pool)).permute(0, 2, 3, 1, 4).half()
    size = (b, n, layers, 2, s.kv_heads, s.block)
    scales = torch.empty(size, dtype=torch.float16, device=device)
    values = torch.empty(*size, s.head_dim, dtype=torch.int8, device=device)
    most = torch.full((), 127.0, device=device)  # a number would be divided by as a product with its inverse
    together = max(1, AT_ONCE // (values.numel() // layers))
    for i in range(0, layers, together):
        kv = torch.stack(_unrotated(config, windows[i : i + together], begin, count, offset), dim=2)
        kv = _filled(kv, s.block, skip).unflatten(-2, (n, s.block)).permute(0, 4, 1, 2, 3, 5, 6)
        scale = (kv.abs().amax(-1) / most).half()
        wider = scale.float()
        inverse = torch.where(wider > 0, 1 / wider, 0)
        scales[:, :, i : i + together] = scale
        values[:, :, i : i + together] = (kv * inverse[..., None]).round_().clamp_(-127, 127)
    payloads = [x.view(b * n, -1).view(torch.uint8) for x in (scales, values)]
    return torch.cat([torch.cat(payloads, dim=1).view(-1), summaries.reshape(-1).view(torch.uint8)])


def unpacked_blocks(payloads: Tensor, shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    """`storage_blocks.unpacked` of payloads (b, n, payload_bytes): keys, values (b, g, n * block, p) of each layer."""
    s, (b, n, _) = shape, payloads.shape
    size = (b, n, len(s.layers), 2, s.kv_heads, s.block)
    scales = payloads[..., : s.scales_bytes].contiguous().view(torch.float16).view(size)
    values = payloads[..., s.scales_bytes :].contiguous().view(torch.int8).view(*size, s.head_dim)
    found = (values.float() * scales.float()[..., None]).half().to(dtype)
    return list(found.permute(2, 3, 0, 4, 1, 5, 6).flatten(4, 5).flatten(0, 1).unbind())


def scores_of_blocks(queries: Tensor, summaries: Tensor) -> Tensor:
    """`storage_index.block_scores`: (h, q, n) of queries (h, q, p) and summaries (n, m, g, p)."""
    (h, q, p), (n, m, g, _) = queries.shape, summaries.shape
    keys = summaries.float().permute(2, 0, 1, 3).reshape(g, n * m, p)
    scores = keys @ queries.reshape(g, h // g * q, p).transpose(1, 2)
    return scores.view(g, n, m, -1).amax(2).view(g, n, h // g, q).permute(0, 2, 3, 1).reshape(h, q, n)
