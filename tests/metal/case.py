"""A call of an op of bmojo_metal with the outputs it must have, and what the tests of all kernels make cases from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

from bmojo_metal import Linear, use_kernels
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

    kernels: names of the bodies that the call runs; plain: by how much more the plain op may err, which rounds halfway.
    """

    name: str
    kernels: tuple[str, ...]
    call: Callable[[], Sequence[mx.array]]
    references: Sequence[np.ndarray]
    bounds: Sequence[float]
    plain: float = 1.0

    def verify(self, run: Run) -> list[np.ndarray]:
        """Runs the kernels, compares every output, and returns them."""
        with kernels(run):
            outputs = [np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x) for x in self.call()]
        self.compare(outputs)
        return outputs

    def compare(self, outputs: Sequence[Any], slack: float = 1.0) -> None:
        """Every output is what it must be, its error at most `slack` times its bound."""
        for i, (got, want, bound) in enumerate(zip(outputs, self.references, self.bounds, strict=True)):
            if np.issubdtype(want.dtype, np.integer):
                np.testing.assert_array_equal(got, want, err_msg=f"{self.name}: output {i}")
            else:
                ratio, most = rms_ratio(got, want), bound * slack
                assert ratio <= most, f"{self.name}: output {i} has RMS-error ratio {ratio:.2e}, more than {most:.0e}"


def rounded(x: Any, dtype: str) -> np.ndarray:
    """Values that the dtype holds, as float64 for an oracle."""
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    return np.asarray(x).astype(kind).astype(np.float64)


def linear_of(weight: np.ndarray, dtype: str, bits: int = 0) -> tuple[np.ndarray, Linear]:
    """A weight (n, k) as it acts, and as it is stored: in the dtype, or packed in groups of 32 with scales in it."""
    if not bits:
        return weight, Linear(to_mlx(weight, dtype))
    packed, scales, offsets = mx.quantize(to_mlx(weight), group_size=32, bits=bits)
    scales, offsets = (x.astype(getattr(mx, dtype)) for x in (scales, offsets))
    levels = mx.dequantize(packed, mx.ones_like(scales), mx.zeros_like(scales), group_size=32, bits=bits)
    scale, offset = (np.repeat(np.array(x.astype(mx.float32), np.float64), 32, axis=1) for x in (scales, offsets))
    acts = np.array(levels.astype(mx.float32), np.float64) * scale + offset
    return acts, Linear(packed, None, scales, offsets, 32, bits)


def to_mlx(x: np.ndarray, dtype: str = "float32") -> mx.array:
    """An array of the dtype, exact where `x` is `rounded`."""
    return mx.array(x.astype(np.float32)).astype(getattr(mx, dtype))
