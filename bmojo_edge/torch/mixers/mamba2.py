"""Mamba-2 (SSD) in Hugging Face's form and Hybrid Model Factory's: a layer by itself, or in a bmojo layer.

Equations and parameters: docs/mixers.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmojo_edge.config import SSM, Config
from bmojo_edge.ssm_config import BC_NORM_EPS, mamba2_sizes
from bmojo_edge.state import Mamba2State
from bmojo_edge.torch.layers import RMSNorm, inverse_softplus, uniform_steps
from bmojo_edge.torch.layout import Layout, Step, choose_rows, last_values
from bmojo_edge.torch.mixers.mamba import CausalConv
from bmojo_edge.torch.ops import linear_wide, rms_norm, wide
from bmojo_edge.torch.recurrences import linear_attention, linear_attention_step, to_heads


class Mamba2(nn.Module):
    """Heads with one scalar decay each behind a short convolution, gated and normalised (arXiv 2405.21060)."""

    def __init__(self, config: Config, ssm: SSM, dtype: torch.dtype) -> None:
        super().__init__()
        self.options, self.size = ssm, mamba2_sizes(ssm)
        d, d_inner, h, channels = config.d_model, self.size.d_inner, self.size.heads, sum(self.size.widths)
        self.in_proj = nn.Linear(d, d_inner + channels + h, bias=ssm.bias, dtype=dtype)
        self.conv = CausalConv(channels, ssm.d_conv, ssm.conv_bias, dtype)
        self.B_norm = RMSNorm(ssm.d_state, BC_NORM_EPS, dtype) if ssm.bc_norm else None
        self.C_norm = RMSNorm(ssm.d_state, BC_NORM_EPS, dtype) if ssm.bc_norm else None
        self.norm = RMSNorm(d_inner, ssm.norm_eps, dtype)
        self.out_proj = nn.Linear(d_inner, d, bias=ssm.bias, dtype=dtype)
        # What the scan is made of stays float32 whatever the model's dtype.
        self.dt_bias = nn.Parameter(inverse_softplus(uniform_steps(h)))
        self.A_log = nn.Parameter(torch.empty(h, dtype=torch.float32).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(h, dtype=torch.float32))

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z, the convolution's input (x, B, C) and dt of u (..., d)."""
        d_inner, channels = self.size.d_inner, sum(self.size.widths)
        projected = self.in_proj(u.to(self.in_proj.weight.dtype))
        z, xBC, dt = projected.split([d_inner, channels, self.size.heads], dim=-1)
        if self.B_norm is not None and self.C_norm is not None:
            x, B, C = xBC.split(self.size.widths, dim=-1)
            normed = ((B, self.B_norm), (C, self.C_norm))
            B, C = (norm(y.unflatten(-1, (-1, self.size.d_state))).flatten(-2).to(x.dtype) for y, norm in normed)
            xBC = torch.cat([x, B, C], dim=-1)
        return z, xBC, dt

    def _read(self, xBC: Tensor, dt: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (..., h, p), B and C (..., h, n) and dt (..., h) in `wide` precision, after the convolution."""
        kind, h = wide(xBC.dtype), self.size.heads
        x, B, C = xBC.to(kind).split(self.size.widths, dim=-1)
        p, n = self.size.head_dim, self.size.d_state
        x, B, C = (to_heads(y.unflatten(-1, (-1, width)), h) for y, width in ((x, p), (B, n), (C, n)))
        return x, B, C, F.softplus(dt.to(kind) + self.dt_bias).clamp(*self.options.dt_limit)

    def _out(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """Skip, gate, normalise and project y and x (..., h, p): the result in `wide` precision."""
        y = (y + self.D.to(y.dtype)[:, None] * x).flatten(-2) * F.silu(z.to(y.dtype))
        groups = (self.options.n_groups, -1)
        y = rms_norm(y.unflatten(-1, groups), self.norm.weight.unflatten(-1, groups), self.norm.eps).flatten(-2)
        return linear_wide(y.to(z.dtype), self.out_proj.weight, self.out_proj.bias)

    def forward(self, u: Tensor, state: Mamba2State, layout: Layout) -> tuple[Tensor, Mamba2State]:
        """u (b, t, d) after `state`: y (b, t, d) in `wide` precision, and the state."""
        z, xBC, dt = self._project(u)
        conv = last_values(state.conv, xBC, layout)
        x, B, C, dt = self._read(self.conv(xBC, None if layout.fresh else state.conv, layout.lookback), dt)
        if layout.real is not None:
            dt = torch.where(layout.real[..., None], dt, 0)  # padding leaves the state as it is
        g = -torch.exp(self.A_log.to(dt.dtype)) * dt
        y, ssm = linear_attention(C, B, dt[..., None] * x, g, state.ssm, layout.reset)
        return self._out(y, x, z), Mamba2State(conv, ssm)

    def step(self, u: Tensor, state: Mamba2State, step: Step) -> tuple[Tensor, Mamba2State]:
        """One token: u (b, d)."""
        z, xBC, dt = self._project(u)
        conv = torch.cat([state.conv, xBC[:, None]], dim=1)[:, 1:]
        x, B, C, dt = self._read(self.conv(xBC[:, None], state.conv)[:, 0], dt)
        g = -torch.exp(self.A_log.to(dt.dtype)) * dt
        y, ssm = linear_attention_step(C, B, dt[..., None] * x, g, state.ssm)
        new = Mamba2State(conv, ssm)
        return self._out(y, x, z), new if step.active is None else choose_rows(step.active, new, state)
