"""The B'MOJO mixer: one softmax over in-context, fading and eidetic memory (docs/model.md section 3)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bmojo_edge.config import Config
from bmojo_edge.state import BMojoState
from bmojo_edge.torch.layers import Projections, merge_heads
from bmojo_edge.torch.layout import Layout, Step, choose_rows, last_values
from bmojo_edge.torch.memory import Projected, read_memories, step_memories
from bmojo_edge.torch.mixers.ssm import ssm_mixer
from bmojo_edge.torch.ops import innovation_scores
from bmojo_edge.torch.recalled import last_queries, next_queries


class Remembered(NamedTuple):
    """What a bmojo layer found surprising in a call: innovations and sets."""

    scores: Tensor  # (b, t)
    sets: Tensor  # (b, c, e) positions, -1 = empty


class BMojo(Projections):
    """Attention over all memories; `fading` holds projections of its own where keys and values are not tied."""

    def __init__(self, config: Config, layer: int, dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        self.config, ssm = config, config.ssm_of(layer)
        self.reads_ssm = ssm is not None and config.signal_of(layer) == "ssm_output"
        self.o_proj = nn.Linear(config.n_heads * config.d_head, config.d_model, bias=False, dtype=dtype)
        self.fading = None if ssm is None or config.tie_kv else Projections(config, dtype)
        self.ssm = None if ssm is None else ssm_mixer(config, ssm, dtype)

    def _project(self, u: Tensor, y: Tensor | None) -> Projected:
        """Step 3 for u and y (b, t, d)."""
        u = u.to(self.o_proj.weight.dtype)
        x = self.project(u)
        if y is None:
            return Projected(*x, x.q, None, None)
        y = y.to(u.dtype)
        if self.fading is None:
            return Projected(*x, x.q, *self.keys_values(y))
        return Projected(*x, self.fading.queries(u), *self.fading.keys_values(y))

    def _scores(self, signal: Tensor, past: Tensor | None, lookback: Tensor | None = None) -> Tensor:
        rule = self.config.innovation
        return innovation_scores(signal, past, rule.coefficients(), rule.error, lookback)

    def forward(
        self, u: Tensor, state: BMojoState, layout: Layout, forced: Tensor | None = None
    ) -> tuple[Tensor, BMojoState, Remembered | None]:
        """u (b, t, d), in `wide` precision, after `state`: (b, t, d), the state, and what was remembered.

        forced (b, c, e) are the eidetic sets to take in place of the chosen ones.
        """
        y, ssm = (None, ()) if self.ssm is None else self.ssm(u, state.ssm, layout)
        scores, history = None, ()
        if self.config.n_eidetic:
            signal = y if y is not None and self.reads_ssm else u
            scores = self._scores(signal, None if layout.fresh else state.history, layout.lookback)
            history = last_values(state.history, signal.detach(), layout)
        x, queries = self._project(u, y), state.queries
        if not isinstance(queries, tuple):  # () without storage
            queries = last_queries(queries, x.q, layout)
        o, state, sets = read_memories(self.config, x, scores, state, layout, forced)
        remembered = None if scores is None or sets is None else Remembered(scores, sets)
        # Not _replace: torch 2.11's compiler cannot return what it makes.
        state = BMojoState(*state[:4], history, ssm, state.recalled, queries)
        return self.o_proj(merge_heads(o)), state, remembered

    def step(self, u: Tensor, state: BMojoState, step: Step) -> tuple[Tensor, BMojoState]:
        """One token: u (b, d)."""
        y, ssm = (None, ()) if self.ssm is None else self.ssm.step(u, state.ssm, step)
        score, history = None, ()
        if self.config.n_eidetic:
            signal = (y if y is not None and self.reads_ssm else u)[:, None]
            score = self._scores(signal, state.history)[:, 0]
            history = torch.cat([state.history, signal], dim=1)[:, 1:]
            history = history if step.active is None else choose_rows(step.active, history, state.history)
        x, queries = self._project(u[:, None], None if y is None else y[:, None]), state.queries
        if not isinstance(queries, tuple):
            queries = next_queries(queries, x.q, step)
        o, state = step_memories(self.config, x, score, state, step)
        return self.o_proj(merge_heads(o))[:, 0], state._replace(history=history, ssm=ssm, queries=queries)
