"""Gated DeltaNet (`gdn`) and Gated KalmaNet (`gka`) of the oracle, token by token (docs/mixers.md).

Yang et al., arXiv 2412.06464, and Peng et al., arXiv 2511.21016, with the options and constants of Hybrid Model
Factory. Both project, convolve and normalise q, k and v alike and differ in how they remember. One sequence, no batch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bmojo_edge.config import SSM, Config
from bmojo_edge.reference_ssm import Weights, causal_conv, rms_norm, sigmoid, silu, softplus
from bmojo_edge.ssm_config import conv_channels, delta_sizes
from bmojo_edge.state import GDNState, GKAState

Array = np.ndarray

_BETA_FLOOR = 1e-6  # gka: added to beta where it scales k and v
_GKA_NORM_EPS = 1e-6  # gka: added to the length of q and k
_GDN_NORM_EPS = 1e-6  # gdn: added to the squared length of q and k


def gdn(config: Config, ssm: SSM, w: Weights, u: Array, state: GDNState | None) -> tuple[Array, Any]:
    """S <- exp(g) S; S <- S + beta (v - S k) k^T; o = S q / sqrt(p), with q and k of length 1."""
    size, t = delta_sizes(ssm), len(u)
    h, p = size.heads, size.head_dim
    if state is None:
        channels = conv_channels(ssm, config.d_model)
        past = np.zeros((ssm.d_conv - 1, channels), u.dtype) if channels else ()
        state = GDNState(past, np.zeros((h, p, p), u.dtype))
    q, k, v, conv = _project(ssm, w, u, state.conv, convolved="qkv" if ssm.use_short_conv else "", activated="qkv")
    q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + _GDN_NORM_EPS) for x in (q, k))
    beta = sigmoid(u @ w["b_proj.weight"].T) * (2 if ssm.allow_neg_eigval else 1)  # (t, h)
    decay = np.exp(_log_decay(w, u @ w["gk_proj.weight"].T))  # (t, h)
    S, out = state.ssm, np.empty_like(q)
    for i in range(t):
        S = decay[i, :, None, None] * S
        error = v[i] - np.einsum("hvk,hk->hv", S, k[i])
        S = S + np.einsum("h,hv,hk->hvk", beta[i], error, k[i])
        out[i] = np.einsum("hvk,hk->hv", S, q[i]) * p**-0.5
    return _read_out(ssm, w, u, out), GDNState(conv, S)


def gka(config: Config, ssm: SSM, w: Weights, u: Array, state: GKAState | None) -> tuple[Array, Any]:
    """H <- exp(g) H + k k^T, U <- exp(g) U + v k^T; x solves (H + lambda I) x = q; o = U (q + alpha (x - q))."""
    size, t = delta_sizes(ssm), len(u)
    h, p = size.heads, size.head_dim
    if state is None:
        past = np.zeros((ssm.d_conv - 1, conv_channels(ssm, config.d_model)), u.dtype)
        state = GKAState(past, np.zeros((h, p, p), u.dtype), np.zeros((h, p, p), u.dtype))
    names = "qkv" if ssm.use_v_conv else "qk"
    q, k, v, conv = _project(ssm, w, u, state.conv, convolved=names, activated=names)
    q, k = (x / (np.sqrt((x**2).sum(-1, keepdims=True)) + _GKA_NORM_EPS) for x in (q, k))
    if ssm.use_beta_gate:
        beta = sigmoid(u @ w["b_proj.weight"].T + w["b_proj.bias"])[..., None] + _BETA_FLOOR  # (t, h, 1)
        k, v = beta * k, beta * v
    alpha = np.ones((t, h), u.dtype)
    if ssm.use_alpha_connection:
        alpha = sigmoid(u @ w["alpha_proj.weight"].T + w["alpha_proj.bias"])
    decay_U = np.ones((t, h), u.dtype)
    if ssm.use_forgetting_gate:
        decay_U = np.exp(_log_decay(w, u @ w["a_proj.weight"].T))
    decay_H = decay_U if ssm.use_forgetting_gate_kk else np.ones_like(decay_U)
    _, H, U = state
    out = np.empty_like(q)
    for i in range(t):
        H = decay_H[i, :, None, None] * H + np.einsum("hj,hk->hjk", k[i], k[i])
        U = decay_U[i, :, None, None] * U + np.einsum("hv,hk->hvk", v[i], k[i])
        for j in range(h):
            query = q[i, j]
            if ssm.num_iter:
                query = query + alpha[i, j] * (chebyshev(H[j], query, ssm.ridge_strength, ssm.num_iter) - query)
            out[i, j] = U[j] @ query
    return _read_out(ssm, w, u, out * (p**-0.5 if ssm.gla_rescale else 1.0)), GKAState(conv, H, U)


def chebyshev(H: Array, q: Array, ridge_strength: float, num_iter: int) -> Array:
    """x with (H + lambda I) x = q, lambda = ridge_strength |H|_F, by `num_iter` steps of Chebyshev's iteration.

    H is positive semi-definite, so the eigenvalues of H + lambda I lie in [lambda, |H|_F + lambda]; the step is
    2 / (their sum) and the momentum follows from rho = (largest - smallest) / (largest + smallest).
    """
    norm = np.sqrt((H**2).sum())
    if norm == 0:
        return np.zeros_like(q)  # nothing was remembered, so nothing can be read
    ridge = ridge_strength * norm
    smallest, largest = ridge, norm + ridge
    step = 2 / (largest + smallest)
    rho = (largest - smallest) / (largest + smallest)
    before, x, omega = np.zeros_like(q), step * q, 2.0
    for _ in range(num_iter):
        omega = 1 / (1 - rho**2 * omega / 4)
        residual = q - H @ x - ridge * x
        before, x = x, omega * (x + step * residual) + (1 - omega) * before
    return x


def _log_decay(w: Weights, a: Array) -> Array:
    """g = -exp(A_log) softplus(a + dt_bias), (t, h): never positive."""
    return -np.exp(w["A_log"]) * softplus(a + w["dt_bias"])


def _project(
    ssm: SSM, w: Weights, u: Array, past: Any, convolved: str, activated: str
) -> tuple[Array, Array, Array, Any]:
    """q, k and v (t, h, p) after convolution, SiLU and the expansion to all heads, and the new convolution state."""
    size, t = delta_sizes(ssm), len(u)
    parts, pasts, start = [], [], 0
    for name, width in zip("qkv", size.widths, strict=True):
        x = u @ w[f"{name}_proj.weight"].T
        if name in convolved:
            bias = w[f"{name}_conv.bias"] if ssm.conv_bias else None
            x, kept = causal_conv(x, past[:, start : start + width], w[f"{name}_conv.weight"], bias)
            pasts.append(kept)
            start += width
        parts.append(silu(x) if name in activated else x)
    q, k, v = parts
    q = np.repeat(q.reshape(t, size.q_heads, -1), size.heads // size.q_heads, axis=1)
    k, v = (_expand(ssm, w, name, x) for name, x in (("k", k), ("v", v)))
    return q, k, v, np.concatenate(pasts, axis=-1) if pasts else ()


def _expand(ssm: SSM, w: Weights, name: str, x: Array) -> Array:
    """k or v (t, heads of its own * p) as (t, h, p): repeated, or mixed by k_rep or v_rep, plus a low-rank term."""
    size, t = delta_sizes(ssm), len(x)
    own = size.k_heads if name == "k" else size.v_heads
    heads = x.reshape(t, own, size.head_dim)
    repeated = np.repeat(heads, size.heads // own, axis=1)
    if not size.expands_kv:
        return repeated
    if ssm.kv_learnable_residual:
        repeated = np.einsum("hk,tkp->thp", w[f"{name}_rep"], heads)
    low_rank = silu(x @ w[f"proj_{name}.linearA.weight"].T) @ w[f"proj_{name}.linearB.weight"].T
    return repeated + low_rank.reshape(t, size.heads, size.head_dim)


def _read_out(ssm: SSM, w: Weights, u: Array, out: Array) -> Array:
    """RMSNorm per head, SiLU gate, output projection of out (t, h, p)."""
    y = rms_norm(out, w["o_norm.weight"], ssm.norm_eps)
    if ssm.use_gate:
        y = y * silu(u @ w["g_proj.weight"].T).reshape(y.shape)
    return y.reshape(len(u), -1) @ w["o_proj.weight"].T
