"""One call of a kernel with the outputs it must have: what the tests run here and run_on_gpu.py runs on a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .cupy_runner import run_on_gpu
from .kernel import HostKernel, Run


@dataclass(frozen=True)
class Case:
    """A kernel, the arguments of a call, and references in float64 (or integers, which must be met exactly).

    tolerance: the largest RMS-error ratio allowed, ||got - ref|| / ||ref||.
    """

    name: str
    kernel: HostKernel
    call: dict[str, Any]
    references: Sequence[np.ndarray]
    tolerance: float

    def with_source(self, source: str) -> "Case":
        """The same case with another kernel body, for mutation tests."""
        return replace(self, kernel=self.kernel.with_source(source))

    def run(self, run: Run) -> list[np.ndarray]:
        return self.kernel(**self.call, run=run)

    def run_on_gpu(self) -> list[np.ndarray]:
        """The same on an NVIDIA GPU, see run_on_gpu.py."""
        return run_on_gpu(self.kernel, **self.call)

    def errors(self, outputs: Sequence[np.ndarray]) -> list[float]:
        """The RMS-error ratio of each output; for integers the share of elements that differ."""
        return [error_ratio(got, ref) for got, ref in zip(outputs, self.references, strict=True)]

    def is_met_by(self, outputs: Sequence[np.ndarray]) -> bool:
        """Whether every output is within tolerance; NaN never is."""
        limits = [self.tolerance if np.issubdtype(ref.dtype, np.floating) else 0.0 for ref in self.references]
        return all(error <= limit for error, limit in zip(self.errors(outputs), limits, strict=True))


def error_ratio(got: np.ndarray, ref: np.ndarray) -> float:
    if not np.issubdtype(ref.dtype, np.floating):
        return float(np.mean(got != ref))
    difference = got.astype(np.float64) - ref
    return float(np.sqrt(np.sum(difference**2) / np.sum(ref**2)))
