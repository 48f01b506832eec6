"""How much of a token's attention each memory got, for those who look into a model; decoding does not compute it.

Nothing here knows a layer or a config.
"""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx

from bmojo_edge.mlx.ops import Slots


def attention_shares(memories: Mapping[str, Slots], position: mx.array, scale: float) -> dict[str, mx.array]:
    """The share of each memory in the one softmax of `memory_attention_step`: (b, h) float32 each, together 1."""
    sums = {}
    for name, m in memories.items():
        (b, h, _, p), g = m.q.shape, m.k.shape[1]
        now, n = position[:, None], m.k.shape[2]
        held = now - (now - mx.arange(n)) % n if m.held is None else m.held
        visible = (held >= 0) & (held <= now - m.near)
        products = (m.q * scale).reshape(b, g, h // g, p) @ m.k.swapaxes(-1, -2)
        scores = mx.where(visible[:, None, None], products.astype(mx.float32), -mx.inf)
        sums[name] = mx.logsumexp(scores, axis=-1).reshape(b, h)
    shares = mx.softmax(mx.stack(list(sums.values()), axis=-1), axis=-1)
    return {name: shares[..., i] for i, name in enumerate(sums)}
