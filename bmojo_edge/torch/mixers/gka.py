"""Gated KalmaNet: a layer by itself, or in a bmojo layer. Equations and parameters: docs/mixers.md."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from bmojo_edge.config import SSM, Config
from bmojo_edge.state import GKAState
from bmojo_edge.torch.layout import Layout, Step, choose_rows
from bmojo_edge.torch.mixers.heads import QKV, HeadMixer
from bmojo_edge.torch.ops import wide
from bmojo_edge.torch.recurrences import (
    linear_attention,
    linear_attention_step,
    ridge_queries,
    ridge_queries_step,
)

EPS = 1e-6  # added to the lengths of q and k, and to beta


class Gates(NamedTuple):
    """What scales the memories, (b, t, h) each or (b, h) for one token."""

    g_H: Tensor  # log decay of H
    g_U: Tensor  # log decay of U
    alpha: Tensor | None  # share of the solution in the query; None: all of it


class GKA(HeadMixer):
    """Values read through the ridge regression over every key so far, which decay alike (arXiv 2511.21016)."""

    def __init__(self, config: Config, ssm: SSM, dtype: torch.dtype) -> None:
        super().__init__(config, ssm, dtype, "qkv" if ssm.use_v_conv else "qk", decays=ssm.use_forgetting_gate)
        d, h = config.d_model, self.size.heads
        self.a_proj = nn.Linear(d, h, bias=False, dtype=dtype) if ssm.use_forgetting_gate else None
        self.b_proj = nn.Linear(d, h, bias=True, dtype=dtype) if ssm.use_beta_gate else None
        self.alpha_proj = nn.Linear(d, h, bias=True, dtype=dtype) if ssm.use_alpha_connection else None

    def _scaled(self, x: QKV, u: Tensor) -> QKV:
        """q and k of length 1, k and v scaled by beta."""
        q, k = (y / (torch.linalg.vector_norm(y, dim=-1, keepdim=True) + EPS) for y in (x.q, x.k))
        if self.b_proj is None:
            return QKV(q, k, x.v)
        beta = self.b_proj(u).to(k.dtype).sigmoid()[..., None] + EPS
        return QKV(q, beta * k, beta * x.v)

    def _gates(self, u: Tensor) -> Gates:
        kind = wide(u.dtype)
        still = torch.zeros((*u.shape[:-1], self.size.heads), dtype=kind, device=u.device)
        g_U = still if self.a_proj is None else self._log_decay(self.a_proj(u))
        alpha = None if self.alpha_proj is None else self.alpha_proj(u).to(kind).sigmoid()
        return Gates(g_U if self.options.use_forgetting_gate_kk else still, g_U, alpha)

    def _blend(self, q: Tensor, x: Tensor, gates: Gates) -> Tensor:
        """q + alpha (x - q), scaled for the output."""
        if self.options.num_iter:
            q = x if gates.alpha is None else q + gates.alpha[..., None] * (x - q)
        return q * self.size.head_dim**-0.5 if self.options.gla_rescale else q

    def forward(self, u: Tensor, state: GKAState, layout: Layout) -> tuple[Tensor, GKAState]:
        """u (b, t, d) after `state`: y (b, t, d) in `wide` precision, and the state."""
        u = u.to(self.o_proj.weight.dtype)
        x, conv = self._project(u, state.conv, layout)
        (q, k, v), gates = self._scaled(x, u), self._gates(u)
        if layout.real is not None:  # padding leaves the state as it is
            real = layout.real[..., None]
            k, v = (torch.where(real[..., None], y, 0) for y in (k, v))
            gates = gates._replace(g_H=torch.where(real, gates.g_H, 0), g_U=torch.where(real, gates.g_U, 0))
        ridge, steps = self.options.ridge_strength, self.options.num_iter
        solved, H = ridge_queries(q, k, gates.g_H, state.H, ridge, steps, layout.reset)
        o, U = linear_attention(self._blend(q, solved, gates), k, v, gates.g_U, state.U, layout.reset)
        return self._out(o, u), GKAState(conv, H, U)

    def step(self, u: Tensor, state: GKAState, step: Step) -> tuple[Tensor, GKAState]:
        """One token: u (b, d)."""
        u = u.to(self.o_proj.weight.dtype)
        x, conv = self._project_step(u, state.conv)
        (q, k, v), gates = self._scaled(x, u), self._gates(u)
        solved, H = ridge_queries_step(q, k, gates.g_H, state.H, self.options.ridge_strength, self.options.num_iter)
        o, U = linear_attention_step(self._blend(q, solved, gates), k, v, gates.g_U, state.U)
        new = GKAState(conv, H, U)
        return self._out(o, u), new if step.active is None else choose_rows(step.active, new, state)
