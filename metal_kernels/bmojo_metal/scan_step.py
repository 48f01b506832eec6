"""One token of a Mamba-1 block between its two large projections (arXiv 2312.00752, figure 3), in one dispatch.

b batch, d channels, n states of a channel, r rank of dt.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from bmojo_metal.conv import silu_conv
from bmojo_metal.launch import (
    FLOATS,
    Kernel,
    kernels_available,
    require_dtypes,
    require_shapes,
    rounded_up,
    with_gradient,
)
from bmojo_metal.linear import Linear, has_kernel, linear_wide, packing, require_linear
from bmojo_metal.scan import lanes_of, selective_scan

THREADS = 256
SHARES = 16  # threadgroups of a row at most: each multiplies by all of x_proj. Computed, not measured
TILE = 2048  # convolved channels in threadgroup memory at one time
SCRATCH = 8192  # floats of threadgroup memory: 32 KiB
ROWS = 8  # of a batch, beyond which x_proj is better read once for all

_STEP = Kernel(
    "selective_scan_step",
    (
        *("xz", "past", "state", "active", "conv_weight", "conv_bias", "x_weight", "x_scales", "x_offsets"),
        *("dt_weight", "dt_scales", "dt_offsets", "dt_bias", "dt_norm", "B_norm", "C_norm", "eps", "A_log", "D"),
        "share",
    ),
    ("y", "last", "new_state"),
    helpers=("linear_header", "selective_scan_step_header"),
)


class MambaWeights(NamedTuple):
    """The parameters of a Mamba-1 block but for its two large projections."""

    conv: mx.array  # (d, taps), oldest tap first
    conv_bias: mx.array | None  # (d,)
    x_proj: Linear  # to (r + 2 n) from (d)
    dt_proj: Linear  # to (d) from (r), with a bias
    norms: tuple[mx.array, mx.array, mx.array] | None  # of dt (r,), B and C (n,)
    eps: float  # of the norms
    A_log: mx.array  # (d, n)
    D: mx.array  # (d,)


def scan_inputs(x: mx.array, weights: MambaWeights) -> tuple[mx.array, mx.array, mx.array]:
    """dt (..., d), float32, before its softplus, B and C (..., n) of x (..., d)."""
    n = weights.A_log.shape[1]
    rank = weights.x_proj.weight.shape[0] - 2 * n
    parts = mx.split(weights.x_proj(x), [rank, rank + n], axis=-1)
    if weights.norms is not None:
        parts = [mx.fast.rms_norm(y, w, weights.eps) for y, w in zip(parts, weights.norms, strict=True)]
    dt, B, C = parts
    return linear_wide(dt, weights.dt_proj).wide, B, C


def selective_scan_step(
    xz: mx.array, past: mx.array, state: mx.array, weights: MambaWeights, active: mx.array | None = None
) -> tuple[mx.array, mx.array, mx.array]:
    """(C s + D x) SiLU(z), (b, d) in the dtype of xz, the inputs and the states that are remembered.

    xz (b, 2 d): what in_proj gives for one token; x is then convolved with past (b, taps - 1, d), goes through SiLU,
    makes dt, B and C, and moves state s (b, d, n) float32 as `selective_scan` says. active (b,) bool: rows that rest
    keep past and state bit for bit and give 0. Raises ValueError for shapes and dtypes that do not fit.

    Several dispatches where one does not serve: rows beyond ROWS, a convolution of one tap, weights of 3, 5 or 6 bits.
    """
    _check(xz, past, state, weights, active)
    if not kernels_available() or not _fits(len(xz), past.shape[1] + 1, weights):
        return _parts(xz, past, state, weights, active)
    arrays = _differentiable(weights)

    def given(*a: mx.array) -> tuple[mx.array, mx.array, mx.array, MambaWeights, mx.array | None]:
        return a[0], a[1], a[2], _replaced(weights, dict(zip(arrays, a[3:], strict=True))), active

    run = with_gradient(lambda *a: _metal(*given(*a)), lambda *a: _parts(*given(*a)))
    y, last, state = run(xz, past, state, *arrays.values())
    return y, last, state


def _differentiable(w: MambaWeights) -> dict[str, mx.array]:
    """All parameters by name but packed ones, which have no gradient."""
    named = {"conv": w.conv, "conv_bias": w.conv_bias, "A_log": w.A_log, "D": w.D}
    for name, linear in (("x_proj", w.x_proj), ("dt_proj", w.dt_proj)):
        named |= {f"{name}.bias": linear.bias, f"{name}.weight": None if linear.bits else linear.weight}
    named |= {f"norm.{i}": norm for i, norm in enumerate(w.norms or ())}
    return {name: array for name, array in named.items() if array is not None}


def _replaced(w: MambaWeights, arrays: dict[str, mx.array]) -> MambaWeights:
    """The weights with other arrays in place of `_differentiable` ones."""

    def linear(name: str, old: Linear) -> Linear:
        return old._replace(bias=arrays.get(f"{name}.bias"), weight=arrays.get(f"{name}.weight", old.weight))

    norms = None if w.norms is None else (arrays["norm.0"], arrays["norm.1"], arrays["norm.2"])
    return w._replace(
        conv=arrays["conv"],
        conv_bias=arrays.get("conv_bias"),
        x_proj=linear("x_proj", w.x_proj),
        dt_proj=linear("dt_proj", w.dt_proj),
        norms=norms,
        A_log=arrays["A_log"],
        D=arrays["D"],
    )


def _check(xz: mx.array, past: mx.array, state: mx.array, w: MambaWeights, active: mx.array | None) -> None:
    op = "selective_scan_step"
    if xz.ndim != 2 or w.A_log.ndim != 2 or w.conv.ndim != 2 or 0 in xz.shape:
        raise ValueError(
            f"{op}: xz must be (b, 2 d), conv (d, taps) and A_log (d, n), got {xz.shape}, {w.conv.shape} and "
            f"{w.A_log.shape}"
        )
    (d, n), b, taps = w.A_log.shape, len(xz), w.conv.shape[1]
    r = w.x_proj.weight.shape[0] - 2 * n
    if r < 1 or w.dt_proj.bias is None:
        raise ValueError(f"{op}: x_proj must have more than {2 * n} rows, for dt, B and C, and dt_proj a bias")
    shapes = {"xz": (xz, (b, 2 * d)), "past": (past, (b, taps - 1, d)), "state": (state, (b, d, n)), "D": (w.D, (d,))}
    shapes |= {"conv": (w.conv, (d, taps))}
    shapes |= {} if w.conv_bias is None else {"conv_bias": (w.conv_bias, (d,))}
    shapes |= {} if active is None else {"active": (active, (b,))}
    for name, norm, size in zip(("dt_norm", "B_norm", "C_norm"), w.norms or (), (r, n, n), strict=False):
        shapes[name] = (norm, (size,))
    require_shapes(op, **shapes)
    require_linear(op, "x_proj", w.x_proj, r + 2 * n, d)
    require_linear(op, "dt_proj", w.dt_proj, d, r)
    require_dtypes(op, FLOATS, xz=xz, conv=w.conv, A_log=w.A_log, D=w.D)
    require_dtypes(op, (xz.dtype,), past=past)
    require_dtypes(op, (mx.float32,), state=state)
    if active is not None:
        require_dtypes(op, (mx.bool_,), active=active)


def _fits(b: int, taps: int, w: MambaWeights) -> bool:
    """Whether one dispatch can take all of it."""
    fits = TILE + w.x_proj.weight.shape[0] <= SCRATCH
    return b <= ROWS and taps > 1 and fits and has_kernel(w.x_proj) and has_kernel(w.dt_proj) and w.x_proj.bias is None


def _metal(
    xz: mx.array, past: mx.array, state: mx.array, w: MambaWeights, active: mx.array | None
) -> tuple[mx.array, mx.array, mx.array]:
    (b, d, n), taps = state.shape, past.shape[1] + 1
    lanes = lanes_of(n)
    share = rounded_up(-(-d // SHARES), THREADS // lanes)
    (packed, x_proj), (dt_packed, dt_proj) = packing(w.x_proj), packing(w.dt_proj)
    norms = w.norms or (w.A_log,) * 3  # not read where there are none
    assert w.dt_proj.bias is not None
    y, last, new = _STEP(
        [
            *(xz, past, state, mx.array([True] * b) if active is None else active),
            *(w.conv, w.conv if w.conv_bias is None else w.conv_bias, *x_proj, *dt_proj, w.dt_proj.bias),
            *(*norms, mx.array(w.eps, mx.float32), w.A_log, w.D, share),
        ],
        [((b, d), xz.dtype), (past.shape, xz.dtype), (state.shape, mx.float32)],
        grid=(-(-d // share) * THREADS, b, 1),
        threadgroup=(THREADS, 1, 1),
        template=[
            *(("T", xz.dtype), ("N", n), ("LANES", lanes), ("R", w.x_proj.weight.shape[0] - 2 * n), ("TAPS", taps)),
            *(("TILE", TILE), ("NORMED", w.norms is not None), ("HAS_BIAS", w.conv_bias is not None)),
            *(*packed, *((f"DT_{name}", value) for name, value in dt_packed)),
        ],
    )
    return y, last, new


def _parts(
    xz: mx.array, past: mx.array, state: mx.array, w: MambaWeights, active: mx.array | None
) -> tuple[mx.array, mx.array, mx.array]:
    lengths = None if active is None else active.astype(mx.int32)
    x, z = mx.split(xz[:, None], 2, axis=-1)
    x, past = silu_conv(x, past, w.conv, w.conv_bias, lengths)
    dt, B, C = scan_inputs(x, w)
    y, state = selective_scan(x, dt, w.A_log, B, C, w.D, z, state, lengths)
    return y[:, 0], past, state
