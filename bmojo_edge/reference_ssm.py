"""Mamba of the oracle (docs/model.md section 4), and the small functions all of its mixers share.

Every mixer is `mixer(config, ssm, weights, u, state) -> (y, state)` over one sequence: u (t, d), y (t, d), the state
without a batch axis; None is the state of a sequence that starts here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from bmojo_edge.config import SSM, Config
from bmojo_edge.state import MambaState

Array = np.ndarray


class Weights:
    """Named weights seen through a prefix, turned into `dtype` when first read and kept as long as this view."""

    def __init__(self, source: Mapping[str, Array], dtype: Any, prefix: str = "") -> None:
        self.source, self.dtype, self.prefix = source, dtype, prefix
        self.converted: dict[str, Array] = {}

    def __getitem__(self, name: str) -> Array:
        name = self.prefix + name
        if name not in self.converted:
            self.converted[name] = np.asarray(self.source[name]).astype(self.dtype)
        return self.converted[name]

    def under(self, prefix: str) -> Weights:
        """The weights whose names start with a further prefix."""
        view = Weights(self.source, self.dtype, self.prefix + prefix)
        view.converted = self.converted
        return view


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    return np.exp(-np.logaddexp(0, -x))


def silu(x: Array) -> Array:
    """x * sigmoid(x)."""
    return x * sigmoid(x)


def softplus(x: Array) -> Array:
    """log(1 + exp(x)), without overflow."""
    return np.logaddexp(0, x)


def causal_conv(x: Array, past: Array, weight: Array, bias: Array | None) -> tuple[Array, Array]:
    """Depthwise causal convolution of x (t, c) with weight (c, taps), oldest tap first; `past` (taps - 1, c)."""
    taps = weight.shape[1]
    padded = np.concatenate([past, x])
    y = np.sum([padded[j : j + len(x)] * weight[:, j] for j in range(taps)], axis=0)
    return y if bias is None else y + bias, padded[len(padded) - (taps - 1) :]


def mamba(config: Config, ssm: SSM, w: Weights, u: Array, state: MambaState | None) -> tuple[Array, Any]:
    """Mamba-1 (S6): s <- exp(dt A) s + dt B x, y = C s + D x, gated by SiLU(z) (arXiv 2312.00752, algorithm 2)."""
    d_inner, n, r = ssm.expand * config.d_model, ssm.d_state, ssm.dt_rank
    assert r is not None
    if state is None:
        state = MambaState(np.zeros((ssm.d_conv - 1, d_inner), u.dtype), np.zeros((d_inner, n), u.dtype))
    xz = u @ w["in_proj.weight"].T + (w["in_proj.bias"] if ssm.bias else 0)
    x, z = np.split(xz, 2, axis=-1)  # (t, d_inner)
    x, conv = causal_conv(x, state.conv, w["conv.weight"], w["conv.bias"] if ssm.conv_bias else None)
    x = silu(x)
    dt, B, C = np.split(x @ w["x_proj.weight"].T, [r, r + n], axis=-1)  # (t, r), (t, n), (t, n)
    if ssm.dt_bc_norm:
        dt, B, C = (
            rms_norm(y, w[f"{name}_norm.weight"], config.norm_eps) for y, name in ((dt, "dt"), (B, "B"), (C, "C"))
        )
    dt = softplus(dt @ w["dt_proj.weight"].T + w["dt_proj.bias"])  # (t, d_inner)
    A, D = -np.exp(w["A_log"]), w["D"]
    s, out = state.ssm, np.empty_like(x)
    for i in range(len(x)):
        s = np.exp(dt[i, :, None] * A) * s + (dt[i] * x[i])[:, None] * B[i]
        out[i] = s @ C[i] + D * x[i]
    y = (out * silu(z)) @ w["out_proj.weight"].T + (w["out_proj.bias"] if ssm.bias else 0)
    return y, MambaState(conv, s)
