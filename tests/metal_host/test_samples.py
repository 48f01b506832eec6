"""Sound kernels give the right numbers in both modes and in every lane order, and the checker says nothing."""

import pytest

from metal_kernels.host import ORDERS, Run
from metal_kernels.host.case import Case
from metal_kernels.host.runtime import Order

from .samples import cases

pytestmark = pytest.mark.usefixtures("harness")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_sound_kernels_pass_the_checker(case: Case, order: Order) -> None:
    outputs = case.run(Run(mode="check", order=order, seed=5))
    assert case.is_met_by(outputs), case.errors(outputs)
    assert case.kernel.statistics is not None
    assert case.kernel.statistics.accesses > 0


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_fast_mode_gives_the_same_numbers(case: Case) -> None:
    one = case.run(Run(mode="fast"))
    two = case.run(Run(mode="fast", order="shuffled", seed=11, workers=2))
    assert case.is_met_by(one), case.errors(one)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True))
