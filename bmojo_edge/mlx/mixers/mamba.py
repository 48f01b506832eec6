"""Mamba-1 (S6): a layer by itself, or the fading memory of a bmojo layer (docs/model.md section 4)."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn

from bmojo_edge.config import SSM, Config
from bmojo_edge.mlx.layers import Project, RMSNorm, apply, inverse_softplus, linear, stored, uniform_steps
from bmojo_edge.mlx.layout import Layout, Step
from bmojo_edge.mlx.ops import MambaWeights, scan_inputs, selective_scan, selective_scan_step, silu_conv
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
        self.normed, self.eps = ssm.dt_bc_norm, config.norm_eps
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

    @property
    def _weights(self) -> MambaWeights:
        """What stands between the two large projections."""
        norms = (self.dt_norm, self.B_norm, self.C_norm) if self.normed else None
        return MambaWeights(
            self.conv.weight,
            self.conv.bias if "bias" in self.conv else None,
            stored(self.x_proj),
            stored(self.dt_proj),
            None if norms is None else (norms[0].weight, norms[1].weight, norms[2].weight),
            self.eps,
            self.A_log,
            self.D,
        )

    def __call__(
        self, u: mx.array, state: MambaState, layout: Layout, project: Project = apply
    ) -> tuple[Any, MambaState]:
        """u (b, t, d) after `state`: y (b, t, d), as `project` leaves it, and the state."""
        x, z = mx.split(self.in_proj(u), 2, axis=-1)
        x, conv = self.conv(x, state.conv, layout.lengths)
        dt, B, C = scan_inputs(x, self._weights)
        y, ssm = selective_scan(x, dt, self.A_log, B, C, self.D, z, state.ssm, layout.lengths)
        return project(self.out_proj, y), MambaState(conv, ssm)

    def step(self, u: mx.array, state: MambaState, step: Step, project: Project = apply) -> tuple[Any, MambaState]:
        """One token: u (b, d)."""
        y, *moved = selective_scan_step(self.in_proj(u), state.conv, state.ssm, self._weights, step.active)
        return project(self.out_proj, y), MambaState(*moved)
