"""The short convolution before a state space, with its SiLU and the inputs it remembers.

b batch, t tokens of the call, d channels.
"""

from __future__ import annotations

import mlx.core as mx
from mlx import nn

from bmojo_metal.launch import (
    FLOATS,
    Kernel,
    contiguous,
    kernels_available,
    require_dtypes,
    require_shapes,
    with_gradient,
)

_CONV = Kernel("conv", ("x", "past", "weight", "bias", "lengths"), ("y", "last"), strided=True)


def silu_conv(
    x: mx.array, past: mx.array, weight: mx.array, bias: mx.array | None = None, lengths: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """SiLU of a depthwise causal convolution of x (b, t, d) after `past` (b, taps - 1, d), and the new past.

    weight (d, taps), oldest tap first; bias (d,); lengths (b,) int32: real tokens of each row, the rest is padding that
    the new past leaves out. Computed in float32, in the dtype of x. Raises ValueError for other shapes and dtypes.
    """
    require_dtypes("silu_conv", FLOATS, x=x, past=past, weight=weight)
    if x.ndim != 3 or weight.ndim != 2:
        raise ValueError(f"silu_conv: x must be (b, t, d) and weight (d, taps), got {x.shape} and {weight.shape}")
    (b, _, d), taps = x.shape, weight.shape[1]
    require_shapes("silu_conv", weight=(weight, (d, taps)), past=(past, (b, taps - 1, d)))
    if bias is not None:
        require_shapes("silu_conv", bias=(bias, (d,)))
    if lengths is not None:
        require_shapes("silu_conv", lengths=(lengths, (b,)))
    past = past.astype(x.dtype)
    arrays = (x, past, weight) if bias is None else (x, past, weight, bias)
    if not kernels_available() or taps == 1:  # one tap remembers nothing: a product that MLX does as well
        return _reference(lengths, *arrays)
    return with_gradient(lambda *a: _metal(lengths, *a), lambda *a: _reference(lengths, *a))(*arrays)


def _metal(
    lengths: mx.array | None, x: mx.array, past: mx.array, weight: mx.array, bias: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    (b, t, d), taps = x.shape, weight.shape[1]
    lengths = mx.array([t] * b, mx.int32) if lengths is None else lengths.astype(mx.int32)
    weight = contiguous(weight)
    unbiased = bias is None
    y, last = _CONV(
        [x, contiguous(past), weight, weight if bias is None else contiguous(bias), contiguous(lengths)],
        [(x.shape, x.dtype), (past.shape, x.dtype)],
        grid=(d, t, b),
        threadgroup=(min(d, 256), 1, 1),
        template=[("T", x.dtype), ("TAPS", taps), ("HAS_BIAS", not unbiased)],
    )
    return y, last


def _reference(
    lengths: mx.array | None, x: mx.array, past: mx.array, weight: mx.array, bias: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    t, taps = x.shape[1], weight.shape[1]
    padded = mx.concatenate([past, x], axis=1) if taps > 1 else x
    kernel = weight.astype(mx.float32)
    y = padded[:, :t] * kernel[:, 0]
    for j in range(1, taps):
        y = y + padded[:, j : j + t] * kernel[:, j]
    y = nn.silu(y if bias is None else y + bias.astype(mx.float32)).astype(x.dtype)
    if lengths is None or taps == 1:
        return y, padded[:, t:]
    index = lengths[:, None] + mx.arange(taps - 1)
    return y, mx.take_along_axis(padded, index[..., None], axis=1)
