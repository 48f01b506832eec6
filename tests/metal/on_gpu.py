"""The cases of bmojo_metal for a machine with an NVIDIA GPU: MLX runs the ops on the CPU, their Metal text runs there.

python -m metal_kernels.host.run_on_gpu tests.metal.on_gpu --repeats 1000 --sanitize
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from bmojo_metal import use_kernels
from metal_kernels.host.cupy_runner import gpu_metal_kernel
from tests.helpers import rms_ratio
from tests.metal import attention_cases, selection_cases, ssm_cases, token_cases
from tests.metal.case import Case


@dataclass(frozen=True)
class GpuCase:
    """A case whose kernels run on the GPU."""

    case: Case

    @property
    def name(self) -> str:
        return self.case.name

    def run_on_gpu(self) -> list[np.ndarray]:
        """The op's outputs."""
        with patch.object(mx.fast, "metal_kernel", gpu_metal_kernel), use_kernels(True):
            return [np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x) for x in self.case.call()]

    def errors(self, outputs: Sequence[np.ndarray]) -> list[float]:
        """The RMS-error ratio of each output; for integers the share of elements that differ."""
        pairs = zip(outputs, self.case.references, strict=True)
        return [
            float(np.mean(got != want)) if np.issubdtype(want.dtype, np.integer) else rms_ratio(got, want)
            for got, want in pairs
        ]

    def is_met_by(self, outputs: Sequence[np.ndarray]) -> bool:
        """Whether the case accepts them."""
        try:
            self.case.compare(outputs)
        except AssertionError:
            return False
        return True


def cases() -> list[GpuCase]:
    """Those of every kernel."""
    modules = (ssm_cases, token_cases, selection_cases, attention_cases)
    return [GpuCase(case) for module in modules for case in module.cases()]
