"""Gated KalmaNet: a layer by itself, or in a bmojo layer. Equations and parameters: docs/mixers.md."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

from bmojo_edge.config import SSM, Config
from bmojo_edge.mlx.layers import Project, apply, linear
from bmojo_edge.mlx.layout import Layout, Step, choose_rows
from bmojo_edge.mlx.mixers.heads import QKV, HeadMixer
from bmojo_edge.mlx.recurrences import (
    linear_attention,
    linear_attention_step,
    ridge_queries,
    ridge_queries_step,
)
from bmojo_edge.state import GKAState

EPS = 1e-6  # added to the lengths of q and k, and to beta


class Gates(NamedTuple):
    """What scales the memories, (b, t, h) each or (b, h) for one token."""

    g_H: mx.array  # log decay of H
    g_U: mx.array  # log decay of U
    alpha: mx.array | None  # share of the solution in the query; None: all of it


class GKA(HeadMixer):
    """Values read through the ridge regression over every key so far, which decay alike (arXiv 2511.21016)."""

    def __init__(self, config: Config, ssm: SSM, dtype: mx.Dtype) -> None:
        super().__init__(config, ssm, dtype, "qkv" if ssm.use_v_conv else "qk", decays=ssm.use_forgetting_gate)
        d, h = config.d_model, self.size.heads
        if ssm.use_forgetting_gate:
            self.a_proj = linear(d, h, False, dtype)
        if ssm.use_beta_gate:
            self.b_proj = linear(d, h, True, dtype)
        if ssm.use_alpha_connection:
            self.alpha_proj = linear(d, h, True, dtype)

    def _scaled(self, x: QKV, u: mx.array) -> QKV:
        """q and k of length 1, k and v scaled by beta."""
        q, k = (y / (mx.sqrt(y.square().sum(-1, keepdims=True)) + EPS) for y in (x.q, x.k))
        if not self.options.use_beta_gate:
            return QKV(q, k, x.v)
        beta = mx.sigmoid(self.b_proj(u).astype(mx.float32))[..., None] + EPS
        return QKV(q, beta * k, beta * x.v)

    def _gates(self, u: mx.array) -> Gates:
        still = mx.zeros((*u.shape[:-1], self.size.heads))
        g_U = self._log_decay(self.a_proj(u)) if self.options.use_forgetting_gate else still
        blended = self.options.use_alpha_connection
        alpha = mx.sigmoid(self.alpha_proj(u).astype(mx.float32)) if blended else None
        return Gates(g_U if self.options.use_forgetting_gate_kk else still, g_U, alpha)

    def _blend(self, q: mx.array, x: mx.array, gates: Gates) -> mx.array:
        """q + alpha (x - q), scaled for the output."""
        if self.options.num_iter:
            q = x if gates.alpha is None else q + gates.alpha[..., None] * (x - q)
        return q * self.size.head_dim**-0.5 if self.options.gla_rescale else q

    def __call__(self, u: mx.array, state: GKAState, layout: Layout, project: Project = apply) -> tuple[Any, GKAState]:
        """u (b, t, d) after `state`: y (b, t, d), as `project` leaves it, and the state."""
        x, conv = self._project(u, state.conv, layout)
        (q, k, v), gates = self._scaled(x, u), self._gates(u)
        if layout.real is not None:  # padding leaves the state as it is
            real = layout.real[..., None]
            k, v = (mx.where(real[..., None], y, 0.0) for y in (k, v))
            gates = gates._replace(g_H=mx.where(real, gates.g_H, 0.0), g_U=mx.where(real, gates.g_U, 0.0))
        ridge, steps = self.options.ridge_strength, self.options.num_iter
        solved, H = ridge_queries(q, k, gates.g_H, state.H, ridge, steps)
        o, U = linear_attention(self._blend(q, solved, gates), k, v, gates.g_U, state.U)
        return self._out(o, u, project), GKAState(conv, H, U)

    def step(self, u: mx.array, state: GKAState, step: Step, project: Project = apply) -> tuple[Any, GKAState]:
        """One token: u (b, d)."""
        x, conv = self._project_step(u, state.conv)
        (q, k, v), gates = self._scaled(x, u), self._gates(u)
        solved, H = ridge_queries_step(q, k, gates.g_H, state.H, self.options.ridge_strength, self.options.num_iter)
        o, U = linear_attention_step(self._blend(q, solved, gates), k, v, gates.g_U, state.U)
        new = GKAState(conv, H, U)
        return self._out(o, u, project), new if step.active is None else choose_rows(step.active, new, state)
