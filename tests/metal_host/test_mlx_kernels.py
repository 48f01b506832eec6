"""Conformance: MLX's own kernels, right on Apple's GPUs, are right here too, and the checker finds nothing in them."""

import pytest

from metal_kernels.host import CheckError, Run, unavailable_reason
from metal_kernels.host.case import Case

from . import mlx_kernels

CASES = mlx_kernels.cases() if unavailable_reason() is None else []

pytestmark = pytest.mark.usefixtures("harness")


@pytest.mark.parametrize("mode", ["fast", "check"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_mlx_kernels(case: Case, mode: str) -> None:
    # Their text calls a kernel from a kernel, which is no MSL: no lint, no type check.
    run = Run(mode="fast", source_checks=False) if mode == "fast" else Run(order="shuffled", source_checks=False)
    outputs = case.run(run)
    assert case.is_met_by(outputs), case.errors(outputs)


def test_there_are_cases() -> None:
    assert len(CASES) == 14


def test_a_wrong_launch_of_a_right_kernel_is_reported() -> None:
    """MLX's looped softmax reduces over 32 SIMD-groups, whether or not they are there: MLX always launches them."""
    case = mlx_kernels.softmax("float32", 1003, threads=128, looped=True)
    with pytest.raises(CheckError, match=r"uninitialised at .*`maxval = simd_max"):
        case.run(Run(source_checks=False))
