"""Gated DeltaNet: a layer by itself, or in a bmojo layer. Equations and parameters: docs/mixers.md."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bmojo_edge.config import SSM, Config
from bmojo_edge.state import GDNState
from bmojo_edge.torch.layout import Layout, Step, choose_rows
from bmojo_edge.torch.mixers.heads import HeadMixer
from bmojo_edge.torch.ops import wide
from bmojo_edge.torch.recurrences import delta_rule, delta_rule_step


class GDN(HeadMixer):
    """A decayed matrix from keys to values, corrected by what it gets wrong (arXiv 2412.06464)."""

    def __init__(self, config: Config, ssm: SSM, dtype: torch.dtype) -> None:
        super().__init__(config, ssm, dtype, "qkv" if ssm.use_short_conv else "")
        self.b_proj = nn.Linear(config.d_model, self.size.heads, bias=False, dtype=dtype)
        self.gk_proj = nn.Linear(config.d_model, self.size.heads, bias=False, dtype=dtype)

    def _unit(self, x: Tensor) -> Tensor:
        """x (..., p) of length 1."""
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    def _gates(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay and beta (..., h) of u (..., d)."""
        beta = self.b_proj(u).to(wide(u.dtype)).sigmoid()
        return self._log_decay(self.gk_proj(u)), beta * 2 if self.options.allow_neg_eigval else beta

    def forward(self, u: Tensor, state: GDNState, layout: Layout) -> tuple[Tensor, GDNState]:
        """u (b, t, d) after `state`: y (b, t, d) in `wide` precision, and the state."""
        u = u.to(self.o_proj.weight.dtype)
        (q, k, v), conv = self._project(u, state.conv, layout)
        g, beta = self._gates(u)
        if layout.real is not None:  # padding leaves the state as it is
            g, beta = (torch.where(layout.real[..., None], x, 0) for x in (g, beta))
        q = self._unit(q) * self.size.head_dim**-0.5
        o, ssm = delta_rule(q, self._unit(k), v, g, beta, state.ssm, layout.reset)
        return self._out(o, u), GDNState(conv, ssm)

    def step(self, u: Tensor, state: GDNState, step: Step) -> tuple[Tensor, GDNState]:
        """One token: u (b, d)."""
        u = u.to(self.o_proj.weight.dtype)
        (q, k, v), conv = self._project_step(u, state.conv)
        g, beta = self._gates(u)
        q = self._unit(q) * self.size.head_dim**-0.5
        o, ssm = delta_rule_step(q, self._unit(k), v, g, beta, state.ssm)
        new = GDNState(conv, ssm)
        return self._out(o, u), new if step.active is None else choose_rows(step.active, new, state)
