"""Recurrences over matrix states, in chunks: decayed linear attention, the gated delta rule, Kalman's ridge regression.

Functions of tensors in float32 or wider, differentiable, on any device; nothing here knows a config or a parameter.
Equations: docs/mixers.md. A token with k = v = 0 (or beta = 0) and g = 0 leaves a state as it is: that is padding.

b batch, t tokens, h heads, n width of q and k, p width of v, m chunks of c tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK = 64  # tokens whose mutual scores exist at one time


def to_heads(x: Tensor, h: int) -> Tensor:
    """x (..., k, p) repeated to (..., h, p): head j reads x[..., j * k // h, :]."""
    return x if x.shape[-2] == h else x.repeat_interleave(h // x.shape[-2], dim=-2)


def _recomputed(function: Callable[..., tuple[Tensor, Tensor]], *inputs: Any) -> tuple[Tensor, Tensor]:
    """function(*inputs), whose intermediates backward computes again: they are many times as large as the inputs."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return function(*inputs)


class _Decays(NamedTuple):
    """Products of decays within chunks; zero across a reset. Sums of logarithms are never subtracted."""

    within: Tensor  # (b, h, m, c, c) from token j to token i >= j, else 0
    before: Tensor  # (b, h, m, c, 1) from the chunk's start to token i
    after: Tensor  # (b, h, m, c, 1) from token j to the chunk's end
    whole: Tensor  # (b, h, m, 1, 1) from the chunk's start to its end


def _decays(g: Tensor, reset: Tensor | None) -> _Decays:
    """From log decays g (b, h, m, c) and resets (b, 1, m, c): tokens before which the state is forgotten."""
    c = g.shape[-1]
    lower = torch.ones(c, c, dtype=torch.bool, device=g.device).tril()
    steps = g[..., None].expand(*g.shape, c).masked_fill(~lower.tril(-1), 0)
    within = steps.cumsum(-2).exp() * lower
    before = g.cumsum(-1).exp()
    if reset is not None:
        document = reset.cumsum(-1)
        within = within * (document[..., :, None] == document[..., None, :])
        before = before * (document == 0)
    return _Decays(within, before[..., None], within[..., -1, :, None], before[..., -1:, None])


def _split(x: Tensor, chunk: int) -> Tensor:
    """(b, t, h, ...) as (b, h, m, c, ...), zeros after the last token."""
    (b, t, h), c = x.shape[:3], min(chunk, x.shape[1])
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -t % c))
    return x.reshape(b, -1, c, h, *x.shape[3:]).movedim(3, 1)


def _join(x: Tensor, t: int) -> Tensor:
    """(b, h, m, c, p) as (b, t, h, p)."""
    return x.movedim(1, 3).flatten(1, 2)[:, :t]


def _split_reset(reset: Tensor | None, chunk: int) -> Tensor | None:
    return None if reset is None else _split(reset[..., None].long(), chunk)


def _pass_on(state: Tensor, whole: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """The state at the start of every chunk (b, h, m, p, n) and at the end, given what each chunk adds."""
    starts = [state]
    for whole_m, added_m in zip(whole.unbind(2), added.unbind(2), strict=True):
        starts.append(torch.addcmul(added_m, whole_m, starts[-1]))
    return torch.stack(starts[:-1], dim=2), starts[-1]


# --- linear attention: mamba2, and the values of gka ------------------------------------------------------------------


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, reset: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """S <- exp(g) S + v k^T, o = S q (arXiv 2405.21060, section 6): o (b, t, h, p) and the last S (b, h, p, n).

    q, k (b, t, h, n); v (b, t, h, p); g (b, t, h) never positive; reset (b, t): the state is forgotten before a token.
    """
    return _recomputed(_linear_attention, q, k, v, g, state, reset, chunk)


def _linear_attention(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, reset: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    t = q.shape[1]
    q, k, v, g = (_split(x, chunk) for x in (q, k, v, g))
    decay = _decays(g, _split_reset(reset, chunk))
    starts, state = _pass_on(state, decay.whole, (v * decay.after).mT @ k)
    o = ((q @ k.mT) * decay.within) @ v + (q * decay.before) @ starts.mT
    return _join(o, t), state


def linear_attention_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of `linear_attention`: q, k (b, h, n), v (b, h, p), g (b, h); o (b, h, p) and the new state."""
    state = torch.addcmul(v[..., None] * k[..., None, :], g.exp()[..., None, None], state)
    return (state @ q[..., None])[..., 0], state


# --- the gated delta rule: gdn ----------------------------------------------------------------------------------------


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    reset: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """S <- exp(g) S; S <- S + beta (v - S k) k^T; o = S q (arXiv 2412.06464, section 3.3).

    q, k (b, t, h, n); v (b, t, h, p); g, beta (b, t, h); reset (b, t): o (b, t, h, p) and the last S (b, h, p, n).
    What each token writes solves a triangular system within its chunk (the WY form):
    u_i = beta_i (v_i - decayed S k_i - sum over j < i of decayed (k_j k_i) u_j).
    """
    return _recomputed(_delta_rule, q, k, v, g, beta, state, reset, chunk)


def _delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, reset: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    t = q.shape[1]
    q, k, v, g, beta = (_split(x, chunk) for x in (q, k, v, g, beta[..., None]))
    decay = _decays(g, _split_reset(reset, chunk))
    system = ((k @ k.mT) * decay.within * beta).tril(-1)
    wanted = torch.cat([beta * v, beta * decay.before * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    from_values, from_state = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    starts, written = [], []
    for i in range(q.shape[2]):
        starts.append(state)
        written.append(from_values[:, :, i] - from_state[:, :, i] @ state.mT)
        added = (written[-1] * decay.after[:, :, i]).mT @ k[:, :, i]
        state = torch.addcmul(added, decay.whole[:, :, i], state)
    o = ((q @ k.mT) * decay.within) @ torch.stack(written, dim=2)
    return _join(o + (q * decay.before) @ torch.stack(starts, dim=2).mT, t), state


def delta_rule_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of `delta_rule`: q, k (b, h, n), v (b, h, p), g, beta (b, h); o (b, h, p) and the new state."""
    state = state * g.exp()[..., None, None]
    written = beta[..., None] * (v - (state @ k[..., None])[..., 0])
    state = torch.addcmul(state, written[..., None], k[..., None, :])
    return (state @ q[..., None])[..., 0], state


# --- ridge regression: the queries of gka -----------------------------------------------------------------------------


def ridge_queries(
    q: Tensor,
    k: Tensor,
    g: Tensor,
    state: Tensor,
    ridge_strength: float,
    num_iter: int,
    reset: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """H <- exp(g) H + k k^T; x solves (H + ridge_strength |H| I) x = q: x (b, t, h, n) and the last H (b, h, n, n).

    q, k (b, t, h, n); g (b, t, h); reset (b, t). H of a token is never formed: it is applied as its chunk's first H
    and the keys since. |H| is the Frobenius norm; `num_iter` steps of Chebyshev's iteration (arXiv 2511.21016).
    """
    return _recomputed(_ridge_queries, q, k, g, state, ridge_strength, num_iter, reset, chunk)


def _ridge_queries(
    q: Tensor,
    k: Tensor,
    g: Tensor,
    state: Tensor,
    ridge_strength: float,
    num_iter: int,
    reset: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    t = q.shape[1]
    q, k, g = (_split(x, chunk) for x in (q, k, g))
    decay = _decays(g, _split_reset(reset, chunk))
    starts, state = _pass_on(state, decay.whole, (k * decay.after).mT @ k)

    def apply(x: Tensor) -> Tensor:
        return ((x @ k.mT) * decay.within) @ k + (x * decay.before) @ starts

    products = (k @ k.mT).square()
    crossed = ((k @ starts) * k).sum(-1, keepdim=True)
    square = ((decay.within @ products) * decay.within).sum(-1, keepdim=True)
    square = square + 2 * decay.before * (decay.within @ crossed)
    square = square + decay.before.square() * starts.square().sum((-2, -1))[..., None, None]
    return _join(_chebyshev(apply, q, square, ridge_strength, num_iter), t), state


def ridge_queries_step(
    q: Tensor, k: Tensor, g: Tensor, state: Tensor, ridge_strength: float, num_iter: int
) -> tuple[Tensor, Tensor]:
    """One token of `ridge_queries`: q, k (b, h, n), g (b, h); x (b, h, n) and the new H."""
    state = torch.addcmul(k[..., None] * k[..., None, :], g.exp()[..., None, None], state)
    square = state.square().sum((-2, -1), keepdim=True)
    empty = square <= 0  # nothing was remembered, so nothing can be read
    inverse = square.masked_fill(empty, 1).rsqrt()
    # `_chebyshev` with everything that its steps have in common in one matrix: there are thirty steps a token.
    step, momenta = _schedule(ridge_strength, num_iter)
    one = torch.eye(state.shape[-1], dtype=state.dtype, device=state.device)
    matrix = (1 - step * ridge_strength) * one - (step * inverse) * state
    start = step * q[..., None]
    before, x = torch.zeros_like(start), start
    for omega in momenta:
        before, x = x, torch.lerp(before, start + matrix @ x, omega)
    return (inverse * x).masked_fill(empty, 0)[..., 0], state


def _schedule(ridge_strength: float, num_iter: int) -> tuple[float, list[float]]:
    """The length of a step and the momentum of each, for eigenvalues in [0, 1] shifted by `ridge_strength`."""
    rho, omega, momenta = 1 / (1 + 2 * ridge_strength), 2.0, []
    for _ in range(num_iter):
        omega = 1 / (1 - rho**2 * omega / 4)
        momenta.append(omega)
    return 2 * rho, momenta


def _chebyshev(
    apply: Callable[[Tensor], Tensor], q: Tensor, square: Tensor, ridge_strength: float, num_iter: int
) -> Tensor:
    """x (..., n) with H x + lambda x = q, given x -> H x and |H|^2 (..., 1), whose root bounds the eigenvalues of H.

    Works on |H| x: the eigenvalues of H / |H| lie in [0, 1], so that step and momentum are numbers known beforehand.
    """
    empty = square <= 0  # nothing was remembered, so nothing can be read
    inverse = square.masked_fill(empty, 1).rsqrt()
    step, momenta = _schedule(ridge_strength, num_iter)
    before, x = torch.zeros_like(q), step * q
    for omega in momenta:
        residual = q - inverse * apply(x) - ridge_strength * x
        before, x = x, omega * (x + step * residual) + (1 - omega) * before
    return (inverse * x).masked_fill(empty, 0)
