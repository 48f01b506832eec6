"""Recurrences over matrix states, in chunks: decayed linear attention, the gated delta rule, Kalman's ridge regression.

Functions of float32 arrays; nothing here knows a config or a parameter. Equations: docs/mixers.md. A token with
k = v = 0 (or beta = 0) and g = 0 leaves a state as it is: that is padding.

b batch, t tokens, h heads, n width of q and k, p width of v, m chunks of c tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

CHUNK = 64  # tokens whose mutual scores exist at one time


def to_heads(x: mx.array, h: int) -> mx.array:
    """x (..., k, p) repeated to (..., h, p): head j reads x[..., j * k // h, :]."""
    return x if x.shape[-2] == h else mx.repeat(x, h // x.shape[-2], axis=-2)


class _Decays(NamedTuple):
    """Products of decays within chunks. Sums of logarithms are never subtracted."""

    within: mx.array  # (b, h, m, c, c) from token j to token i >= j, else 0
    before: mx.array  # (b, h, m, c, 1) from the chunk's start to token i
    after: mx.array  # (b, h, m, c, 1) from token j to the chunk's end
    whole: mx.array  # (b, h, m, 1, 1) from the chunk's start to its end


def _decays(g: mx.array) -> _Decays:
    """From log decays g (b, h, m, c)."""
    c = g.shape[-1]
    steps = g[..., None] * mx.tri(c, c, -1)
    within = mx.exp(mx.cumsum(steps, axis=-2)) * mx.tri(c, c)
    before = mx.exp(mx.cumsum(g, axis=-1))
    return _Decays(within, before[..., None], within[..., -1, :, None], before[..., -1:, None])


def _split(x: mx.array, chunk: int) -> mx.array:
    """(b, t, h, ...) as (b, h, m, c, ...), zeros after the last token."""
    (b, t, h), c = x.shape[:3], min(chunk, x.shape[1])
    x = mx.pad(x, [(0, 0), (0, -t % c)] + [(0, 0)] * (x.ndim - 2))
    return mx.moveaxis(x.reshape(b, -1, c, h, *x.shape[3:]), 3, 1)


def _join(x: mx.array, t: int) -> mx.array:
    """(b, h, m, c, p) as (b, t, h, p)."""
    return mx.moveaxis(x, 1, 3).flatten(1, 2)[:, :t]


def _transposed(x: mx.array) -> mx.array:
    return mx.swapaxes(x, -1, -2)


def _pass_on(state: mx.array, whole: mx.array, added: mx.array) -> tuple[mx.array, mx.array]:
    """The state at the start of every chunk (b, h, m, p, n) and at the end, given what each chunk adds."""
    starts = [state]
    for i in range(added.shape[2]):
        starts.append(whole[:, :, i] * starts[-1] + added[:, :, i])
    return mx.stack(starts[:-1], axis=2), starts[-1]


# --- linear attention: mamba2, and the values of gka ------------------------------------------------------------------


def linear_attention(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, state: mx.array, chunk: int = CHUNK
) -> tuple[mx.array, mx.array]:
    """S <- exp(g) S + v k^T, o = S q (arXiv 2405.21060, section 6): o (b, t, h, p) and the last S (b, h, p, n).

    q, k (b, t, h, n); v (b, t, h, p); g (b, t, h) never positive.
    """
    t = q.shape[1]
    q, k, v, g = (_split(x, chunk) for x in (q, k, v, g))
    decay = _decays(g)
    starts, state = _pass_on(state, decay.whole, _transposed(v * decay.after) @ k)
    o = ((q @ _transposed(k)) * decay.within) @ v + (q * decay.before) @ _transposed(starts)
    return _join(o, t), state


def linear_attention_step(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """One token of `linear_attention`: q, k (b, h, n), v (b, h, p), g (b, h); o (b, h, p) and the new state."""
    state = mx.exp(g)[..., None, None] * state + v[..., None] * k[..., None, :]
    return (state @ q[..., None])[..., 0], state


# --- the gated delta rule: gdn ----------------------------------------------------------------------------------------


def delta_rule(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array, chunk: int = CHUNK
) -> tuple[mx.array, mx.array]:
    """S <- exp(g) S; S <- S + beta (v - S k) k^T; o = S q (arXiv 2412.06464, section 3.3).

    q, k (b, t, h, n); v (b, t, h, p); g, beta (b, t, h): o (b, t, h, p) and the last S (b, h, p, n).
    MLX's own kernel on a GPU. Elsewhere it would go token by token, so chunks are solved here: what each token writes
    solves a triangular system within its chunk (the WY form),
    u_i = beta_i (v_i - decayed S k_i - sum over j < i of decayed (k_j k_i) u_j).
    """
    if mx.default_device() == mx.Device(mx.gpu):
        o, state = mx.fast.gated_delta_update(q, k, v, mx.exp(g), beta, state)
        return o, state
    t = q.shape[1]
    q, k, v, g, beta = (_split(x, chunk) for x in (q, k, v, g, beta[..., None]))
    decay = _decays(g)
    c = k.shape[-2]
    system = (k @ _transposed(k)) * decay.within * beta * mx.tri(c, c, -1) + mx.eye(c)
    solution = mx.linalg.tri_inv(system, stream=mx.cpu)
    from_values, from_state = solution @ (beta * v), solution @ (beta * decay.before * k)
    starts, written = [], []
    for i in range(q.shape[2]):
        starts.append(state)
        written.append(from_values[:, :, i] - from_state[:, :, i] @ _transposed(state))
        added = _transposed(written[-1] * decay.after[:, :, i]) @ k[:, :, i]
        state = decay.whole[:, :, i] * state + added
    o = ((q @ _transposed(k)) * decay.within) @ mx.stack(written, axis=2)
    return _join(o + (q * decay.before) @ _transposed(mx.stack(starts, axis=2)), t), state


def delta_rule_step(
    q: mx.array, k: mx.array, v: mx.array, g: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """One token of `delta_rule`: q, k (b, h, n), v (b, h, p), g, beta (b, h); o (b, h, p) and the new state."""
    state = mx.exp(g)[..., None, None] * state
    written = beta[..., None] * (v - (state @ k[..., None])[..., 0])
    state = state + written[..., None] * k[..., None, :]
    return (state @ q[..., None])[..., 0], state


# --- ridge regression: the queries of gka -----------------------------------------------------------------------------


def ridge_queries(
    q: mx.array,
    k: mx.array,
    g: mx.array,
    state: mx.array,
    ridge_strength: float,
    num_iter: int,
    chunk: int = CHUNK,
) -> tuple[mx.array, mx.array]:
    """H <- exp(g) H + k k^T; x solves (H + ridge_strength |H| I) x = q: x (b, t, h, n) and the last H (b, h, n, n).

    q, k (b, t, h, n); g (b, t, h). H of a token is never formed: it is applied as its chunk's first H and the keys
    since. |H| is the Frobenius norm; `num_iter` steps of Chebyshev's iteration (arXiv 2511.21016).
    """
    t = q.shape[1]
    q, k, g = (_split(x, chunk) for x in (q, k, g))
    decay = _decays(g)
    starts, state = _pass_on(state, decay.whole, _transposed(k * decay.after) @ k)

    def apply(x: mx.array) -> mx.array:
        return ((x @ _transposed(k)) * decay.within) @ k + (x * decay.before) @ starts

    products = mx.square(k @ _transposed(k))
    crossed = ((k @ starts) * k).sum(-1, keepdims=True)
    square = ((decay.within @ products) * decay.within).sum(-1, keepdims=True)
    square = square + 2 * decay.before * (decay.within @ crossed)
    square = square + mx.square(decay.before) * mx.square(starts).sum((-2, -1))[..., None, None]
    return _join(_chebyshev(apply, q, square, ridge_strength, num_iter), t), state


def ridge_queries_step(
    q: mx.array, k: mx.array, g: mx.array, state: mx.array, ridge_strength: float, num_iter: int
) -> tuple[mx.array, mx.array]:
    """One token of `ridge_queries`: q, k (b, h, n), g (b, h); x (b, h, n) and the new H."""
    state = mx.exp(g)[..., None, None] * state + k[..., None] * k[..., None, :]
    square = mx.square(state).sum((-2, -1), keepdims=True)
    empty = square <= 0  # nothing was remembered, so nothing can be read
    inverse = mx.rsqrt(mx.where(empty, 1, square))
    # `_chebyshev` with everything that its steps have in common in one matrix: there are thirty steps a token.
    step, momenta = _schedule(ridge_strength, num_iter)
    matrix = (1 - step * ridge_strength) * mx.eye(state.shape[-1]) - (step * inverse) * state
    start = step * q[..., None]
    before, x = mx.zeros_like(start), start
    for omega in momenta:
        before, x = x, before + omega * (mx.addmm(start, matrix, x) - before)
    return mx.where(empty, 0, inverse * x)[..., 0], state


def _schedule(ridge_strength: float, num_iter: int) -> tuple[float, list[float]]:
    """The length of a step and the momentum of each, for eigenvalues in [0, 1] shifted by `ridge_strength`."""
    rho, omega, momenta = 1 / (1 + 2 * ridge_strength), 2.0, []
    for _ in range(num_iter):
        omega = 1 / (1 - rho**2 * omega / 4)
        momenta.append(omega)
    return 2 * rho, momenta


def _chebyshev(
    apply: Callable[[mx.array], mx.array], q: mx.array, square: mx.array, ridge_strength: float, num_iter: int
) -> mx.array:
    """x (..., n) with H x + lambda x = q, given x -> H x and |H|^2 (..., 1), whose root bounds the eigenvalues of H.

    Works on |H| x: the eigenvalues of H / |H| lie in [0, 1], so that step and momentum are numbers known beforehand.
    """
    empty = square <= 0  # nothing was remembered, so nothing can be read
    inverse = mx.rsqrt(mx.where(empty, 1, square))
    step, momenta = _schedule(ridge_strength, num_iter)
    before, x = mx.zeros_like(q), step * q
    for omega in momenta:
        residual = q - inverse * apply(x) - ridge_strength * x
        before, x = x, omega * (x + step * residual) + (1 - omega) * before
    return mx.where(empty, 0, inverse * x)
