"""Mamba-2 of the oracle, token by token (docs/mixers.md; Dao and Gu, arXiv 2405.21060).

The same equations serve Hugging Face's form (B and C shared by groups of heads) and Hybrid Model Factory's (x and B
with few heads, C with all of them, RMSNorm on B and C). One sequence, no batch axis.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bmojo_edge.config import SSM, Config
from bmojo_edge.reference_ssm import Weights, causal_conv, rms_norm, silu, softplus
from bmojo_edge.ssm_config import BC_NORM_EPS, mamba2_sizes
from bmojo_edge.state import Mamba2State

Array = np.ndarray


def mamba2(config: Config, ssm: SSM, w: Weights, u: Array, state: Mamba2State | None) -> tuple[Array, Any]:
    """s <- exp(dt A) s + dt x B^T, y = s C + D x per head with scalar A, then a gated RMSNorm."""
    size, t = mamba2_sizes(ssm), len(u)
    h, p, n = size.heads, size.head_dim, size.d_state
    if state is None:
        state = Mamba2State(np.zeros((ssm.d_conv - 1, sum(size.widths)), u.dtype), np.zeros((h, p, n), u.dtype))
    projected = u @ w["in_proj.weight"].T + (w["in_proj.bias"] if ssm.bias else 0)
    z, x, B, C, dt = np.split(projected, np.cumsum([size.d_inner, *size.widths]), axis=-1)
    if ssm.bc_norm:
        B, C = (
            rms_norm(y.reshape(t, -1, n), w[f"{name}_norm.weight"], BC_NORM_EPS).reshape(t, -1)
            for y, name in ((B, "B"), (C, "C"))
        )
    xBC = np.concatenate([x, B, C], axis=-1)
    xBC, conv = causal_conv(xBC, state.conv, w["conv.weight"], w["conv.bias"] if ssm.conv_bias else None)
    x, B, C = np.split(silu(xBC), np.cumsum(size.widths[:2]), axis=-1)
    x, B, C = (_to_heads(y.reshape(t, -1, width), h) for y, width in ((x, p), (B, n), (C, n)))  # (t, h, p), (t, h, n)
    dt = np.clip(softplus(dt + w["dt_bias"]), *ssm.dt_limit)  # (t, h)
    A, D = -np.exp(w["A_log"]), w["D"]  # (h,)
    s, out = state.ssm, np.empty_like(x)
    for i in range(t):
        s = np.exp(dt[i] * A)[:, None, None] * s + np.einsum("h,hp,hn->hpn", dt[i], x[i], B[i])
        out[i] = np.einsum("hpn,hn->hp", s, C[i]) + D[:, None] * x[i]
    gated = (out.reshape(t, -1) * silu(z)).reshape(t, ssm.n_groups, -1)
    y = rms_norm(gated, w["norm.weight"].reshape(ssm.n_groups, -1), ssm.norm_eps).reshape(t, -1)
    return y @ w["out_proj.weight"].T + (w["out_proj.bias"] if ssm.bias else 0), Mamba2State(conv, s)


def _to_heads(x: Array, heads: int) -> Array:
    """x (t, k, ...) repeated to (t, heads, ...): head j reads x[:, j * k // heads]."""
    return np.repeat(x, heads // x.shape[1], axis=1)
