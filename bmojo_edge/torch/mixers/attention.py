"""Softmax attention over everything, or over the last attention_window tokens (docs/model.md section 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmojo_edge.config import Config
from bmojo_edge.rope import softmax_scale
from bmojo_edge.state import AttentionState, capacity
from bmojo_edge.torch.layers import Projections, merge_heads
from bmojo_edge.torch.layout import Layout, Step, overwritten, put, slot_positions
from bmojo_edge.torch.memory import band
from bmojo_edge.torch.ops import Slots, memory_attention, memory_attention_step, rotate


class Attention(Projections):
    """Grouped-query attention with a ring of `attention_window` slots, or with a cache that grows."""

    def __init__(self, config: Config, layer: int, dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        self.config, self.reach = config, config.attention_window_of(layer)
        self.o_proj = nn.Linear(config.n_heads * config.d_head, config.d_model, bias=False, dtype=dtype)

    def _resized(self, state: AttentionState, at: Layout | Step) -> AttentionState:
        """A growing cache with room for the tokens there will be; a ring as it is."""
        if self.reach is not None:
            return state
        held = state.k.shape[2]
        size = max(capacity(at.tokens), held if at.idle else 0)
        return state if size == held else AttentionState(*(F.pad(x, (0, 0, 0, size - held)) for x in state))

    def forward(self, u: Tensor, state: AttentionState, layout: Layout) -> tuple[Tensor, AttentionState]:
        """u (b, t, d) after `state`: (b, t, d), and the state."""
        x = self.project(u.to(self.o_proj.weight.dtype))
        q, k, scale = rotate(x.q, layout.rotary), rotate(x.k, layout.rotary), softmax_scale(self.config)
        unlimited = self.reach is None or self.reach >= u.shape[1]
        if layout.fresh and layout.document is None and unlimited:
            o = F.scaled_dot_product_attention(q, k, x.v, is_causal=True, scale=scale, enable_gqa=True)
        else:
            seen = band(state, q, k, x.v, layout, 0, self.reach)
            o = memory_attention([seen], None, layout.queries(self.config.chunk_size), scale)
        if layout.watch is not None:
            layout.watch.append({"window": torch.ones(o.shape[:3], device=o.device)})
        state = self._resized(state, layout)
        held = slot_positions(state.k.shape[2], layout.last_position)
        state = AttentionState(*(overwritten(s, new, held, layout) for s, new in ((state.k, k), (state.v, x.v))))
        return self.o_proj(merge_heads(o)), state

    def step(self, u: Tensor, state: AttentionState, step: Step) -> tuple[Tensor, AttentionState]:
        """One token: u (b, d)."""
        x = self.project(u[:, None].to(self.o_proj.weight.dtype))
        state = self._resized(state, step)
        n = state.k.shape[2]
        pairs = ((state.k, rotate(x.k, step.rotary)), (state.v, x.v))
        state = AttentionState(*(put(slots, step.position % n, new, step.active) for slots, new in pairs))
        visible = slot_positions(n, step.position) >= 0
        seen = Slots(rotate(x.q, step.rotary), *state, visible)
        o = memory_attention_step([seen], softmax_scale(self.config))
        return self.o_proj(merge_heads(o))[:, 0], state
