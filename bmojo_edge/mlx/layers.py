"""The small modules mixers are made of: norm, projections, feed-forward, mixture of experts. They hold no state."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
from mlx import nn

from bmojo_edge.config import Config
from bmojo_edge.mlx import ops
from bmojo_edge.mlx.ops import Linear, Unrounded, add_rms_norm, rms_norm, swiglu


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in float32, in the dtype of x."""

    def __init__(self, d: int, eps: float, dtype: mx.Dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = mx.ones(d, dtype)

    def __call__(self, x: mx.array) -> mx.array:
        return rms_norm(x, self.weight, self.eps)

    def of_sum(self, h: mx.array, x: mx.array, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
        """h + x (b, d), and its norm in `dtype`."""
        return add_rms_norm(h, x, self.weight, self.eps, dtype)


def linear(d_in: int, d_out: int, bias: bool, dtype: mx.Dtype) -> nn.Linear:
    """A linear layer with its parameters in `dtype`."""
    layer = nn.Linear(d_in, d_out, bias=bias)
    layer.set_dtype(dtype)
    return layer


def stored(layer: Any) -> Linear:
    """The parameters of a linear layer, quantised or not."""
    bias = layer.bias if "bias" in layer else None
    if isinstance(layer, nn.QuantizedLinear):
        return Linear(layer.weight, bias, layer.scales, layer.biases, layer.group_size, layer.bits)
    return Linear(layer.weight, bias)


Project = Callable[[Any, mx.array], Any]  # how a mixer's last layer is computed: `apply` or `linear_wide`


def apply(layer: Any, x: mx.array) -> mx.array:
    """A layer of x, rounded to its dtype as layers do by themselves."""
    return layer(x)


def linear_wide(layer: Any, x: mx.array) -> Unrounded:
    """A linear layer of x (..., in), before and after rounding to the dtype of x."""
    return ops.linear_wide(x, stored(layer))


class Heads(NamedTuple):
    """Queries, keys and values by head, normalised but not rotated."""

    q: mx.array  # (b, h, t, p)
    k: mx.array  # (b, g, t, p)
    v: mx.array  # (b, g, t, p)


class Projections(nn.Module):
    """Query, key and value projections with optional per-head norms (docs/model.md section 3, step 3)."""

    def __init__(self, config: Config, dtype: mx.Dtype) -> None:
        super().__init__()
        d, p, bias = config.d_model, config.d_head, config.attention_bias
        self.head_dim, self.qk_norm = p, config.qk_norm
        self.q_proj = linear(d, config.n_heads * p, bias, dtype)
        self.k_proj = linear(d, config.kv_heads * p, bias, dtype)
        self.v_proj = linear(d, config.kv_heads * p, bias, dtype)
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(p, config.norm_eps, dtype) for _ in range(2))

    def _heads(self, x: mx.array, norm: RMSNorm | None) -> mx.array:
        if x.ndim == 2:
            x = x.reshape(len(x), -1, 1, self.head_dim)
            return x if norm is None else norm(x)
        x = x.reshape(*x.shape[:2], -1, self.head_dim)
        return (x if norm is None else norm(x)).swapaxes(1, 2)

    def queries(self, u: mx.array) -> mx.array:
        """(b, h, t, p) from u (b, t, d), or (b, h, 1, p) from u (b, d)."""
        return self._heads(self.q_proj(u), self.q_norm if self.qk_norm else None)

    def keys_values(self, u: mx.array) -> tuple[mx.array, mx.array]:
        """Two (b, g, t, p) from u (b, t, d), or (b, g, 1, p) from u (b, d)."""
        k = self._heads(self.k_proj(u), self.k_norm if self.qk_norm else None)
        return k, self._heads(self.v_proj(u), None)

    def project(self, u: mx.array) -> Heads:
        """All three from u (b, t, d) or (b, d)."""
        return Heads(self.queries(u), *self.keys_values(u))


def merge_heads(x: mx.array) -> mx.array:
    """(b, h, t, p) as (b, t, h p)."""
    b, h, t, p = x.shape
    return x.swapaxes(1, 2).reshape(b, t, h * p)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Config, dtype: mx.Dtype) -> None:
        super().__init__()
        self.gate_proj = linear(config.d_model, config.d_ff, False, dtype)
        self.up_proj = linear(config.d_model, config.d_ff, False, dtype)
        self.down_proj = linear(config.d_ff, config.d_model, False, dtype)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class ExpertLinear(nn.Module):
    """The same linear map of every expert, one above the other: weight (n_experts, out, in)."""

    def __init__(self, n: int, d_in: int, d_out: int, dtype: mx.Dtype) -> None:
        super().__init__()
        bound = d_in**-0.5
        self.weight = mx.random.uniform(-bound, bound, (n, d_out, d_in)).astype(dtype)

    def __call__(self, x: mx.array, expert: mx.array) -> mx.array:
        """x (..., 1, in) through the experts (...) chosen: (..., 1, out)."""
        if x.dtype != mx.float32 and mx.default_device() == mx.Device(mx.cpu):  # MLX's kernel there is float32 only
            wide = mx.gather_mm(x.astype(mx.float32), self.weight.astype(mx.float32).swapaxes(1, 2), rhs_indices=expert)
            return wide.astype(x.dtype)
        return mx.gather_mm(x, self.weight.swapaxes(1, 2), rhs_indices=expert)

    def to_quantized(self, group_size: int, bits: int, mode: str = "affine") -> QuantizedExpertLinear:
        """This map with its rows packed, as `nn.quantize` asks for it."""
        return QuantizedExpertLinear(self.weight, group_size, bits, mode)


class QuantizedExpertLinear(nn.Module):
    """`ExpertLinear` over packed rows."""

    def __init__(self, weight: mx.array, group_size: int, bits: int, mode: str) -> None:
        super().__init__()
        self.group_size, self.bits, self.mode = group_size, bits, mode
        self.weight, self.scales, self.biases = mx.quantize(weight, group_size, bits, mode=mode)

    def __call__(self, x: mx.array, expert: mx.array) -> mx.array:
        return mx.gather_qmm(
            x,
            self.weight,
            self.scales,
            self.biases,
            rhs_indices=expert,
            transpose=True,
            group_size=self.group_size,
            bits=self.bits,
            mode=self.mode,
        )


class Experts(nn.Module):
    """The SwiGLUs of a mixture."""

    def __init__(self, n: int, config: Config, dtype: mx.Dtype) -> None:
        super().__init__()
        self.gate_proj = ExpertLinear(n, config.d_model, config.d_ff, dtype)
        self.up_proj = ExpertLinear(n, config.d_model, config.d_ff, dtype)
        self.down_proj = ExpertLinear(n, config.d_ff, config.d_model, dtype)

    def __call__(self, x: mx.array, expert: mx.array) -> mx.array:
        """The experts (..., per_token) chosen for x (..., d): (..., per_token, d)."""
        x = x[..., None, None, :]
        return self.down_proj(swiglu(self.gate_proj(x, expert), self.up_proj(x, expert)), expert)[..., 0, :]


class MixtureOfExperts(nn.Module):
    """The `per_token` likeliest experts, weighted by the softmax of the router over all of them (Jamba)."""

    def __init__(self, config: Config, layer: int, dtype: mx.Dtype) -> None:
        super().__init__()
        experts = config.experts_of(layer)
        assert experts is not None
        self.per_token = experts.per_token
        self.router = linear(config.d_model, experts.n, False, dtype)
        self.experts = Experts(experts.n, config, dtype)

    def __call__(self, x: mx.array) -> mx.array:
        shares = mx.softmax(linear_wide(self.router, x).wide, axis=-1)  # (..., n)
        chosen = mx.argsort(-shares, axis=-1)[..., : self.per_token]
        weights = mx.take_along_axis(shares, chosen, axis=-1)[..., None]
        return (self.experts(x, chosen).astype(mx.float32) * weights).sum(-2).astype(x.dtype)


def inverse_softplus(x: mx.array) -> mx.array:
    """y with log(1 + exp(y)) = x > 0."""
    return x + mx.log(-mx.expm1(-x))


def uniform_steps(n: int, low: float = 1e-3, high: float = 0.1, floor: float = 1e-4) -> mx.array:
    """n step sizes, log-uniform between low and high, as Mamba draws them (arXiv 2312.00752, section 3.6)."""
    return mx.maximum(mx.exp(mx.random.uniform(math.log(low), math.log(high), (n,))), floor)
