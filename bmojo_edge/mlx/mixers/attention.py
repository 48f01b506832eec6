"""Softmax attention over everything, or over the last attention_window tokens (docs/model.md section 5)."""

from __future__ import annotations

import mlx.core as mx

from bmojo_edge.config import Config
from bmojo_edge.mlx.layers import Projections, linear, merge_heads
from bmojo_edge.mlx.layout import Layout, Step, put
from bmojo_edge.mlx.memory import band, slots_seen
from bmojo_edge.mlx.ops import memory_attention, memory_attention_step, rotate
from bmojo_edge.rope import softmax_scale
from bmojo_edge.state import AttentionState, capacity


class Attention(Projections):
    """Grouped-query attention with a ring of `attention_window` slots, or with a cache that grows."""

    def __init__(self, config: Config, layer: int, dtype: mx.Dtype) -> None:
        super().__init__(config, dtype)
        self.config, self.reach = config, config.attention_window_of(layer)
        self.o_proj = linear(config.n_heads * config.d_head, config.d_model, False, dtype)

    def __call__(self, u: mx.array, state: AttentionState, layout: Layout) -> tuple[mx.array, AttentionState]:
        """u (b, t, d) after `state`: (b, t, d), and the state."""
        x = self.project(u)
        seen = band(state, rotate(x.q, layout.rotary), rotate(x.k, layout.rotary), x.v, layout, 0, self.reach)
        o = memory_attention([seen], None, layout.queries, softmax_scale(self.config))
        if layout.watch is not None:
            layout.watch.append({"window": mx.ones(o.shape[:3])})
        slots = self.reach or max(capacity(int(layout.last_position.max()) + 1), state.k.shape[2])
        return self.o_proj(merge_heads(o)), AttentionState(layout.kept(seen.k, slots), layout.kept(seen.v, slots))

    def step(self, u: mx.array, state: AttentionState, step: Step) -> tuple[mx.array, AttentionState]:
        """One token: u (b, d). A growing cache must have room for it, see `grown`."""
        x = self.project(u)
        state = AttentionState(put(state.k, rotate(x.k, step.rotary), step), put(state.v, x.v, step))
        seen = slots_seen(rotate(x.q, step.rotary), *state, step)
        o = memory_attention_step([seen], step.position, softmax_scale(self.config))
        return self.o_proj(o.reshape(len(u), -1)), state


def grown(state: AttentionState, tokens: int) -> AttentionState:
    """A growing cache with room for `tokens` tokens."""
    extra = capacity(tokens) - state.k.shape[2]
    if extra <= 0:
        return state
    return AttentionState(*(mx.pad(x, [(0, 0), (0, 0), (0, extra), (0, 0)]) for x in state))
