"""The small modules mixers are made of: norm, projections, feed-forward, mixture of experts. They hold no state."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bmojo_edge.config import Config
from bmojo_edge.torch.ops import rms_norm, wide


class RMSNorm(nn.Module):
    """x / rms(x) * weight; the result stays in `wide` precision, callers round it."""

    def __init__(self, d: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class Heads(NamedTuple):
    """Queries, keys and values by head, normalised but not rotated."""

    q: Tensor  # (b, h, t, p)
    k: Tensor  # (b, g, t, p)
    v: Tensor  # (b, g, t, p)


class Projections(nn.Module):
    """Query, key and value projections with optional per-head norms (docs/model.md section 3, step 3)."""

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        d, p, self.head_dim = config.d_model, config.d_head, config.d_head
        self.q_proj = nn.Linear(d, config.n_heads * p, bias=config.attention_bias, dtype=dtype)
        self.k_proj = nn.Linear(d, config.kv_heads * p, bias=config.attention_bias, dtype=dtype)
        self.v_proj = nn.Linear(d, config.kv_heads * p, bias=config.attention_bias, dtype=dtype)
        self.q_norm = RMSNorm(p, config.norm_eps, dtype) if config.qk_norm else None
        self.k_norm = RMSNorm(p, config.norm_eps, dtype) if config.qk_norm else None

    def _heads(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        b, t, _ = x.shape
        x = x.view(b, t, -1, self.head_dim).transpose(1, 2)
        return x if norm is None else norm(x).to(x.dtype)

    def queries(self, u: Tensor) -> Tensor:
        """(b, h, t, p) from u (b, t, d)."""
        return self._heads(self.q_proj(u), self.q_norm)

    def keys_values(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Two (b, g, t, p) from u (b, t, d)."""
        return self._heads(self.k_proj(u), self.k_norm), self._heads(self.v_proj(u), None)

    def project(self, u: Tensor) -> Heads:
        """All three from u (b, t, d)."""
        return Heads(self.queries(u), *self.keys_values(u))


def merge_heads(x: Tensor) -> Tensor:
    """(b, h, t, p) as (b, t, h p)."""
    return x.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_ff, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(config.d_model, config.d_ff, bias=False, dtype=dtype)
        self.down_proj = nn.Linear(config.d_ff, config.d_model, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class ExpertLinear(nn.Module):
    """The same linear map of every expert, one above the other: weight (n_experts, out, in)."""

    def __init__(self, n: int, d_in: int, d_out: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, d_out, d_in, dtype=dtype))
        nn.init.uniform_(self.weight, -(d_in**-0.5), d_in**-0.5)


class Experts(nn.Module):
    """The SwiGLUs of a mixture."""

    def __init__(self, n: int, config: Config, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = ExpertLinear(n, config.d_model, config.d_ff, dtype)
        self.up_proj = ExpertLinear(n, config.d_model, config.d_ff, dtype)
        self.down_proj = ExpertLinear(n, config.d_ff, config.d_model, dtype)

    def forward(self, x: Tensor, expert: int) -> Tensor:
        """One expert on the tokens routed to it: x (tokens, d)."""
        gate, up = F.linear(x, self.gate_proj.weight[expert]), F.linear(x, self.up_proj.weight[expert])
        return F.linear(F.silu(gate) * up, self.down_proj.weight[expert])


class MixtureOfExperts(nn.Module):
    """The `per_token` likeliest experts, weighted by the softmax of the router over all of them (Jamba)."""

    def __init__(self, config: Config, layer: int, dtype: torch.dtype) -> None:
        super().__init__()
        experts = config.experts_of(layer)
        assert experts is not None
        self.n, self.per_token = experts.n, experts.per_token
        self.router = nn.Linear(config.d_model, self.n, bias=False, dtype=dtype)
        self.experts = Experts(self.n, config, dtype)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2)  # (tokens, d)
        kind = wide(x.dtype)
        shares = F.linear(tokens.to(kind), self.router.weight.to(kind)).softmax(dim=-1)
        chosen = shares.argsort(dim=-1, descending=True, stable=True)[:, : self.per_token]
        out = torch.zeros_like(tokens, dtype=kind)
        for expert in range(self.n):
            rows = (chosen == expert).any(dim=-1).nonzero()[:, 0]
            share = shares[rows, expert, None]
            out = out.index_add(0, rows, share * self.experts(tokens[rows], expert).to(kind))
        return out.to(x.dtype).view_as(x)


def inverse_softplus(x: Tensor) -> Tensor:
    """y with log(1 + exp(y)) = x > 0."""
    return x + torch.log(-torch.expm1(-x))


def uniform_steps(n: int, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> Tensor:
    """n step sizes, log-uniform between low and high, as Mamba draws them (arXiv 2312.00752, section 3.6)."""
    return torch.exp(torch.rand(n) * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
