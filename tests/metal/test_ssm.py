"""The convolution and the selective scan: the kernels against float64, against the plain op, their errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from bmojo_metal import selective_scan, selective_scan_step, silu_conv  # noqa: E402
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
    case.compare(case.call())


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


@pytest.mark.usefixtures("harness")
def test_resting_rows_keep_their_state_bit_for_bit() -> None:
    x, dt, A_log, B, C, D, z, state = ssm_cases.scan_arguments("float32", 2, 1, 5, 16)
    row = [y[:, 0] for y in (x, dt, B, C, z)]
    for run in (False, True):
        moves = mx.array([False, True])
        if run:
            with kernels(Run(mode="fast")):
                y, new = selective_scan_step(row[0], row[1], A_log, row[2], row[3], D, row[4], state, moves)
        else:
            y, new = selective_scan_step(row[0], row[1], A_log, row[2], row[3], D, row[4], state, moves)
        assert mx.array_equal(new[0], state[0])
        assert not mx.array_equal(new[1], state[1])
        assert mx.array_equal(y[0], mx.zeros_like(y[0]))


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
