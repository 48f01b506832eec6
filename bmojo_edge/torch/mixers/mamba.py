"""Mamba-1 (S6): a layer by itself, or the fading memory of a bmojo layer (docs/model.md section 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmojo_edge.config import SSM, Config
from bmojo_edge.state import MambaState
from bmojo_edge.torch.layers import RMSNorm, inverse_softplus, uniform_steps
from bmojo_edge.torch.layout import Layout, Step, choose_rows, last_values
from bmojo_edge.torch.ops import gated_scan, linear_wide, selective_scan_step, silu_conv, wide


class CausalConv(nn.Module):
    """A depthwise causal convolution and SiLU: weight (d, taps), oldest tap first."""

    def __init__(self, d: int, taps: int, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        bound = taps**-0.5  # the default of nn.Conv1d, which Mamba keeps
        self.weight = nn.Parameter(torch.empty(d, taps, dtype=dtype).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(d, dtype=dtype).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, past: Tensor | None, lookback: Tensor | None = None) -> Tensor:
        return silu_conv(x, past, self.weight, self.bias, lookback)


class Mamba(nn.Module):
    """Input-dependent diagonal state space behind a short convolution, gated (arXiv 2312.00752, figure 3)."""

    def __init__(self, config: Config, ssm: SSM, dtype: torch.dtype) -> None:
        super().__init__()
        d, d_inner, n, r = config.d_model, ssm.expand * config.d_model, ssm.d_state, ssm.dt_rank
        assert r is not None
        self.split = [r, n, n]
        self.in_proj = nn.Linear(d, 2 * d_inner, bias=ssm.bias, dtype=dtype)
        self.conv = CausalConv(d_inner, ssm.d_conv, ssm.conv_bias, dtype)
        self.x_proj = nn.Linear(d_inner, r + 2 * n, bias=False, dtype=dtype)
        self.dt_proj = nn.Linear(r, d_inner, bias=True, dtype=dtype)
        self.out_proj = nn.Linear(d_inner, d, bias=ssm.bias, dtype=dtype)
        norms = [RMSNorm(size, config.norm_eps, dtype) if ssm.dt_bc_norm else None for size in self.split]
        self.dt_norm, self.B_norm, self.C_norm = norms
        # What the scan is made of stays float32 whatever the model's dtype.
        nn.init.uniform_(self.dt_proj.weight, -(r**-0.5), r**-0.5)
        self.dt_proj.bias = nn.Parameter(inverse_softplus(uniform_steps(d_inner)))
        self.A_log = nn.Parameter(torch.arange(1, n + 1, dtype=torch.float32).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner, dtype=torch.float32))

    def _steps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt (..., d_inner) before bias and softplus, B and C (..., n) of x (..., d_inner), in `wide` precision."""
        parts = self.x_proj(x).split(self.split, dim=-1)
        norms = (self.dt_norm, self.B_norm, self.C_norm)
        dt, B, C = (y if norm is None else norm(y) for y, norm in zip(parts, norms, strict=True))
        kind = wide(x.dtype)
        return linear_wide(dt.to(x.dtype), self.dt_proj.weight), B.to(kind), C.to(kind)

    def _out(self, y: Tensor) -> Tensor:
        """Project: the result in `wide` precision, so that innovation sees it unrounded."""
        return linear_wide(y, self.out_proj.weight, self.out_proj.bias)

    def _transition(self, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        """A (d_inner, n) and D (d_inner)."""
        return -torch.exp(self.A_log.to(kind)), self.D.to(kind)

    def forward(self, u: Tensor, state: MambaState, layout: Layout) -> tuple[Tensor, MambaState]:
        """u (b, t, d) after `state`: y (b, t, d) in `wide` precision, and the state."""
        x, z = self.in_proj(u.to(self.in_proj.weight.dtype)).chunk(2, dim=-1)
        conv = last_values(state.conv, x, layout)
        past, first = (None, None) if layout.fresh else state
        x = self.conv(x, past, layout.lookback)
        dt, B, C = self._steps(x)
        A, D = self._transition(dt.dtype)
        y, ssm = gated_scan(x, z, dt, self.dt_proj.bias, A, B, C, D, first, layout.reset, layout.real)
        return self._out(y), MambaState(conv, ssm)

    def step(self, u: Tensor, state: MambaState, step: Step) -> tuple[Tensor, MambaState]:
        """One token: u (b, d)."""
        x, z = self.in_proj(u.to(self.in_proj.weight.dtype)).chunk(2, dim=-1)
        conv = torch.cat([state.conv, x[:, None]], dim=1)[:, 1:]
        x = self.conv(x[:, None], state.conv)[:, 0]
        dt, B, C = self._steps(x)
        A, D = self._transition(dt.dtype)
        dt = F.softplus(dt + self.dt_proj.bias.to(dt.dtype))
        y, ssm = selective_scan_step(x.to(dt.dtype), dt, A, B, C, D, state.ssm)
        new, y = MambaState(conv, ssm), y * F.silu(z.to(y.dtype))
        return self._out(y.to(z.dtype)), new if step.active is None else choose_rows(step.active, new, state)
