"""The selective scan of Mamba-1 with its softplus, skip and gate (arXiv 2312.00752, algorithm 2).

b batch, t tokens of the call, d channels, n states of a channel.

A SIMD-group holds 8 channels of 16 states, 4 states a lane. Prompts of more than SEQUENTIAL tokens take three passes:
chunks find what they add, side by side; states are passed on from chunk to chunk; chunks run again from their states.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from bmojo_metal.launch import (
    FLOATS,
    SIMD,
    Kernel,
    contiguous,
    kernels_available,
    require_dtypes,
    require_shapes,
    rounded_up,
    with_gradient,
)

STATES = 4  # of a lane, where a SIMD-group's lanes suffice
SEQUENTIAL = 256  # tokens up to which one pass is faster than three
CHUNK = 128  # tokens of a chunk in three passes
LONGEST = 2048  # turns of any loop within one dispatch: the watchdog of a GPU ends what takes too long
CHUNK_STEPS = 16  # of the reference: tokens of a chunk; chunks advance together, then pass their states on
CHUNK_TOKENS = 256  # of the reference: tokens whose decays exist at one time

_SCAN = Kernel(
    "scan",
    ("x", "dt", "A_log", "B", "C", "D", "z", "starts", "lengths", "chunk_size"),
    ("y", "last"),
    strided=True,
)
_ENDS = Kernel("scan_ends", ("x", "dt", "A_log", "B", "lengths", "chunk_size"), ("ends", "sums"), strided=True)
_STARTS = Kernel("scan_starts", ("A_log", "state", "ends", "sums", "chunks"), ("starts",))


def selective_scan(
    x: mx.array,
    dt: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    z: mx.array,
    state: mx.array,
    lengths: mx.array | None = None,
) -> tuple[mx.array, mx.array]:
    """(C s + D x) SiLU(z), (b, t, d) in the dtype of z, and the last s, where s <- exp(dt A) s + dt B x.

    x, z (b, t, d); dt (b, t, d) before its softplus; A = -exp(A_log) (d, n); B, C (b, t, n); D (d,); state s (b, d, n)
    float32. lengths (b,) int32: a row's tokens after so many leave its state alone and are 0. Arithmetic is float32.
    Raises ValueError for other shapes and dtypes.
    """
    _check("selective_scan", x, dt, A_log, B, C, D, z, state)
    if lengths is not None:
        require_shapes("selective_scan", lengths=(lengths, (len(x),)))
    if not kernels_available():
        return _reference(lengths, x, dt, A_log, B, C, D, z, state)
    run = with_gradient(lambda *a: _metal(lengths, *a), lambda *a: _reference(lengths, *a))
    return run(x, dt, A_log, B, C, D, z, state)


def _check(
    op: str,
    x: mx.array,
    dt: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    z: mx.array,
    state: mx.array,
) -> None:
    if x.ndim != 3 or A_log.ndim != 2:
        raise ValueError(f"{op}: x must be (b, t, d) and A_log (d, n), got {x.shape} and {A_log.shape}")
    (b, t, d), n = x.shape, A_log.shape[1]
    require_shapes(
        op,
        dt=(dt, x.shape),
        z=(z, x.shape),
        A_log=(A_log, (d, n)),
        B=(B, (b, t, n)),
        C=(C, (b, t, n)),
        D=(D, (d,)),
        state=(state, (b, d, n)),
    )
    require_dtypes(op, FLOATS, x=x, dt=dt, A_log=A_log, B=B, C=C, D=D, z=z)
    require_dtypes(op, (mx.float32,), state=state)
    if 0 in x.shape or n == 0:
        raise ValueError(f"{op}: nothing to scan: x has shape {x.shape} and A_log {A_log.shape}")


# --- Metal ------------------------------------------------------------------------------------------------------------


def lanes_of(n: int) -> int:
    """Lanes that share a channel of n states: a power of two."""
    return min(SIMD, 1 << max(0, -(-n // STATES) - 1).bit_length())


def _metal(
    lengths: mx.array | None,
    x: mx.array,
    dt: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    z: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    (b, t, _), out = x.shape, []
    lengths = mx.array([t] * b, mx.int32) if lengths is None else lengths.astype(mx.int32)
    A_log, D, state = (contiguous(y) for y in (A_log, D, state))
    for begin in range(0, t, CHUNK * LONGEST):
        part = slice(begin, begin + CHUNK * LONGEST)
        seen = contiguous(lengths - begin if begin else lengths)
        y, state = _part(x[:, part], dt[:, part], A_log, B[:, part], C[:, part], D, z[:, part], state, seen)
        out.append(y)
    return out[0] if len(out) == 1 else mx.concatenate(out, axis=1), state


def _part(
    x: mx.array,
    dt: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    z: mx.array,
    state: mx.array,
    lengths: mx.array,
) -> tuple[mx.array, mx.array]:
    """As many tokens as one set of dispatches takes."""
    (b, t, d), n = x.shape, A_log.shape[1]
    lanes = lanes_of(n)
    sizes = [("N", n), ("LANES", lanes)]
    width, group = rounded_up(d * lanes, SIMD), (2 * SIMD, 1, 1)
    chunk, chunks, starts = t, 1, state
    if t > SEQUENTIAL:
        chunk, chunks = CHUNK, -(-t // CHUNK)
        ends, sums = _ENDS(
            [x, dt, A_log, B, lengths, chunk],
            [((b, chunks - 1, d, n), mx.float32), ((b, chunks - 1, d), mx.float32)],
            grid=(width, chunks - 1, b),
            threadgroup=group,
            template=sizes,
        )
        (starts,) = _STARTS(
            [A_log, state, ends, sums, chunks],
            [((b, chunks, d, n), mx.float32)],
            grid=(d * n, b, 1),
            threadgroup=(min(d * n, 256), 1, 1),
            template=sizes[:1],
        )
    y, last = _SCAN(
        [x, dt, A_log, B, C, D, z, starts, lengths, chunk],
        [(x.shape, z.dtype), (state.shape, mx.float32)],
        grid=(width, chunks, b),
        threadgroup=group,
        template=[("T", z.dtype), *sizes],
    )
    return y, last


# --- plain MLX --------------------------------------------------------------------------------------------------------


def _reference(
    lengths: mx.array | None,
    x: mx.array,
    dt: mx.array,
    A_log: mx.array,
    B: mx.array,
    C: mx.array,
    D: mx.array,
    z: mx.array,
    state: mx.array,
) -> tuple[mx.array, mx.array]:
    t, (wide, dt, B, C, D, gate) = x.shape[1], (y.astype(mx.float32) for y in (x, dt, B, C, D, z))
    real = None if lengths is None else (mx.arange(t) < lengths[:, None])[..., None]
    dt, A, before = nn.softplus(dt), -mx.exp(A_log.astype(mx.float32)), state
    dt = dt if real is None else mx.where(real, dt, 0.0)  # a step of zero changes nothing
    if t == 1:
        state = mx.exp(dt[:, 0, :, None] * A) * state + (dt * wide)[:, 0, :, None] * B
        y = (state @ C[:, 0, :, None])[:, None, :, 0]
        state = state if lengths is None else mx.where((lengths > 0)[:, None, None], state, before)
    else:
        parts = []
        for begin in range(0, t, CHUNK_TOKENS):
            part = slice(begin, begin + CHUNK_TOKENS)
            y, state = _scan_tokens(wide[:, part], dt[:, part], A, B[:, part], C[:, part], state)
            parts.append(y)
        y = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
    y = ((y + wide * D) * nn.silu(gate)).astype(z.dtype)
    return y if real is None else mx.where(real, y, mx.array(0, y.dtype)), state


def _scan_tokens(
    x: mx.array, dt: mx.array, A: mx.array, B: mx.array, C: mx.array, s: mx.array
) -> tuple[mx.array, mx.array]:
    """At most CHUNK_TOKENS tokens without skip and gate. Decays are multiplied, never divided by: no overflow."""
    (b, t, d), n = x.shape, A.shape[1]
    q = min(CHUNK_STEPS, t)
    m = -(-t // q)
    if m * q > t:  # steps of size zero change nothing
        x, dt, B, C = (mx.pad(y, [(0, 0), (0, m * q - t), (0, 0)]) for y in (x, dt, B, C))
    decay = mx.exp(dt[..., None] * A).reshape(b, m, q, d, n)
    added = ((dt * x)[..., None] * B[:, :, None]).reshape(b, m, q, d, n)
    reads = C.reshape(b, m, q, n, 1)
    starts = s[:, None]
    if m > 1:
        ends = added[:, :-1, 0]
        for j in range(1, q):
            ends = decay[:, :-1, j] * ends + added[:, :-1, j]
        kept = mx.exp(dt.reshape(b, m, q, d)[:, :-1].sum(2)[..., None] * A)  # (b, m - 1, d, n)
        passed = [s]
        for j in range(m - 1):
            passed.append(kept[:, j] * passed[-1] + ends[:, j])
        starts = mx.stack(passed, axis=1)
    states, out = starts, []
    for j in range(q):
        states = decay[:, :, j] * states + added[:, :, j]
        out.append((states @ reads[:, :, j])[..., 0])  # (b, m, d)
    return mx.stack(out, axis=2).reshape(b, m * q, d)[:, :t], states[:, -1]
