"""Mamba-2 (SSD) in Hugging Face's form and Hybrid Model Factory's: a layer by itself, or in a bmojo layer.

Equations and parameters: docs/mixers.md.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from bmojo_edge.config import SSM, Config
from bmojo_edge.mlx.layers import Project, RMSNorm, apply, inverse_softplus, linear, uniform_steps
from bmojo_edge.mlx.layout import Layout, Step, choose_rows
from bmojo_edge.mlx.mixers.mamba import CausalConv
from bmojo_edge.mlx.recurrences import linear_attention, linear_attention_step, to_heads
from bmojo_edge.ssm_config import BC_NORM_EPS, mamba2_sizes
from bmojo_edge.state import Mamba2State


class Mamba2(nn.Module):
    """Heads with one scalar decay each behind a short convolution, gated and normalised (arXiv 2405.21060)."""

    def __init__(self, config: Config, ssm: SSM, dtype: mx.Dtype) -> None:
        super().__init__()
        self.options, self.size = ssm, mamba2_sizes(ssm)
        d, d_inner, h, channels = config.d_model, self.size.d_inner, self.size.heads, sum(self.size.widths)
        self.in_proj = linear(d, d_inner + channels + h, ssm.bias, dtype)
        self.conv = CausalConv(channels, ssm.d_conv, ssm.conv_bias, dtype)
        if ssm.bc_norm:
            self.B_norm, self.C_norm = (RMSNorm(ssm.d_state, BC_NORM_EPS, dtype) for _ in range(2))
        self.norm = RMSNorm(d_inner, ssm.norm_eps, dtype)
        self.out_proj = linear(d_inner, d, ssm.bias, dtype)
        # What the scan is made of stays float32 whatever the model's dtype.
        self.dt_bias = inverse_softplus(uniform_steps(h))
        self.A_log = mx.log(mx.random.uniform(1, 16, (h,)))
        self.D = mx.ones(h)

    def _parts(self, xBC: mx.array) -> list[mx.array]:
        """x, B and C of their channels side by side."""
        return list(mx.split(xBC, np.cumsum(self.size.widths[:2]).tolist(), axis=-1))

    def _project(self, u: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """z, the convolution's input (x, B, C) and dt of u (..., d)."""
        d_inner, channels = self.size.d_inner, sum(self.size.widths)
        z, xBC, dt = mx.split(self.in_proj(u), [d_inner, d_inner + channels], axis=-1)
        if self.options.bc_norm:
            x, *BC = self._parts(xBC)
            heads = (y.reshape(*y.shape[:-1], -1, self.size.d_state) for y in BC)
            B, C = (norm(y).flatten(-2) for y, norm in zip(heads, (self.B_norm, self.C_norm), strict=True))
            xBC = mx.concatenate([x, B, C], axis=-1)
        return z, xBC, dt

    def _read(self, xBC: mx.array, dt: mx.array) -> tuple[mx.array, mx.array, mx.array, mx.array]:
        """x (..., h, p), B and C (..., h, n) and dt (..., h) in float32, after the convolution."""
        widths = (self.size.head_dim, self.size.d_state, self.size.d_state)
        parts = zip(self._parts(xBC.astype(mx.float32)), widths, strict=True)
        x, B, C = (to_heads(y.reshape(*y.shape[:-1], -1, width), self.size.heads) for y, width in parts)
        dt = nn.softplus(dt.astype(mx.float32) + self.dt_bias.astype(mx.float32))
        return x, B, C, mx.clip(dt, *self.options.dt_limit)

    def _log_decay(self, dt: mx.array) -> mx.array:
        return -mx.exp(self.A_log.astype(mx.float32)) * dt

    def _out(self, y: mx.array, x: mx.array, z: mx.array, project: Project) -> Any:
        """Skip, gate, normalise and project y and x (..., h, p)."""
        y = (y + self.D.astype(mx.float32)[:, None] * x).flatten(-2) * nn.silu(z.astype(mx.float32))
        groups = y.reshape(*y.shape[:-1], self.options.n_groups, -1)
        y = mx.fast.rms_norm(groups, None, self.norm.eps).flatten(-2) * self.norm.weight
        return project(self.out_proj, y.astype(z.dtype))

    def __call__(
        self, u: mx.array, state: Mamba2State, layout: Layout, project: Project = apply
    ) -> tuple[Any, Mamba2State]:
        """u (b, t, d) after `state`: y (b, t, d), as `project` leaves it, and the state."""
        z, xBC, dt = self._project(u)
        xBC, conv = self.conv(xBC, state.conv, layout.lengths)
        x, B, C, dt = self._read(xBC, dt)
        if layout.real is not None:
            dt = mx.where(layout.real[..., None], dt, 0.0)  # padding leaves the state as it is
        y, ssm = linear_attention(C, B, dt[..., None] * x, self._log_decay(dt), state.ssm)
        return self._out(y, x, z, project), Mamba2State(conv, ssm)

    def step(self, u: mx.array, state: Mamba2State, step: Step, project: Project = apply) -> tuple[Any, Mamba2State]:
        """One token: u (b, d)."""
        z, xBC, dt = self._project(u)
        xBC, conv = self.conv(xBC[:, None], state.conv, step.lengths)
        x, B, C, dt = self._read(xBC[:, 0], dt)
        y, ssm = linear_attention_step(C, B, dt[..., None] * x, self._log_decay(dt), state.ssm)
        new = Mamba2State(conv, ssm)
        return self._out(y, x, z, project), new if step.active is None else choose_rows(step.active, new, state)
