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
    p, kind, shares = bands[0].q.shape[-1], wide(bands[0].q.dtype), []
    for first in range(0, len(names), p):  # a value has room for p names

        def marked(memory: Any, owner: Tensor, first: int = first) -> Any:
            q, k = memory.q.to(kind), memory.k.to(kind)
            marks = (owner[..., None] - first == torch.arange(p, device=k.device)).to(kind)  # (b, n, p)
            return memory._replace(q=q, k=k, v=marks[:, None].expand(k.shape))

        marked_bands = [marked(band, torch.full_like(band.position, i)) for i, band in enumerate(bands)]
        pins = None if pinned is None or owner is None else marked(pinned, owner)
        mixed = memory_attention(marked_bands, pins, at, scale)
        shares += [mixed[..., i] for i in range(min(p, len(names) - first))]
    return dict(zip(names, shares, strict=True))
