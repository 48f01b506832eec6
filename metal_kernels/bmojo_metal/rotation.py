"""Rotary positions: heads turned pair by pair, also several arrays of them in one dispatch.

b batch, n tokens, p head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from bmojo_metal.launch import FLOATS, Kernel, kernels_available, require_dtypes, require_shapes, with_gradient

TOGETHER = 5  # arrays of one dispatch: all that a layer with a fading path of its own rotates

_ROTATE = Kernel(
    "rotate",
    tuple(f"{name}{i}" for i in range(TOGETHER) for name in ("x", "cos", "sin")),
    ("turned",),
    helpers=("rotate_header",),
)


class Rotary(NamedTuple):
    """Cosine and sine of each pair's angle at some positions, as the two halves of a head need them."""

    cos: mx.array  # (b, 1, n, 1, p / 2) float32
    sin: mx.array  # (b, 1, n, 2, p / 2) float32: minus the sine, then the sine


def rotate(x: mx.array, at: Rotary | None, inverse: bool = False) -> mx.array:
    """Rotate the pairs (j, j + p/2) of x (b, heads, n, p), in float32, back to x's dtype; `at` None: as it is."""
    if at is None:
        return x
    halves = x.reshape(*x.shape[:-1], 2, -1)
    turned = halves[..., ::-1, :] * at.sin
    rotated = halves * at.cos - turned if inverse else halves * at.cos + turned
    return rotated.reshape(x.shape).astype(x.dtype)


def rotate_token(heads: Sequence[mx.array], at: Sequence[Rotary]) -> list[mx.array]:
    """`rotate` of each of some arrays (b, heads, 1, p), of one token, by the angles beside it, of 1 or b rows.

    Raises ValueError for shapes and dtypes that do not fit.
    """
    if not heads or len(heads) != len(at) or heads[0].ndim != 4 or heads[0].shape[3] % 2:
        raise ValueError(f"rotate_token: needs arrays (b, heads, 1, p), p even, and angles of each, got {len(heads)}")
    (b, _, _, p), dtype = heads[0].shape, heads[0].dtype
    for x, angles in zip(heads, at, strict=True):
        rows = b if angles.cos.shape[0] != 1 else 1
        require_shapes("rotate_token", heads=(x, (b, x.shape[1], 1, p)))
        require_shapes("rotate_token", cos=(angles.cos, (rows, 1, 1, 1, p // 2)))
        require_shapes("rotate_token", sin=(angles.sin, (rows, 1, 1, 2, p // 2)))
        require_dtypes("rotate_token", (dtype,) if dtype in FLOATS else FLOATS, heads=x)
        require_dtypes("rotate_token", (mx.float32,), cos=angles.cos, sin=angles.sin)
    if not kernels_available() or len(heads) > TOGETHER:
        return _plain(at, *heads)
    return list(with_gradient(lambda *x: _metal(at, *x), lambda *x: _plain(at, *x))(*heads))


def _metal(at: Sequence[Rotary], *heads: mx.array) -> list[mx.array]:
    p, dtype = heads[0].shape[3], heads[0].dtype
    unused = [(heads[0], at[0])] * (TOGETHER - len(heads))
    inputs = [y for x, angles in (*zip(heads, at, strict=True), *unused) for y in (x, *angles)]
    (turned,) = _ROTATE(
        inputs,
        [((sum(x.size for x in heads),), dtype)],
        grid=(p // 2, sum(x.size for x in heads) // p, 1),
        threadgroup=(min(p // 2, 32), 8, 1),
        template=[("T", dtype), ("P", p)],
    )
    ends = np.cumsum([0, *(x.size for x in heads)]).tolist()
    return [turned[a:b].reshape(x.shape) for x, (a, b) in zip(heads, pairwise(ends), strict=True)]


def _plain(at: Sequence[Rotary], *heads: mx.array) -> list[mx.array]:
    return [rotate(x, angles) for x, angles in zip(heads, at, strict=True)]
