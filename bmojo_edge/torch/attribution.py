"""How much of a token's attention each memory got, for those who look into a model; decoding does not compute it.

Nothing here knows a layer or a config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from bmojo_edge.torch.ops import Slots, wide


def attention_shares(memories: Mapping[str, Slots], scale: float) -> dict[str, Tensor]:
    """The share of each memory in the one softmax of `memory_attention_step`: (b, h) each, together 1."""
    sums = {}
    for name, m in memories.items():
        (b, h, _, p), g = m.q.shape, m.k.shape[1]
        products = (m.q.reshape(b, g, h // g, p) @ m.k.transpose(-1, -2)).to(wide(m.q.dtype)) * scale
        scores = products.masked_fill(~m.visible[:, None, None], -math.inf)
        sums[name] = scores.logsumexp(dim=-1).view(b, h)
    shares = torch.stack(list(sums.values()), dim=-1).softmax(dim=-1)
    return {name: shares[..., i] for i, name in enumerate(sums)}
