"""A linear map of one vector a row whose result is also wanted unrounded, its weight read as it is stored.

MLX multiplies float32 by float32 only: it would cast a weight of 16 bits, or its scales, anew for every token.
b rows, k columns of the weight, n rows of it.
"""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from bmojo_metal.launch import (
    FLOATS,
    Kernel,
    kernels_available,
    require_dtypes,
    require_shapes,
    rounded_up,
    with_gradient,
)

VECTORS = 8  # rows beyond which a weight that is read once for all of them pays more than what is saved here
ROWS, GROUPS = 4, 4  # rows of the weight of a SIMD-group, SIMD-groups of a threadgroup; linear_wide.metal says the same
PACKED_BITS = (2, 4, 8)  # those of which a word holds a whole number

_LINEAR = Kernel(
    "linear_wide",
    ("x", "weight", "scales", "offsets", "bias"),
    ("wide", "rounded"),
    helpers=("linear_header",),
)


class Linear(NamedTuple):
    """The parameters of a linear map as they are stored: `offsets` is what MLX calls a quantised weight's biases."""

    weight: mx.array  # (n, k), or (n, k bits / 32) uint32
    bias: mx.array | None = None  # (n,)
    scales: mx.array | None = None  # (n, k / group_size)
    offsets: mx.array | None = None  # (n, k / group_size)
    group_size: int = 0
    bits: int = 0

    def __call__(self, x: mx.array) -> mx.array:
        """W x + bias, x (..., k), in the dtype that MLX makes of both."""
        if self.scales is not None:
            y = mx.quantized_matmul(
                x, self.weight, self.scales, self.offsets, True, group_size=self.group_size, bits=self.bits
            )
            return y if self.bias is None else y + self.bias
        return x @ self.weight.T if self.bias is None else mx.addmm(self.bias, x, self.weight.T)


class Unrounded(NamedTuple):
    """A result before and after it is rounded to the model's dtype."""

    wide: mx.array  # float32
    rounded: mx.array


def require_linear(op: str, name: str, linear: Linear, n: int, k: int) -> None:
    """The map must take (k,) to (n,)."""
    packed = (n, k * linear.bits // 32 if linear.bits else k)
    shapes: dict[str, tuple[mx.array, tuple[int, ...]]] = {name: (linear.weight, packed)}
    if linear.scales is not None and linear.offsets is not None:
        groups = (n, k // linear.group_size)
        shapes |= {f"{name}.scales": (linear.scales, groups), f"{name}.offsets": (linear.offsets, groups)}
    if linear.bias is not None:
        shapes[f"{name}.bias"] = linear.bias, (n,)
    require_shapes(op, **shapes)


def has_kernel(linear: Linear) -> bool:
    """Whether our kernels read this weight."""
    if linear.scales is not None:
        return linear.bits in PACKED_BITS and linear.offsets is not None
    return linear.weight.dtype in FLOATS


def linear_wide(x: mx.array, linear: Linear) -> Unrounded:
    """W x + bias, summed in float32, of x (..., k): (..., n) in float32 and in the dtype of x.

    Weights and scales of 32 bits are left to MLX. Raises ValueError for shapes and dtypes that do not fit.
    """
    require_dtypes("linear_wide", FLOATS, x=x)
    require_linear("linear_wide", "weight", linear, len(linear.weight), x.shape[-1])
    narrow = (linear.weight if linear.scales is None else linear.scales).dtype != mx.float32
    few = x.ndim == 2 and 0 < len(x) <= VECTORS
    if not (kernels_available() and narrow and few and has_kernel(linear)):
        return _plain(x, linear)
    # Quantised weights have no gradient.
    arrays = [x, *([] if linear.bias is None else [linear.bias]), *([] if linear.bits else [linear.weight])]

    def given(*arrays: mx.array) -> tuple[mx.array, Linear]:
        x, *rest = arrays
        bias = None if linear.bias is None else rest[0]
        return x, linear._replace(bias=bias, weight=linear.weight if linear.bits else rest[-1])

    # Where x is float32 both results are one array, which must not be differentiated twice.
    outputs = 1 if x.dtype == mx.float32 else 2
    run = with_gradient(lambda *a: tuple(_metal(*given(*a))[:outputs]), lambda *a: tuple(_plain(*given(*a))[:outputs]))
    out = run(*arrays)
    return Unrounded(out[0], out[-1])


def packing(linear: Linear) -> tuple[list[tuple[str, int]], list[mx.array]]:
    """What the helpers in linear_header.metal are told of a weight: their template and its three arrays."""
    if linear.scales is None or linear.offsets is None:
        return [("BITS", 0), ("GROUP", 1)], [linear.weight] * 3
    return [("BITS", linear.bits), ("GROUP", linear.group_size)], [linear.weight, linear.scales, linear.offsets]


def _metal(x: mx.array, linear: Linear) -> Unrounded:
    n, (template, weight) = linear.weight.shape[0], packing(linear)
    bias = linear.scales if linear.scales is not None else linear.weight  # not read where there is none
    wide, rounded = _LINEAR(
        [x, *weight, bias if linear.bias is None else linear.bias],
        [((len(x), n), mx.float32), ((len(x), n), x.dtype)],
        grid=(rounded_up(n, ROWS * GROUPS) // ROWS * 32, len(x), 1),
        threadgroup=(GROUPS * 32, 1, 1),
        template=[("T", x.dtype), *template, ("HAS_BIAS", linear.bias is not None)],
    )
    return Unrounded(wide, rounded)


def _plain(x: mx.array, linear: Linear) -> Unrounded:
    parts = {name: getattr(linear, name) for name in ("weight", "bias", "scales", "offsets")}
    casts = {name: part.astype(mx.float32) for name, part in parts.items() if part is not None and part.dtype in FLOATS}
    wide = linear._replace(**casts)(x.astype(mx.float32))
    return Unrounded(wide, wide.astype(x.dtype))
