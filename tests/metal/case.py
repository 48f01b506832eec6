"""A call of an op of bmojo_metal with the outputs it must have, and what the tests of all kernels make cases from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

from bmojo_metal import use_kernels
from metal_kernels.host import Run
from metal_kernels.host.install import installed
from tests.helpers import rms_ratio

BOUNDS = {"float32": 2e-6, "float16": 1e-3, "bfloat16": 8e-3}  # RMS-error ratio to the float64 oracle
DTYPES = tuple(BOUNDS)


@contextmanager
def kernels(run: Run | None = None) -> Iterator[None]:
    """Ops run their Metal text on the harness, checked unless `run` says otherwise."""
    with installed(run or Run(mode="check")), use_kernels(True):
        yield


@dataclass(frozen=True)
class Case:
    """An op's call and its references: float64, within `bounds`, or integers, to be met exactly.

    kernels: names of the bodies that the call runs.
    """

    name: str
    kernels: tuple[str, ...]
    call: Callable[[], Sequence[mx.array]]
    references: Sequence[np.ndarray]
    bounds: Sequence[float]

    def verify(self, run: Run) -> list[np.ndarray]:
        """Runs the kernels, compares every output, and returns them."""
        with kernels(run):
            outputs = [np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x) for x in self.call()]
        self.compare(outputs)
        return outputs

    def compare(self, outputs: Sequence[Any]) -> None:
        """Every output is what it must be."""
        for i, (got, want, bound) in enumerate(zip(outputs, self.references, self.bounds, strict=True)):
            if np.issubdtype(want.dtype, np.integer):
                np.testing.assert_array_equal(got, want, err_msg=f"{self.name}: output {i}")
            else:
                ratio = rms_ratio(got, want)
                assert ratio <= bound, f"{self.name}: output {i} has RMS-error ratio {ratio:.2e}, more than {bound:.0e}"


def rounded(x: Any, dtype: str) -> np.ndarray:
    """Values that the dtype holds, as float64 for an oracle."""
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return np.asarray(x).astype(kind).astype(np.float64)


def to_mlx(x: np.ndarray, dtype: str = "float32") -> mx.array:
    """An array of the dtype, exact where `x` is `rounded`."""
    return mx.array(x.astype(np.float32)).astype(getattr(mx, dtype))
