"""Every case of every kernel on an Apple GPU, by Apple's compiler: `pytest -m metal`. Its authors have not run it."""

from __future__ import annotations

import pytest

mx = pytest.importorskip("mlx.core")

from bmojo_metal import use_kernels  # noqa: E402
from tests.metal import attention_cases, selection_cases, ssm_cases, token_cases  # noqa: E402
from tests.metal.case import Case  # noqa: E402

pytestmark = [
    pytest.mark.metal,
    pytest.mark.skipif(not mx.metal.is_available(), reason="MLX has no Apple GPU here"),
]

CASES = [*ssm_cases.cases(), *token_cases.cases(), *selection_cases.cases(), *attention_cases.cases()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_equal_the_oracle_on_the_device(case: Case) -> None:
    with use_kernels(True):
        outputs = list(case.call())
        mx.eval(outputs)
    case.compare([x.astype(mx.float32) if x.dtype == mx.bfloat16 else x for x in outputs])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_repeats_give_the_same_bits_on_the_device(case: Case) -> None:
    with use_kernels(True):
        first = list(case.call())
        for _ in range(100):
            assert all(mx.array_equal(a, b) for a, b in zip(case.call(), first, strict=True))
