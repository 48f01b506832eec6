"""Innovation, the eidetic choice and its slots: the kernels and the plain ops against the oracle, their errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from bmojo_metal import innovation_scores, select_eidetic  # noqa: E402
from metal_kernels.host import ORDERS, Run  # noqa: E402
from metal_kernels.host.runtime import Order  # noqa: E402
from tests.metal import selection_cases  # noqa: E402
from tests.metal.case import Case, kernels  # noqa: E402

CASES = selection_cases.cases()


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_pass_the_checker_and_equal_the_oracle(case: Case, order: Order) -> None:
    case.verify(Run(mode="check", order=order, seed=5))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_plain_ops_equal_the_oracle(case: Case) -> None:
    case.compare([np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x) for x in case.call()])


@pytest.mark.usefixtures("harness")
def test_odd_scores_are_chosen_alike() -> None:
    """Infinite, subnormal, tiny and not-a-number scores; a negative one is never chosen."""
    scores = mx.array([[0.0, 1e-45, math.inf, -1.0, 3e38, math.nan, 1e-38, 0.0, 2.0, 2.0, math.inf]])
    position, limits = mx.arange(11)[None].astype(mx.int64), mx.array([[11, 4]], mx.int64)
    for e in range(1, 13):
        want = select_eidetic(scores, position, limits, 0, e)
        with kernels(Run(mode="check")):
            got = select_eidetic(scores, position, limits, 0, e)
        assert mx.array_equal(got, want), e
        assert 3 not in np.array(got)


@pytest.mark.usefixtures("harness")
def test_gradients_of_innovation_are_those_of_the_plain_op() -> None:
    signal, past = mx.random.normal((2, 4, 9), key=mx.random.key(1)), mx.ones((2, 2, 9))
    gradient = mx.grad(lambda s, p: innovation_scores(s, p, [0.7, 0.2], "relative")[0].sum(), argnums=(0, 1))
    want = gradient(signal, past)
    with kernels(Run(mode="fast")):
        got = gradient(signal, past)
    for a, b in zip(got, want, strict=True):
        assert np.abs(np.array(b)).max() > 0
        np.testing.assert_allclose(np.array(a), np.array(b), rtol=1e-5, atol=1e-6)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"innovation_scores: past must have shape \(2, 3, 5\), got \(2, 2, 5\)"):
        innovation_scores(mx.zeros((2, 4, 5)), mx.zeros((2, 2, 5)), [0.1, 0.2, 0.3], "l2")
    with pytest.raises(ValueError, match="error must be 'relative' or 'l2', got 'L2'"):
        innovation_scores(mx.zeros((2, 4, 5)), mx.zeros((2, 1, 5)), [0.1], "L2")
    with pytest.raises(ValueError, match="signal must be float32, got float16"):
        innovation_scores(mx.zeros((2, 4, 5), mx.float16), mx.zeros((2, 1, 5)), [0.1], "l2")
    scores, position = mx.zeros((2, 4)), mx.zeros((2, 4), mx.int64)
    with pytest.raises(ValueError, match="position must be int64, got int32"):
        select_eidetic(scores, position.astype(mx.int32), mx.zeros((2, 1), mx.int64), 0, 3)
    with pytest.raises(ValueError, match=r"limits must have shape \(2, 1\), got \(3, 1\)"):
        select_eidetic(scores, position, mx.zeros((3, 1), mx.int64), 0, 3)
    with pytest.raises(ValueError, match="nothing to choose: 0 of 4 candidates"):
        select_eidetic(scores, position, mx.zeros((2, 1), mx.int64), 0, 0)
