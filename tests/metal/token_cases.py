"""Cases of what one token needs besides its mixers' kernels: products left unrounded, sums with norms, rotations."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from bmojo_edge.reference_ssm import rms_norm
from bmojo_metal import Rotary, add_rms_norm, linear_wide, rotate_token
from tests.metal.case import BOUNDS, DTYPES, Case, linear_of, rounded, to_mlx

HALVES = DTYPES[1:]


def linear(
    dtype: str = "float16", b: int = 2, k: int = 37, n: int = 21, bits: int = 0, bias: bool = True, stored: str = ""
) -> Case:
    """stored: the dtype of the weight or of its scales, where it is not that of x."""
    rng = np.random.default_rng(k * n + bits)
    kind = stored or dtype
    x, weight = rounded(rng.standard_normal((b, k)), dtype), rounded(rng.standard_normal((n, k)), kind)
    weight, stored_weight = linear_of(weight, kind, bits)
    shift = rounded(rng.standard_normal(n), kind) if bias else np.zeros(n)
    want = x @ weight.T + shift

    def call() -> Sequence[mx.array]:
        return linear_wide(to_mlx(x, dtype), stored_weight._replace(bias=to_mlx(shift, kind) if bias else None))

    name = f"linear {dtype} {b} x {k} to {n}, {bits or 'no'} bits, bias {bias}, stored {kind}"
    return Case(name, ("linear_wide", "linear_header"), call, [want, want], [BOUNDS["float32"], BOUNDS[dtype]])


def add_norm(dtype: str = "float32", b: int = 2, d: int = 37, out: str = "") -> Case:
    """out: the dtype of the norm, where it is not that of h."""
    rng = np.random.default_rng(d)
    h, x, weight = (rounded(rng.standard_normal(shape), dtype) for shape in ((b, d), (b, d), (d,)))
    total = rounded(h + x, dtype)

    def call() -> Sequence[mx.array]:
        return add_rms_norm(to_mlx(h, dtype), to_mlx(x, dtype), to_mlx(weight, dtype), 1e-5, getattr(mx, out or dtype))

    name = f"add norm {dtype} {b} x {d} to {out or dtype}"
    return Case(
        name,
        ("add_rms_norm",),
        call,
        [total, rms_norm(total, weight, 1e-5)],
        [BOUNDS["float32"] if dtype == "float32" else 0.0, BOUNDS[out or dtype]],
    )


def rotation(
    dtype: str = "float32",
    b: int = 2,
    p: int = 6,
    heads: Sequence[int] = (3, 1, 3, 1, 2),
    shared: Sequence[bool] = (False, False, True, False, True),
) -> Case:
    """shared: whether all rows have the angles of one."""
    rng = np.random.default_rng(p + sum(heads))
    arrays = [rounded(rng.standard_normal((b, h, 1, p)), dtype) for h in heads]
    angles = [rng.uniform(0, 6.3, (1 if one else b, p // 2)) for one in shared]
    want, at = [], []
    for x, angle in zip(arrays, angles, strict=True):
        cos, sin = (rounded(y, "float32") for y in (np.cos(angle), np.sin(angle)))
        a, z = np.split(x, 2, axis=-1)
        c, s = cos[:, None, None], sin[:, None, None]
        want.append(np.concatenate([a * c - z * s, z * c + a * s], axis=-1))
        both = np.stack([-sin, sin], axis=1)[:, None, None]
        at.append(Rotary(to_mlx(cos[:, None, None, None]), to_mlx(both)))

    def call() -> Sequence[mx.array]:
        return rotate_token([to_mlx(x, dtype) for x in arrays], at)

    name = f"rotate {dtype} {b} x {heads} heads of {p}, shared {shared}"
    return Case(name, ("rotate", "rotate_header"), call, want, [BOUNDS[dtype]] * len(heads))


def cases() -> list[Case]:
    return [
        *(linear(dtype) for dtype in HALVES),
        *(linear("float32", stored=kind) for kind in HALVES),
        *(linear(dtype, k=96, n=40, bits=bits) for dtype in HALVES for bits in (2, 4, 8)),
        *(linear("float32", k=64, bits=4, stored=kind, bias=False) for kind in HALVES),
        linear(b=1, k=1, n=1),  # inputs of fewer than eight elements come in the constant address space
        linear(b=1, k=7, n=1, bias=False),
        linear(b=8, k=300, n=3, bias=False),
        linear(b=1, k=256, n=70, bits=8, bias=False),
        *(add_norm(dtype) for dtype in DTYPES),
        *(add_norm(dtype, b=3, d=150, out="float32") for dtype in HALVES),
        add_norm(b=1, d=1),
        add_norm("float16", b=1, d=2100),
        *(rotation(dtype) for dtype in DTYPES),
        rotation(b=1, p=2, heads=(1,), shared=(True,)),
        rotation(b=3, p=70, heads=(5, 2), shared=(False, True)),
        rotation("float16", b=1, p=128, heads=(9, 3, 9, 3), shared=(False, False, True, False)),
    ]
