"""The convolution and the selective scan: the kernels against float64, against the plain op, their errors."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from bmojo_metal import Linear, selective_scan, selective_scan_step, silu_conv  # noqa: E402
from bmojo_metal.launch import Kernel  # noqa: E402
from bmojo_metal.scan import lanes_of  # noqa: E402
from metal_kernels.host import ORDERS, Run  # noqa: E402
from metal_kernels.host.runtime import Order  # noqa: E402
from tests.metal import ssm_cases  # noqa: E402
from tests.metal.case import Case, kernels  # noqa: E402

CASES = ssm_cases.cases()


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_pass_the_checker_and_equal_the_oracle(case: Case, order: Order) -> None:
    case.verify(Run(mode="check", order=order, seed=5))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plain_ops_equal_the_oracle(case: Case) -> None:
    case.compare(case.call(), case.plain)


@pytest.mark.usefixtures("harness")
def test_a_prompt_of_several_chunks_in_real_sizes() -> None:
    case = ssm_cases.scan(b=1, t=300, d=5, lengths=[290])
    assert "scan_ends" in case.kernels
    case.verify(Run(mode="fast"))
    case.compare(case.call())


@pytest.mark.usefixtures("harness")
def test_every_split_of_a_short_prompt_gives_the_same_bits() -> None:
    x, dt, A_log, B, C, D, z, state = ssm_cases.scan_arguments("float16", 2, 9, 5, 16)
    with kernels(Run(mode="fast")):
        whole = selective_scan(x, dt, A_log, B, C, D, z, state)
        for cut in (1, 4, 8):
            parts = []
            after = state
            for part in (slice(0, cut), slice(cut, 9)):
                y, after = selective_scan(x[:, part], dt[:, part], A_log, B[:, part], C[:, part], D, z[:, part], after)
                parts.append(y)
            assert mx.array_equal(mx.concatenate(parts, axis=1), whole[0])
            assert mx.array_equal(after, whole[1])


def token_arguments(**options: Any) -> list[Any]:
    """Of `selective_scan_step`: xz, past, state, weights."""
    block = ssm_cases.Block(**options)
    with patch.object(ssm_cases, "selective_scan_step", lambda *a: a):
        return list(ssm_cases.step(block).call())


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("runs", [False, True], ids=["plain", "kernel"])
def test_resting_rows_keep_their_state_bit_for_bit(runs: bool) -> None:
    xz, past, state, weights, moves = token_arguments(active=(False, True))
    if runs:
        with kernels(Run(mode="fast")):
            y, last, new = selective_scan_step(xz, past, state, weights, moves)
            mx.eval(y, last, new)
    else:
        y, last, new = selective_scan_step(xz, past, state, weights, moves)
    assert mx.array_equal(new[0], state[0])
    assert not mx.array_equal(new[1], state[1])
    assert mx.array_equal(last[0], past[0])
    assert not mx.array_equal(last[1], past[1])
    assert mx.array_equal(y[0], mx.zeros_like(y[0]))


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(
    ("options", "bodies"),
    [
        ({}, {"selective_scan_step"}),
        ({"b": 9}, {"conv", "scan"}),
        ({"taps": 1}, {"scan"}),
        ({"d": 64, "bits": 5, "r": 32}, {"conv", "scan"}),
        ({"sizes": (("TILE", 8190),)}, {"conv", "scan"}),  # no room for dt, B and C beside the tile
    ],
    ids=["one dispatch", "many rows", "one tap", "5 bits", "a wide block"],
)
def test_a_token_takes_one_dispatch_where_that_serves(options: dict[str, Any], bodies: set[str]) -> None:
    case, ran = ssm_cases.step(ssm_cases.Block(**options)), set()
    launch = Kernel.__call__

    def counted(self: Kernel, *arguments: Any, **rest: Any) -> Any:
        ran.add(self.name)
        return launch(self, *arguments, **rest)

    with patch.object(Kernel, "__call__", counted):
        case.verify(Run(mode="fast"))
    assert ran == bodies


@pytest.mark.usefixtures("harness")
def test_gradients_of_a_token_are_those_of_the_plain_op() -> None:
    xz, past, state, weights, _ = token_arguments(normed=True)

    def loss(xz: Any, past: Any, state: Any, x_weight: Any, dt_weight: Any, norm: Any, A_log: Any) -> Any:
        assert weights.norms is not None
        changed = weights._replace(
            x_proj=Linear(x_weight),
            dt_proj=weights.dt_proj._replace(weight=dt_weight),
            norms=(norm, *weights.norms[1:]),
            A_log=A_log,
        )
        y, last, new = selective_scan_step(xz, past, state, changed)
        return (y * y).sum() + (new * new).sum() + last.sum()

    gradient = mx.grad(loss, argnums=tuple(range(7)))
    given = xz, past, state, weights.x_proj.weight, weights.dt_proj.weight, weights.norms[0], weights.A_log
    want = gradient(*given)
    with kernels(Run(mode="fast")):
        got = gradient(*given)
    for a, b in zip(got, want, strict=True):
        assert np.abs(np.array(b)).max() > 0
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=1e-4)


def test_wrong_arguments_of_a_token_are_named() -> None:
    xz, past, state, weights, _ = token_arguments(r=3, n=5)
    for change, message in (
        ({"D": mx.zeros(6)}, r"selective_scan_step: D must have shape \(7,\), got \(6,\)"),
        ({"conv": mx.zeros((7, 3))}, r"past must have shape \(2, 2, 7\), got \(2, 3, 7\)"),
        ({"x_proj": Linear(mx.zeros((13, 6)))}, r"x_proj must have shape \(13, 7\), got \(13, 6\)"),
        ({"x_proj": Linear(mx.zeros((10, 7)))}, "x_proj must have more than 10 rows"),
        ({"dt_proj": Linear(weights.dt_proj.weight)}, "and dt_proj a bias"),
        ({"norms": (mx.ones(5), mx.ones(5), mx.ones(5))}, r"dt_norm must have shape \(3,\), got \(5,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            selective_scan_step(xz, past, state, weights._replace(**change))
    with pytest.raises(ValueError, match="state must be float32, got float16"):
        selective_scan_step(xz, past, state.astype(mx.float16), weights)
    with pytest.raises(ValueError, match="past must be float32, got float16"):
        selective_scan_step(xz, past.astype(mx.float16), state, weights)
    with pytest.raises(ValueError, match=r"active must have shape \(2,\), got \(3,\)"):
        selective_scan_step(xz, past, state, weights, mx.array([True] * 3))


@pytest.mark.usefixtures("harness")
def test_gradients_are_those_of_the_plain_ops() -> None:
    arguments = ssm_cases.scan_arguments("float32", 2, 6, 3, 5)
    past, weight, bias = mx.ones((2, 2, 3)), mx.arange(9.0).reshape(3, 3) / 9, mx.zeros(3)

    def loss(x: Any, weight: Any, A_log: Any, state: Any) -> Any:
        active, last = silu_conv(x, past, weight, bias, mx.array([6, 4]))
        y, s = selective_scan(active, arguments[1], A_log, *arguments[3:7], state=state, lengths=mx.array([6, 4]))
        return (y * y).sum() + s.sum() + last.sum()

    gradient = mx.grad(loss, argnums=(0, 1, 2, 3))
    given = arguments[0], weight, arguments[2], arguments[7]
    want = gradient(*given)
    with kernels(Run(mode="fast")):
        got = gradient(*given)
    for a, b in zip(got, want, strict=True):
        assert np.abs(np.array(b)).max() > 0
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("n", "lanes"), [(1, 1), (4, 1), (5, 2), (8, 2), (16, 4), (17, 8), (64, 16), (128, 32), (500, 32)]
)
def test_lanes_of_a_channel(n: int, lanes: int) -> None:
    assert lanes_of(n) == lanes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"B": (2, 5, 15)}, r"selective_scan: B must have shape \(2, 5, 16\), got \(2, 5, 15\)"),
        ({"state": (2, 16, 7)}, r"selective_scan: state must have shape \(2, 7, 16\)"),
        ({"z": (2, 4, 7)}, r"selective_scan: z must have shape \(2, 5, 7\)"),
        ({"lengths": (3,)}, r"selective_scan: lengths must have shape \(2,\)"),
        ({"x": (2, 7)}, r"x must be \(b, t, d\)"),
    ],
)
def test_wrong_shapes_are_named(change: dict[str, tuple[int, ...]], message: str) -> None:
    names = ("x", "dt", "A_log", "B", "C", "D", "z", "state")
    given: dict[str, Any] = dict(zip(names, ssm_cases.scan_arguments("float32", 2, 5, 7, 16), strict=True))
    given |= {name: mx.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**given)


def test_wrong_dtypes_are_named() -> None:
    arguments = ssm_cases.scan_arguments("float32", 2, 5, 7, 16)
    with pytest.raises(ValueError, match="state must be float32, got float16"):
        selective_scan(*arguments[:7], state=arguments[7].astype(mx.float16))
    with pytest.raises(ValueError, match="x must be float32 or float16 or bfloat16, got int32"):
        selective_scan(arguments[0].astype(mx.int32), *arguments[1:])
    with pytest.raises(ValueError, match=r"silu_conv: past must have shape \(2, 3, 7\)"):
        silu_conv(arguments[0], mx.zeros((2, 2, 7)), mx.zeros((7, 4)))
