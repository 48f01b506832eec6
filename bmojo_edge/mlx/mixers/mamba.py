"""Mamba-1 (S6): a layer by itself, or the fading memory of a bmojo layer (docs/model.md section 4)."""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from bmojo_edge.config import SSM, Config
from bmojo_edge.mlx.layers import RMSNorm, inverse_softplus, linear, linear_wide, uniform_steps
from bmojo_edge.mlx.layout import Layout, Step, choose_rows, last_values
from bmojo_edge.mlx.ops import causal_conv, selective_scan, selective_scan_step
from bmojo_edge.state import MambaState


class CausalConv(nn.Module):
    """A depthwise causal convolution: weight (d, taps), oldest tap first."""

    def __init__(self, d: int, taps: int, bias: bool, dtype: mx.Dtype) -> None:
        super().__init__()
        bound = taps**-0.5  # the default of PyTorch's nn.Conv1d, which Mamba keeps
        self.weight = mx.random.uniform(-bound, bound, (d, taps)).astype(dtype)
        if bias:
            self.bias = mx.zeros(d, dtype)

    def __call__(self, x: mx.array, past: mx.array) -> mx.array:
        return causal_conv(x, past, self.weight, self.bias if "bias" in self else None)


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
        """dt (..., d_inner), B and C (..., n) of x (..., d_inner), in float32."""
        dt, B, C = mx.split(self.x_proj(x), [self.dt_rank, self.dt_rank + self.d_state], axis=-1)
        if self.normed:
            dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        return nn.softplus(linear_wide(self.dt_proj, dt)), B.astype(mx.float32), C.astype(mx.float32)

    def _out(self, y: mx.array, z: mx.array, wide: bool) -> mx.array:
        """Gate and project; `wide`: in float32, so that innovation sees it unrounded."""
        y = (y * nn.silu(z.astype(mx.float32))).astype(z.dtype)
        return linear_wide(self.out_proj, y) if wide else self.out_proj(y)

    def __call__(
        self, u: mx.array, state: MambaState, layout: Layout, wide: bool = False
    ) -> tuple[mx.array, MambaState]:
        """u (b, t, d) after `state`: y (b, t, d), float32 where `wide`, and the state."""
        x, z = mx.split(self.in_proj(u), 2, axis=-1)
        conv = last_values(state.conv, x, layout)
        x = nn.silu(self.conv(x, state.conv))
        dt, B, C = self._steps(x)
        if layout.real is not None:
            dt = mx.where(layout.real[..., None], dt, 0.0)  # padding leaves the state as it is
        A = -mx.exp(self.A_log.astype(mx.float32))
        y, ssm = selective_scan(x.astype(mx.float32), dt, A, B, C, self.D.astype(mx.float32), state.ssm)
        return self._out(y, z, wide), MambaState(conv, ssm)

    def step(self, u: mx.array, state: MambaState, step: Step, wide: bool = False) -> tuple[mx.array, MambaState]:
        """One token: u (b, d)."""
        x, z = mx.split(self.in_proj(u), 2, axis=-1)
        conv = mx.concatenate([state.conv, x[:, None]], axis=1)[:, 1:]
        x = nn.silu(self.conv(x[:, None], state.conv)[:, 0])
        dt, B, C = self._steps(x)
        A = -mx.exp(self.A_log.astype(mx.float32))
        y, ssm = selective_scan_step(x.astype(mx.float32), dt, A, B, C, self.D.astype(mx.float32), state.ssm)
        new = MambaState(conv, ssm)
        return self._out(y, z, wide), new if step.active is None else choose_rows(step.active, new, state)
