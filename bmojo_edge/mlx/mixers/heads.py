"""What gdn and gka share: queries, keys and values by head behind short convolutions, log decays, the gated output.

It does not know how they remember. Equations and parameters: docs/mixers.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx import nn

from bmojo_edge.config import SSM, Config
from bmojo_edge.mlx.layers import Project, RMSNorm, inverse_softplus, linear, uniform_steps
from bmojo_edge.mlx.layout import Layout
from bmojo_edge.mlx.mixers.mamba import CausalConv
from bmojo_edge.mlx.ops import silu_conv
from bmojo_edge.mlx.recurrences import to_heads
from bmojo_edge.ssm_config import delta_sizes


class QKV(NamedTuple):
    """Queries, keys and values of every head in float32, t tokens or (without that axis) one."""

    q: mx.array  # (b, t, h, p)
    k: mx.array  # (b, t, h, p)
    v: mx.array  # (b, t, h, p)


class LowRank(nn.Module):
    """linearB(SiLU(linearA x)), zero at first."""

    def __init__(self, d_in: int, d_out: int, rank: int, dtype: mx.Dtype) -> None:
        super().__init__()
        self.linearA = linear(d_in, rank, False, dtype)
        self.linearB = linear(rank, d_out, False, dtype)
        self.linearB.weight = mx.zeros((d_out, rank), dtype)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linearB(nn.silu(self.linearA(x)))


class HeadMixer(nn.Module):
    """Projections and output of a mixer whose heads remember matrices; `convolved` names those of q, k, v that are."""

    def __init__(self, config: Config, ssm: SSM, dtype: mx.Dtype, convolved: str, decays: bool = True) -> None:
        super().__init__()
        self.options, self.size, self.convolved = ssm, delta_sizes(ssm), convolved
        d, p, h = config.d_model, self.size.head_dim, self.size.heads
        for name, width in zip("qkv", self.size.widths, strict=True):
            setattr(self, f"{name}_proj", linear(d, width, False, dtype))
            if name in convolved:
                setattr(self, f"{name}_conv", CausalConv(width, ssm.d_conv, ssm.conv_bias, dtype))
        own = {"k": self.size.k_heads, "v": self.size.v_heads}
        for name, heads in own.items() if self.size.expands_kv else ():
            assert ssm.kv_proj_rank is not None
            setattr(self, f"proj_{name}", LowRank(heads * p, h * p, ssm.kv_proj_rank, dtype))
            if ssm.kv_learnable_residual:
                setattr(self, f"{name}_rep", mx.repeat(mx.eye(heads, dtype=dtype), h // heads, axis=0))
        if ssm.use_gate:
            self.g_proj = linear(d, h * p, False, dtype)
        self.o_norm = RMSNorm(p, ssm.norm_eps, dtype)
        self.o_proj = linear(h * p, d, False, dtype)
        if decays:  # float32 whatever the model's dtype
            self.A_log = mx.log(mx.random.uniform(1e-3, 16, (h,)))
            self.dt_bias = inverse_softplus(uniform_steps(h))

    def _raw(self, u: mx.array) -> tuple[mx.array, mx.array]:
        """Projections of u (..., d): those that are convolved, side by side, and the others."""
        parts = {name: self[f"{name}_proj"](u) for name in "qkv"}
        convolved = [parts[name] for name in "qkv" if name in self.convolved]
        others = [parts[name] for name in "qkv" if name not in self.convolved]
        empty = u[..., :0]
        return mx.concatenate(convolved or [empty], axis=-1), mx.concatenate(others or [empty], axis=-1)

    def _conv(self, x: mx.array, past: mx.array, lengths: mx.array | None) -> tuple[mx.array, mx.array]:
        """SiLU of the convolutions of x (b, t, channels), all at once, and the new past."""
        convs = [self[f"{name}_conv"] for name in self.convolved]
        weight = mx.concatenate([conv.weight for conv in convs])
        bias = mx.concatenate([conv.bias for conv in convs]) if self.options.conv_bias else None
        return silu_conv(x, past, weight, bias, lengths)

    def _expanded(self, name: str, x: mx.array, own: int) -> mx.array:
        """q, k or v x (..., own p) as (..., h, p)."""
        h, p = self.size.heads, self.size.head_dim
        heads = x.reshape(*x.shape[:-1], own, p)
        if name == "q" or not self.size.expands_kv:
            return to_heads(heads, h)
        residual = self[f"{name}_rep"] @ heads if self.options.kv_learnable_residual else to_heads(heads, h)
        return residual + self[f"proj_{name}"](x).reshape(residual.shape)

    def _qkv(self, active: mx.array) -> QKV:
        """Heads of q, k and v (..., channels) side by side."""
        own = (self.size.q_heads, self.size.k_heads, self.size.v_heads)
        parts = mx.split(active, np.cumsum(self.size.widths[:2]).tolist(), axis=-1)
        heads = zip("qkv", parts, own, strict=True)
        return QKV(*(self._expanded(name, x, n).astype(mx.float32) for name, x, n in heads))

    def _project(self, u: mx.array, past: mx.array | tuple[()], layout: Layout) -> tuple[QKV, mx.array | tuple[()]]:
        """q, k, v of u (b, t, d) and what the convolutions remember."""
        raw, others = self._raw(u)
        if isinstance(past, tuple):
            return self._qkv(nn.silu(others)), past
        active, past = self._conv(raw, past, layout.lengths)
        return self._qkv(mx.concatenate([active, others], axis=-1)), past

    def _project_step(self, u: mx.array, past: mx.array | tuple[()]) -> tuple[QKV, mx.array | tuple[()]]:
        """One token of `_project`: u (b, d)."""
        raw, others = self._raw(u)
        if isinstance(past, tuple):
            return self._qkv(nn.silu(others)), past
        active, past = self._conv(raw[:, None], past, None)
        return self._qkv(mx.concatenate([active[:, 0], others], axis=-1)), past

    def _log_decay(self, a: mx.array) -> mx.array:
        """g = -exp(A_log) softplus(a + dt_bias), never positive: (..., h) in float32."""
        A, bias = (x.astype(mx.float32) for x in (self.A_log, self.dt_bias))
        return -mx.exp(A) * nn.softplus(a.astype(mx.float32) + bias)

    def _out(self, o: mx.array, u: mx.array, project: Project) -> Any:
        """Normalise, gate and project o (..., h, p)."""
        y = self.o_norm(o).flatten(-2)
        if self.options.use_gate:
            y = y * nn.silu(self.g_proj(u).astype(mx.float32))
        return project(self.o_proj, y.astype(u.dtype))
