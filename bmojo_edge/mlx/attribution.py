"""How much of the tokens' attention each memory got, for those who look into a model; no answer computes it.

Nothing here knows a layer or a config.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from bmojo_edge.mlx.ops import Band, Pinned, Queries, memory_attention


def attention_shares(
    names: Sequence[str], bands: Sequence[Band], pinned: Pinned | None, owner: mx.array, at: Queries, scale: float
) -> dict[str, mx.array]:
    """The share of each memory in the one softmax of `memory_attention`: (b, h, t) float32 each, together 1.

    names: of the bands, then of the pinned memories; owner (n,): whose each pinned column is, by place in `names`.
    Attention mixes values, so values that say whose they are come out as the shares.
    """
    p, shares = bands[0].q.shape[-1], []
    for first in range(0, len(names), p):  # a value has room for p names
        marked = [_marked(band, mx.full(band.k.shape[2], i - first)) for i, band in enumerate(bands)]
        mixed = memory_attention(marked, None if pinned is None else _marked(pinned, owner - first), at, scale)
        shares += [mixed[..., i] for i in range(min(p, len(names) - first))]
    return dict(zip(names, shares, strict=True))


def _marked(memory: Any, owner: mx.array) -> Any:
    """A memory in float32, whose values are 1 at the number of their owner (n,)."""
    q, k = memory.q.astype(mx.float32), memory.k.astype(mx.float32)
    marks = (owner[:, None] == mx.arange(k.shape[-1])).astype(mx.float32)
    return memory._replace(q=q, k=k, v=mx.broadcast_to(marks, k.shape))
