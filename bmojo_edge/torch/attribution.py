"""How much of the tokens' attention each memory got, for those who look into a model; no answer computes it.

Nothing here knows a layer or a config.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bmojo_edge.torch.ops import Band, Pinned, Queries, memory_attention, wide


def attention_shares(
    names: Sequence[str], bands: list[Band], pinned: Pinned | None, owner: Tensor | None, at: Queries, scale: float
) -> dict[str, Tensor]:
    """The share of each memory in the one softmax of `memory_attention`: (b, h, t) each, together 1.

    names: of the bands, then of the pinned memories; owner (b, n): whose each pinned column is, by place in `names`.
    Attention mixes values, so values that say whose they are come out as the shares.
    """
    p, shares = bands[0].q.shape[-1], []
    for first in range(0, len(names), p):  # a value has room for p names
        marked = [_marked(band, torch.full_like(band.position, i - first)) for i, band in enumerate(bands)]
        pins = None if pinned is None or owner is None else _marked(pinned, owner - first)
        mixed = memory_attention(marked, pins, at, scale)
        shares += [mixed[..., i] for i in range(min(p, len(names) - first))]
    return dict(zip(names, shares, strict=True))


def _marked(memory: Any, owner: Tensor) -> Any:
    """A memory in `wide` precision, whose values are 1 at the number of their owner (b, n)."""
    q, k = memory.q.to(wide(memory.q.dtype)), memory.k.to(wide(memory.k.dtype))
    marks = (owner[..., None] == torch.arange(k.shape[-1], device=k.device)).to(k.dtype)
    return memory._replace(q=q, k=k, v=marks[:, None].expand(k.shape))
