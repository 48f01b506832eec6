"""Unrounded products, sums with norms and rotations of one token: kernels and plain ops against float64, errors."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from bmojo_metal import Linear, Rotary, add_rms_norm, linear_wide, rotate_token, use_kernels  # noqa: E402
from bmojo_metal.linear import VECTORS  # noqa: E402
from metal_kernels.host import ORDERS, Run  # noqa: E402
from metal_kernels.host.runtime import Order  # noqa: E402
from tests.helpers import to_numpy  # noqa: E402
from tests.metal import token_cases  # noqa: E402
from tests.metal.case import Case, kernels  # noqa: E402

CASES = token_cases.cases()


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_pass_the_checker_and_equal_the_oracle(case: Case, order: Order) -> None:
    case.verify(Run(mode="check", order=order, seed=5))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plain_ops_equal_the_oracle(case: Case) -> None:
    case.compare([to_numpy(x) for x in case.call()])


def random(*shape: int, dtype: Any = None) -> Any:
    return mx.random.normal(shape, key=mx.random.key(sum(shape))).astype(dtype or mx.float16)


def packed(weight: Any, bits: int) -> Linear:
    weight, scales, offsets = mx.quantize(weight, 32, bits)
    return Linear(weight, None, scales, offsets, 32, bits)


@pytest.mark.parametrize(
    ("x", "linear"),
    [
        (random(2, 32), Linear(random(5, 32, dtype=mx.float32))),  # MLX's own product needs no casts
        (random(VECTORS + 1, 32), Linear(random(5, 32))),
        (random(2, 3, 32), Linear(random(5, 32))),
        (random(2, 32), packed(random(5, 32), 5)),
    ],
    ids=["float32 weights", "many vectors", "many tokens", "5 bits"],
)
def test_what_is_left_to_mlx(x: Any, linear: Linear) -> None:
    want = linear_wide(x, linear)

    def refuse(**_: Any) -> Any:
        raise AssertionError("a kernel of ours was made")

    with patch.object(mx.fast, "metal_kernel", refuse), use_kernels(True):
        got = linear_wide(x, linear)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert mx.array_equal(a, b)


@pytest.mark.usefixtures("harness")
def test_gradients_are_those_of_the_plain_ops() -> None:
    at = Rotary(mx.full((1, 1, 1, 1, 4), 0.6), mx.concatenate([mx.full((1, 1, 1, 1, 4), s) for s in (-0.8, 0.8)], 3))

    def loss(h: Any, x: Any, weight: Any, matrix: Any) -> Any:
        total, normed = add_rms_norm(h, x, weight, 1e-5, mx.float32)
        wide, rounded = linear_wide(normed, Linear(matrix, total[0, :4].astype(matrix.dtype)))
        turned, same = rotate_token([rounded.reshape(1, 1, 1, 8), wide.reshape(1, 1, 1, 8)], [at, at])
        return (turned * turned * turned).sum() + (same * mx.arange(8)).sum() + (total * total).sum()

    given = random(2, 6, dtype=mx.float32), random(2, 6, dtype=mx.float32) * 2, mx.arange(6.0) + 1, random(4, 6)
    gradient = mx.grad(loss, argnums=(0, 1, 2, 3))
    want = gradient(*given)
    with kernels(Run(mode="fast")):
        got = gradient(*given)
    for a, b in zip(got, want, strict=True):
        assert np.abs(to_numpy(b)).max() > 0
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=2e-3, atol=1e-4)


@pytest.mark.usefixtures("harness")
def test_packed_weights_have_no_gradient_but_their_vectors_do() -> None:
    linear = packed(random(5, 32), 4)

    def loss(x: Any, bias: Any) -> Any:
        return linear_wide(x, linear._replace(bias=bias)).wide.square().sum()

    gradient = mx.grad(loss, argnums=(0, 1))
    want = gradient(random(2, 32), random(5))
    with kernels(Run(mode="fast")):
        got = gradient(random(2, 32), random(5))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(to_numpy(a), to_numpy(b), rtol=2e-3, atol=1e-3)


def test_wrong_arguments_are_named() -> None:
    x, matrix = mx.zeros((2, 6)), Linear(mx.zeros((4, 6)))
    with pytest.raises(ValueError, match=r"linear_wide: weight must have shape \(4, 5\), got \(4, 6\)"):
        linear_wide(x[:, :5], matrix)
    with pytest.raises(ValueError, match=r"linear_wide: weight.bias must have shape \(4,\), got \(6,\)"):
        linear_wide(x, matrix._replace(bias=mx.zeros(6)))
    with pytest.raises(ValueError, match=r"linear_wide: weight.scales must have shape \(4, 1\), got \(4, 2\)"):
        linear_wide(mx.zeros((2, 64)), packed(mx.zeros((4, 64)), 4)._replace(group_size=64))
    with pytest.raises(ValueError, match="linear_wide: x must be float32 or float16 or bfloat16, got int32"):
        linear_wide(x.astype(mx.int32), matrix)
    with pytest.raises(ValueError, match=r"add_rms_norm: x must have shape \(2, 6\), got \(2, 5\)"):
        add_rms_norm(x, x[:, :5], mx.ones(6), 1e-5, mx.float32)
    with pytest.raises(ValueError, match="add_rms_norm: x must be float32, got float16"):
        add_rms_norm(x, x.astype(mx.float16), mx.ones(6), 1e-5, mx.float32)
    with pytest.raises(ValueError, match=r"add_rms_norm: h must be \(b, d\)"):
        add_rms_norm(x[None], x[None], mx.ones(6), 1e-5, mx.float32)
    heads, at = mx.zeros((2, 3, 1, 4)), Rotary(mx.ones((2, 1, 1, 1, 2)), mx.ones((2, 1, 1, 2, 2)))
    with pytest.raises(ValueError, match=r"rotate_token: cos must have shape \(2, 1, 1, 1, 2\), got \(3, 1, 1, 1, 2\)"):
        rotate_token([heads], [at._replace(cos=mx.ones((3, 1, 1, 1, 2)))])
    with pytest.raises(ValueError, match="rotate_token: heads must be float32, got float16"):
        rotate_token([heads, heads.astype(mx.float16)], [at, at])
    with pytest.raises(ValueError, match="angles of each"):
        rotate_token([heads], [])
