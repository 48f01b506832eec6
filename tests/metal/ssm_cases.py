"""Cases of the convolution and the selective scan: every dtype, sizes that divide nothing, padding, views, chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

import bmojo_metal.scan
import bmojo_metal.scan_step
from bmojo_edge.reference_ssm import causal_conv, rms_norm, silu, softplus
from bmojo_metal import MambaWeights, selective_scan, selective_scan_step, silu_conv
from tests.metal.case import BOUNDS, DTYPES, Case, linear_of, rounded, to_mlx

DEFAULTS = {"SEQUENTIAL": bmojo_metal.scan.SEQUENTIAL}
SMALL = {"SEQUENTIAL": 4, "CHUNK": 3}


def conv(
    dtype: str = "float32",
    b: int = 2,
    t: int = 5,
    d: int = 7,
    taps: int = 4,
    bias: bool = True,
    lengths: list[int] | None = None,
) -> Case:
    rng = np.random.default_rng(t * d)
    wide, past, weight, shift = (
        rounded(rng.standard_normal(shape), dtype) for shape in ((b, t, 2 * d), (b, taps - 1, d), (d, taps), (d,))
    )
    x = wide[..., d:]  # what projections hand on is half of something wider
    y, last = np.zeros(x.shape), np.zeros(past.shape)
    for row, length in enumerate(lengths or [t] * b):
        out, _ = causal_conv(x[row], past[row], weight, shift if bias else None)
        y[row], last[row] = silu(out), causal_conv(x[row, :length], past[row], weight, None)[1]
    arguments = [to_mlx(wide, dtype)[..., d:], *(to_mlx(z, dtype) for z in (past, weight))]

    def call() -> Sequence[mx.array]:
        given = None if lengths is None else mx.array(lengths)
        return silu_conv(*arguments, bias=to_mlx(shift, dtype) if bias else None, lengths=given)

    name = f"conv {dtype} {b} x {t} x {d}, {taps} taps, bias {bias}, lengths {lengths}"
    return Case(name, ("conv",), call, [y, last], [BOUNDS[dtype], 0.0])


def scan(
    dtype: str = "float32",
    b: int = 2,
    t: int = 5,
    d: int = 7,
    n: int = 16,
    lengths: list[int] | None = None,
    sizes: dict[str, int] | None = None,
    scale: float = 1.0,
) -> Case:
    """`sizes`: constants of bmojo_metal.scan, small enough for few tokens to be many chunks."""
    x, dt, A_log, B, C, D, z, state = arrays = _scan_inputs(dtype, b, t, d, n, scale)
    y, last = np.zeros(x.shape), state.copy()
    for row, length in enumerate(lengths or [t] * b):
        y[row, :length], last[row] = _scan_oracle(
            x[row, :length], dt[row, :length], A_log, B[row, :length], C[row, :length], D, z[row, :length], state[row]
        )
    given = None if lengths is None else mx.array(lengths)

    def call() -> Sequence[mx.array]:
        with patch.dict(vars(bmojo_metal.scan), sizes or {}):
            return selective_scan(*_scan_arguments(dtype, arrays), lengths=given)

    kernels = ("scan",) if t <= (sizes or DEFAULTS)["SEQUENTIAL"] else ("scan", "scan_ends", "scan_starts")
    name = f"scan {dtype} {b} x {t} x {d}, {n} states, lengths {lengths}, sizes {sizes}"
    return Case(name, kernels, call, [y, last], [BOUNDS[dtype], BOUNDS["float32"]])


@dataclass(frozen=True)
class Block:
    """Sizes and options of the part of a Mamba-1 block that one token goes through in one dispatch.

    bits: of x_proj and dt_proj, 0 as they are; sizes: constants of bmojo_metal.scan_step.
    """

    dtype: str = "float32"
    b: int = 2
    d: int = 7
    n: int = 16
    r: int = 3
    taps: int = 4
    bias: bool = True
    normed: bool = False
    bits: int = 0
    active: tuple[bool, ...] | None = None
    sizes: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        changed = (f"{f.name} {getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default)
        return ", ".join(["step", *changed])


def step(block: Block) -> Case:
    """A token of `block` against float64."""
    rng = np.random.default_rng(block.d + block.n + block.r)
    b, d, n, r, dtype = block.b, block.d, block.n, block.r, block.dtype

    def array(*shape: int, scale: float = 1.0) -> np.ndarray:
        return rounded(scale * rng.standard_normal(shape), dtype)

    xz, past, conv, shift = array(b, 2 * d), array(b, block.taps - 1, d), array(d, block.taps), array(d)
    (x_weight, x_proj), (dt_weight, dt_proj) = (
        linear_of(array(*shape, scale=shape[1] ** -0.5), dtype, block.bits) for shape in ((r + 2 * n, d), (d, r))
    )
    dt_bias, D, state = (rounded(rng.standard_normal(shape), "float32") for shape in ((d,), (d,), (b, d, n)))
    dt_bias, A_log = dt_bias - 2, np.log(np.arange(1, n + 1)) + 0.1 * rng.standard_normal((d, n))
    dt_bias, A_log = rounded(dt_bias, "float32"), rounded(A_log, "float32")
    norms = (array(r), array(n), array(n)) if block.normed else None
    y, last, new = np.zeros((b, d)), past.copy(), state.copy()
    for row in range(b):
        if block.active is None or block.active[row]:
            out, last[row] = causal_conv(xz[row : row + 1, :d], past[row], conv, shift if block.bias else None)
            x = silu(out)
            low, B, C = np.split(x @ x_weight.T, [r, r + n], axis=-1)
            if norms is not None:
                low, B, C = (rms_norm(part, w, 1e-5) for part, w in zip((low, B, C), norms, strict=True))
            dt = low @ dt_weight.T + dt_bias
            y[row], new[row] = _scan_oracle(x, dt, A_log, B, C, D, xz[row : row + 1, d:], state[row])
    weights = MambaWeights(
        to_mlx(conv, dtype),
        to_mlx(shift, dtype) if block.bias else None,
        x_proj,
        dt_proj._replace(bias=to_mlx(dt_bias)),
        None if norms is None else (to_mlx(norms[0], dtype), to_mlx(norms[1], dtype), to_mlx(norms[2], dtype)),
        1e-5,
        to_mlx(A_log),
        to_mlx(D),
    )
    arrays = to_mlx(xz, dtype), to_mlx(past, dtype), to_mlx(state)
    moves = None if block.active is None else mx.array(block.active)

    def call() -> Sequence[mx.array]:
        with patch.dict(vars(bmojo_metal.scan_step), block.sizes):
            return selective_scan_step(*arrays, weights, moves)

    bodies = ("selective_scan_step", "selective_scan_step_header", "linear_header")
    bounds, plain = [BOUNDS[dtype], 0.0, BOUNDS[dtype]], 1.0 if dtype == "float32" else 8.0
    return Case(str(block), bodies, call, [y, last, new], bounds, plain)


def _scan_inputs(dtype: str, b: int, t: int, d: int, n: int, scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(t * d + n)
    x, B, C, z = (rounded(rng.standard_normal(shape), dtype) for shape in ((b, t, d), (b, t, n), (b, t, n), (b, t, d)))
    dt = rounded(scale * rng.standard_normal((b, t, d)) - 2, "float32")
    A_log = rounded(np.log(np.arange(1, n + 1)) + 0.1 * rng.standard_normal((d, n)), "float32")
    D, state = (rounded(rng.standard_normal(shape), "float32") for shape in ((d,), (b, d, n)))
    return [x, dt, A_log, B, C, D, z, state]


def scan_arguments(dtype: str, b: int, t: int, d: int, n: int) -> list[Any]:
    """Random arguments of `selective_scan`."""
    return _scan_arguments(dtype, _scan_inputs(dtype, b, t, d, n))


def _scan_arguments(dtype: str, arrays: Sequence[np.ndarray]) -> list[Any]:
    """As a mixer has them: x and z, B and C are halves of one array."""
    x, dt, A_log, B, C, D, z, state = arrays
    xz, BC = (to_mlx(np.concatenate(pair, axis=-1), dtype) for pair in ((x, z), (B, C)))
    x, z = mx.split(xz, 2, axis=-1)
    B, C = mx.split(BC, 2, axis=-1)
    return [x, to_mlx(dt), to_mlx(A_log), B, C, to_mlx(D), z, to_mlx(state)]


def _scan_oracle(
    x: np.ndarray,
    dt: np.ndarray,
    A_log: np.ndarray,
    B: np.ndarray,
    C: np.ndarray,
    D: np.ndarray,
    z: np.ndarray,
    s: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Of one row, token by token: y (t, d) and s (d, n)."""
    dt, A, y = softplus(dt), -np.exp(A_log), np.zeros(x.shape)
    for i in range(len(x)):
        s = np.exp(dt[i, :, None] * A) * s + (dt[i] * x[i])[:, None] * B[i]
        y[i] = (s @ C[i] + D * x[i]) * silu(z[i])
    return y, s


SMALL_TILES = (("TILE", 64), ("SHARES", 2))
BLOCKS = [
    *(Block(dtype=dtype) for dtype in DTYPES),
    *(Block(dtype=dtype, d=130, r=9, normed=True, sizes=SMALL_TILES) for dtype in DTYPES),
    *(Block(dtype=dtype, d=192, r=32, bits=4, sizes=SMALL_TILES) for dtype in DTYPES),
    Block(b=1, d=64, r=64, n=3, bits=8, normed=True),
    Block(b=1, d=96, r=32, n=6, bits=2, taps=3, bias=False),
    Block(b=1, d=1, n=1, r=1, taps=2),  # inputs of fewer than eight elements come in the constant address space
    Block(b=3, d=3, n=5, r=2, active=(True, False, True), normed=True),
    Block(b=1, d=300, n=40, r=33, taps=6, bias=False, sizes=(("TILE", 128),)),
    Block(b=1, d=5, n=130, r=4),
]


def cases() -> list[Case]:
    return [
        *(conv(dtype) for dtype in DTYPES),
        *(conv(dtype, lengths=[3, 0], taps=3) for dtype in DTYPES),
        conv(b=1, t=1, d=1, taps=2),  # inputs of fewer than eight elements come in the constant address space
        conv(b=3, t=1, d=300, bias=False, lengths=[1, 0, 1]),
        conv(b=1, t=2, d=3, taps=6),
        *(scan(dtype) for dtype in DTYPES),
        *(scan(dtype, b=3, t=14, d=9, lengths=[14, 4, 0], sizes=SMALL) for dtype in DTYPES),
        *(scan(b=1, t=3, d=5, n=n) for n in (1, 3, 6, 40, 130)),
        scan(b=1, t=1, d=1, n=2),
        scan(b=2, t=6, d=17, n=8, lengths=[6, 2]),
        scan(b=2, t=13, d=3, n=5, sizes={"SEQUENTIAL": 3, "CHUNK": 2, "LONGEST": 2}, lengths=[13, 5]),
        scan(b=1, t=9, d=2, n=3, scale=12.0, sizes=SMALL),  # steps from 1e-10 to 30
        *map(step, BLOCKS),
    ]
