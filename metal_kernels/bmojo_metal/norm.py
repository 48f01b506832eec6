"""The residual sum and the norm after it. b rows, d channels."""

from __future__ import annotations

import mlx.core as mx

from bmojo_metal.launch import (
    FLOATS,
    SIMD,
    Kernel,
    kernels_available,
    require_dtypes,
    require_shapes,
    rounded_up,
    with_gradient,
)

MOST_GROUPS, EACH = 16, 4  # SIMD-groups of a threadgroup, and numbers of a thread before there are more of them

_ADD_NORM = Kernel("add_rms_norm", ("h", "x", "weight", "eps"), ("sum", "normed"))


def add_rms_norm(h: mx.array, x: mx.array, weight: mx.array, eps: float, dtype: mx.Dtype) -> tuple[mx.array, mx.array]:
    """h + x, and of that, as rounded, v / sqrt(mean(v^2) + eps) * weight in `dtype`; h, x (b, d), weight (d,).

    Raises ValueError for other shapes, and for dtypes of h and x that differ.
    """
    if h.ndim != 2 or 0 in h.shape:
        raise ValueError(f"add_rms_norm: h must be (b, d), none of them 0, got {h.shape}")
    require_shapes("add_rms_norm", x=(x, h.shape), weight=(weight, h.shape[1:]))
    require_dtypes("add_rms_norm", FLOATS, h=h, weight=weight)
    require_dtypes("add_rms_norm", (h.dtype,), x=x)
    if not kernels_available():
        return _plain(eps, dtype, h, x, weight)
    return with_gradient(lambda *a: _metal(eps, dtype, *a), lambda *a: _plain(eps, dtype, *a))(h, x, weight)


def _metal(eps: float, dtype: mx.Dtype, h: mx.array, x: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
    groups = min(MOST_GROUPS, rounded_up(h.shape[1], EACH * SIMD) // (EACH * SIMD))
    total, normed = _ADD_NORM(
        [h, x, weight, mx.array(eps, mx.float32)],
        [(h.shape, h.dtype), (h.shape, dtype)],
        grid=(groups * SIMD, len(h), 1),
        threadgroup=(groups * SIMD, 1, 1),
        template=[("T", h.dtype), ("O", dtype), ("GROUPS", groups)],
    )
    return total, normed


def _plain(eps: float, dtype: mx.Dtype, h: mx.array, x: mx.array, weight: mx.array) -> tuple[mx.array, mx.array]:
    total = h + x
    return total, mx.fast.rms_norm(total.astype(dtype), weight, eps)
