"""Gated DeltaNet: a layer by itself, or in a bmojo layer. Equations and parameters: docs/mixers.md."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from bmojo_edge.config import SSM, Config
from bmojo_edge.mlx.layers import Project, apply, linear
from bmojo_edge.mlx.layout import Layout, Step, choose_rows
from bmojo_edge.mlx.mixers.heads import HeadMixer
from bmojo_edge.mlx.recurrences import delta_rule, delta_rule_step
from bmojo_edge.state import GDNState


class GDN(HeadMixer):
    """A decayed matrix from keys to values, corrected by what it gets wrong (arXiv 2412.06464)."""

    def __init__(self, config: Config, ssm: SSM, dtype: mx.Dtype) -> None:
        super().__init__(config, ssm, dtype, "qkv" if ssm.use_short_conv else "")
        self.b_proj = linear(config.d_model, self.size.heads, False, dtype)
        self.gk_proj = linear(config.d_model, self.size.heads, False, dtype)

    def _unit(self, x: mx.array) -> mx.array:
        """x (..., p) of length 1."""
        return x * mx.rsqrt(x.square().sum(-1, keepdims=True) + 1e-6)

    def _gates(self, u: mx.array) -> tuple[mx.array, mx.array]:
        """Log decay and beta (..., h) of u (..., d)."""
        beta = mx.sigmoid(self.b_proj(u).astype(mx.float32))
        return self._log_decay(self.gk_proj(u)), beta * 2 if self.options.allow_neg_eigval else beta

    def __call__(self, u: mx.array, state: GDNState, layout: Layout, project: Project = apply) -> tuple[Any, GDNState]:
        """u (b, t, d) after `state`: y (b, t, d), as `project` leaves it, and the state."""
        (q, k, v), conv = self._project(u, state.conv, layout)
        g, beta = self._gates(u)
        if layout.real is not None:  # padding leaves the state as it is
            g, beta = (mx.where(layout.real[..., None], x, 0.0) for x in (g, beta))
        q = self._unit(q) * self.size.head_dim**-0.5
        o, ssm = delta_rule(q, self._unit(k), v, g, beta, state.ssm)
        return self._out(o, u, project), GDNState(conv, ssm)

    def step(self, u: mx.array, state: GDNState, step: Step, project: Project = apply) -> tuple[Any, GDNState]:
        """One token: u (b, d)."""
        (q, k, v), conv = self._project_step(u, state.conv)
        g, beta = self._gates(u)
        q = self._unit(q) * self.size.head_dim**-0.5
        o, ssm = delta_rule_step(q, self._unit(k), v, g, beta, state.ssm)
        new = GDNState(conv, ssm)
        return self._out(o, u, project), new if step.active is None else choose_rows(step.active, new, state)
