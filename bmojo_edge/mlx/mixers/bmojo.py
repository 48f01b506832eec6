"""The B'MOJO mixer: one softmax over in-context, fading and eidetic memory (docs/model.md section 3)."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from bmojo_edge.config import Config
from bmojo_edge.mlx.layers import Projections, linear, linear_wide, merge_heads
from bmojo_edge.mlx.layout import Layout, Step
from bmojo_edge.mlx.memory import Projected, read_memories, step_memories
from bmojo_edge.mlx.mixers.ssm import ssm_mixer
from bmojo_edge.mlx.ops import innovation_scores, innovation_step
from bmojo_edge.mlx.recalled import last_queries, next_queries
from bmojo_edge.state import BMojoState


class Remembered(NamedTuple):
    """What a bmojo layer found surprising in a call: innovations and sets."""

    scores: mx.array  # (b, t)
    sets: mx.array  # (b, c, e) positions, -1 = empty


class BMojo(Projections):
    """Attention over all memories; `fading` holds projections of its own where keys and values are not tied."""

    def __init__(self, config: Config, layer: int, dtype: mx.Dtype) -> None:
        super().__init__(config, dtype)
        self.config, ssm = config, config.ssm_of(layer)
        self.kind, self.remembers = dtype, config.n_eidetic > 0
        self.reads_ssm = self.remembers and ssm is not None and config.signal_of(layer) == "ssm_output"
        self.reads_input = self.remembers and not self.reads_ssm
        self.o_proj = linear(config.n_heads * config.d_head, config.d_model, False, dtype)
        if ssm is not None:
            if not config.tie_kv:
                self.fading = Projections(config, dtype)
            self.ssm = ssm_mixer(config, ssm, dtype)

    def _project(self, u: mx.array, y: mx.array | None) -> Projected:
        """Step 3 for u and y (b, t, d), or (b, d) in decoding."""
        x = self.project(u)
        if y is None:
            return Projected(*x, x.q, None, None)
        if "fading" not in self:
            return Projected(*x, x.q, *self.keys_values(y))
        return Projected(*x, self.fading.queries(u), *self.fading.keys_values(y))

    def _mixed(self, mix: Any, signal: mx.array, u: mx.array, *rest: Any) -> tuple[tuple[mx.array, mx.array], Any]:
        """What the SSM's `mix` makes of u, and the signal that innovation looks at; the SSM's state."""
        if not self.reads_ssm:
            y, ssm = mix(u, *rest)
            return (y, signal), ssm
        (wide, y), ssm = mix(u, *rest, project=linear_wide)
        return (y, wide), ssm

    def _scores(self, signal: mx.array, past: mx.array, lengths: mx.array | None) -> tuple[mx.array, mx.array]:
        rule = self.config.innovation
        return innovation_scores(signal, past, rule.coefficients(), rule.error, lengths)

    def __call__(
        self, u: mx.array, state: BMojoState, layout: Layout, forced: mx.array | None = None
    ) -> tuple[mx.array, BMojoState, Remembered | None]:
        """u (b, t, d), in float32 where the input is the signal, after `state`: (b, t, d), the state, what was kept.

        forced (b, c, e) are the eidetic sets to take in place of the chosen ones.
        """
        signal, u = u, u.astype(self.kind)
        y, ssm, scores, history = None, (), None, ()
        if "ssm" in self:
            (y, signal), ssm = self._mixed(self.ssm, signal, u, state.ssm, layout)
        if self.remembers:
            scores, history = self._scores(signal, state.history, layout.lengths)
        x, queries = self._project(u, y), state.queries
        if not isinstance(queries, tuple):  # () without storage
            queries = last_queries(queries, x.q, layout)
        o, state, sets = read_memories(self.config, x, scores, state, layout, forced)
        remembered = None if scores is None or sets is None else Remembered(scores, sets)
        return self.o_proj(merge_heads(o)), state._replace(history=history, ssm=ssm, queries=queries), remembered

    def step(self, u: mx.array, state: BMojoState, step: Step) -> tuple[mx.array, BMojoState]:
        """One token: u (b, d)."""
        signal, u = u, u.astype(self.kind)
        y, ssm, scores, history = None, (), None, ()
        if "ssm" in self:
            (y, signal), ssm = self._mixed(self.ssm.step, signal, u, state.ssm, step)
        if self.remembers:
            rule, ring = self.config.innovation, state.window.scores
            scores, history = innovation_step(
                signal, state.history, ring, step.position, rule.coefficients(), rule.error, step.active
            )
        x, queries = self._project(u, y), state.queries
        if not isinstance(queries, tuple):
            queries = next_queries(queries, x.q, step)
        o, state = step_memories(self.config, x, scores, state, step)
        return self.o_proj(o.reshape(len(u), -1)), state._replace(history=history, ssm=ssm, queries=queries)
