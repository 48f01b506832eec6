"""Mamba-1 (S6): a layer by itself, or the fading memory of a bmojo layer (docs/model.md section 4)."""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from bmojo_edge.config import SSM, Config
from bmojo_edge.mlx.layers import RMSNorm, inverse_softplus, linear, linear_wide, uniform_steps
from bmojo_edge.mlx.layout import Layout, Step
from bmojo_edge.mlx.ops import selective_scan, selective_scan_step, silu_conv
from bmojo_edge.state import MambaState


class CausalConv(nn.Module):
    """SiLU of a depthwise causal convolution: weight (d, taps), oldest tap first."""

    def __init__(self, d: int, taps: int, bias: bool, dtype: mx.Dtype) -> None:
        super().__init__()
        bound = taps**-0.5  # the default of PyTorch's nn.Conv1d, which Mamba keeps
        self.weight = mx.random.uniform(-bound, bound, (d, taps)).astype(dtype)
        if bias:
            self.bias = mx.zeros(d, dtype)

    def __call__(self, x: mx.array, past: mx.array, lengths: mx.array | None) -> tuple[mx.array, mx.array]:
        """x (b, t, d) after past (b, taps - 1, d), of which lengths (b,) are real: the same of both."""
        return silu_conv(x, past, self.weight, self.bias if "bias" in self else None, lengths)


class Mamba(nn.Module):
    """Input-dependent diagonal state space behind a short convolution, gated (arXiv 2312.00752, figure 3)."""

    def __init__(self, config: Config, ssm: SSM, dtype: mx.Dtype) -> None:
        super().__init__()
        d, d_inner, n, r = config.d_model, ssm.expand * config.d_model, ssm.d_state, ssm.dt_rank
        assert r is not None
        self.d_state, self.dt_rank, self.normed = n, r, ssm.dt_bc_norm
        self.in_proj = linear(d, 2 * d_inner, ssm.bias, dtype)
        self.conv = CausalConv(d_inner, ssm.d_conv, ssm.conv_bias, dtype)
        self.x_proj = linear(d_inner, r + 2 * n, False, dtype)
        self.dt_proj = linear(r, d_inner, True, dtype)
        self.out_proj = linear(d_inner, d, ssm.bias, dtype)
        if ssm.dt_bc_norm:
            self.dt_norm, self.B_norm, self.C_norm = (RMSNorm(size, config.norm_eps, dtype) for size in (r, n, n))
        # What the scan is made of stays float32 whatever the model's dtype.
        self.dt_proj.bias = inverse_softplus(uniform_steps(d_inner))
        self.A_log = mx.broadcast_to(mx.log(mx.arange(1, n + 1, dtype=mx.float32)), (d_inner, n))
        self.D = mx.ones(d_inner)

    def _steps(self, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """dt (..., d_inner), float32, before its softplus, B and C (..., n) of x (..., d_inner)."""
        dt, B, C = mx.split(self.x_proj(x), [self.dt_rank, self.dt_rank + self.d_state], axis=-1)
        if self.normed:
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        return linear_wide(self.dt_proj, dt), B, C

    def _out(self, y: mx.array, wide: bool) -> mx.array:
        """Project; `wide`: in float32, so that innovation sees it unrounded."""
        return linear_wide(self.out_proj, y) if wide else self.out_proj(y)

    def __call__(
        self, u: mx.array, state: MambaState, layout: Layout, wide: bool = False
    ) -> tuple[mx.array, MambaState]:
        """u (b, t, d) after `state`: y (b, t, d), float32 where `wide`, and the state."""
        x, z = mx.split(self.in_proj(u), 2, axis=-1)
        x, conv = self.conv(x, state.conv, layout.lengths)
        dt, B, C = self._steps(x)
        y, ssm = selective_scan(x, dt, self.A_log, B, C, self.D, z, state.ssm, layout.lengths)
        return self._out(y, wide), MambaState(conv, ssm)

    def step(self, u: mx.array, state: MambaState, step: Step, wide: bool = False) -> tuple[mx.array, MambaState]:
        """One token: u (b, d)."""
        x, z = mx.split(self.in_proj(u), 2, axis=-1)
        x, conv = self.conv(x[:, None], state.conv, step.lengths)
        dt, B, C = self._steps(x[:, 0])
        y, ssm = selective_scan_step(x[:, 0], dt, self.A_log, B, C, self.D, z, state.ssm, step.active)
        return self._out(y, wide), MambaState(conv, ssm)
