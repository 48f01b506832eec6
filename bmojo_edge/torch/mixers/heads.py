"""What gdn and gka share: queries, keys and values by head behind short convolutions, log decays, the gated output.

It does not know how they remember. Equations and parameters: docs/mixers.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmojo_edge.config import SSM, Config
from bmojo_edge.ssm_config import delta_sizes
from bmojo_edge.torch.layers import RMSNorm, inverse_softplus, uniform_steps
from bmojo_edge.torch.layout import Layout, last_values
from bmojo_edge.torch.mixers.mamba import CausalConv
from bmojo_edge.torch.ops import linear_wide, silu_conv, wide
from bmojo_edge.torch.recurrences import to_heads


class QKV(NamedTuple):
    """Queries, keys and values of every head in `wide` precision, t tokens or (without that axis) one."""

    q: Tensor  # (b, t, h, p)
    k: Tensor  # (b, t, h, p)
    v: Tensor  # (b, t, h, p)


class LowRank(nn.Module):
    """linearB(SiLU(linearA x)), zero at first."""

    def __init__(self, d_in: int, d_out: int, rank: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linearA = nn.Linear(d_in, rank, bias=False, dtype=dtype)
        self.linearB = nn.Linear(rank, d_out, bias=False, dtype=dtype)
        nn.init.zeros_(self.linearB.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linearB(F.silu(self.linearA(x)))


class HeadMixer(nn.Module):
    """Projections and output of a mixer whose heads remember matrices; `convolved` names those of q, k, v that are."""

    def __init__(self, config: Config, ssm: SSM, dtype: torch.dtype, convolved: str, decays: bool = True) -> None:
        super().__init__()
        self.options, self.size, self.convolved = ssm, delta_sizes(ssm), convolved
        d, p, h = config.d_model, self.size.head_dim, self.size.heads
        for name, width in zip("qkv", self.size.widths, strict=True):
            setattr(self, f"{name}_proj", nn.Linear(d, width, bias=False, dtype=dtype))
            if name in convolved:
                setattr(self, f"{name}_conv", CausalConv(width, ssm.d_conv, ssm.conv_bias, dtype))
        own = {"k": self.size.k_heads, "v": self.size.v_heads}
        for name, heads in own.items() if self.size.expands_kv else ():
            assert ssm.kv_proj_rank is not None
            setattr(self, f"proj_{name}", LowRank(heads * p, h * p, ssm.kv_proj_rank, dtype))
            if ssm.kv_learnable_residual:
                repeats = torch.eye(heads, dtype=dtype).repeat_interleave(h // heads, dim=0)
                setattr(self, f"{name}_rep", nn.Parameter(repeats))
        self.g_proj = nn.Linear(d, h * p, bias=False, dtype=dtype) if ssm.use_gate else None
        self.o_norm = RMSNorm(p, ssm.norm_eps, dtype)
        self.o_proj = nn.Linear(h * p, d, bias=False, dtype=dtype)
        if decays:  # float32 whatever the model's dtype
            self.A_log = nn.Parameter(torch.empty(h, dtype=torch.float32).uniform_(1e-3, 16).log())
            self.dt_bias = nn.Parameter(inverse_softplus(uniform_steps(h)))

    def _raw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Projections of u (..., d): those that are convolved, side by side, and the others."""
        parts = {name: getattr(self, f"{name}_proj")(u) for name in "qkv"}
        convolved = [parts[name] for name in "qkv" if name in self.convolved]
        others = [parts[name] for name in "qkv" if name not in self.convolved]
        empty = u.new_empty((*u.shape[:-1], 0))
        return torch.cat([empty, *convolved], dim=-1), torch.cat([empty, *others], dim=-1)

    def _conv(self, x: Tensor, past: Tensor | None, lookback: Tensor | None = None) -> Tensor:
        """SiLU of the convolutions of x (b, t, channels), all at once."""
        convs = [getattr(self, f"{name}_conv") for name in self.convolved]
        weight = torch.cat([conv.weight for conv in convs])
        bias = torch.cat([conv.bias for conv in convs]) if self.options.conv_bias else None
        return silu_conv(x, past, weight, bias, lookback)

    def _expanded(self, name: str, x: Tensor, own: int) -> Tensor:
        """q, k or v x (..., own p) as (..., h, p)."""
        h, p = self.size.heads, self.size.head_dim
        heads = x.unflatten(-1, (own, p))
        if name == "q" or not self.size.expands_kv:
            return to_heads(heads, h)
        rep = getattr(self, f"{name}_rep", None)
        residual = to_heads(heads, h) if rep is None else rep @ heads
        return residual + getattr(self, f"proj_{name}")(x).unflatten(-1, (h, p))

    def _qkv(self, active: Tensor) -> QKV:
        """Heads of q, k and v (..., channels) side by side."""
        own, kind = (self.size.q_heads, self.size.k_heads, self.size.v_heads), wide(active.dtype)
        parts = zip("qkv", active.split(self.size.widths, dim=-1), own, strict=True)
        return QKV(*(self._expanded(name, x, heads).to(kind) for name, x, heads in parts))

    def _project(self, u: Tensor, past: Tensor | tuple[()], layout: Layout) -> tuple[QKV, Tensor | tuple[()]]:
        """q, k, v of u (b, t, d) and what the convolutions remember."""
        raw, others = self._raw(u)
        if isinstance(past, tuple):
            return self._qkv(F.silu(others)), past
        active = torch.cat([self._conv(raw, None if layout.fresh else past, layout.lookback), others], dim=-1)
        return self._qkv(active), last_values(past, raw, layout)

    def _project_step(self, u: Tensor, past: Tensor | tuple[()]) -> tuple[QKV, Tensor | tuple[()]]:
        """One token of `_project`: u (b, d)."""
        raw, others = self._raw(u)
        if isinstance(past, tuple):
            return self._qkv(F.silu(others)), past
        active = torch.cat([self._conv(raw[:, None], past)[:, 0], others], dim=-1)
        return self._qkv(active), torch.cat([past, raw[:, None]], dim=1)[:, 1:]

    def _log_decay(self, a: Tensor) -> Tensor:
        """g = -exp(A_log) softplus(a + dt_bias), never positive: (..., h) in `wide` precision."""
        kind = wide(a.dtype)
        return -torch.exp(self.A_log.to(kind)) * F.softplus(a.to(kind) + self.dt_bias.to(kind))

    def _out(self, o: Tensor, u: Tensor) -> Tensor:
        """Normalise, gate and project o (..., h, p): the result in `wide` precision."""
        y = self.o_norm(o).flatten(-2)
        if self.g_proj is not None:
            y = y * F.silu(self.g_proj(u).to(y.dtype))
        return linear_wide(y.to(u.dtype), self.o_proj.weight)
