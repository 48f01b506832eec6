"""Kernels with one fault each, which compute-sanitizer must report: shows that the checkers look at our kernels.

    python -m metal_kernels.host.run_on_gpu tests.metal_host.gpu_faults --only racecheck --repeats 0 --sanitize

must end with FAIL for the checker that the case is named after, and with ok for the others (but for initcheck, which
may see what memcheck sees too). Numbers are not judged.
"""

from collections.abc import Sequence

import numpy as np

from metal_kernels.host.case import Case
from metal_kernels.host.kernel import metal_kernel

FAULTS = {
    "racecheck": """
        threadgroup float t[256];
        uint i = thread_position_in_grid.x;
        t[i] = x[i];
        o[i] = t[255 - i];""",
    "memcheck": """
        uint i = thread_position_in_grid.x;
        o[i] = x[i + 1];""",
    "initcheck": """
        uint i = thread_position_in_grid.x;
        o[i] = o[i] + x[i];""",
}


class Faulty(Case):
    """A case for the checkers alone."""

    def is_met_by(self, outputs: Sequence[np.ndarray]) -> bool:
        return True


def cases() -> list[Case]:
    """One for each checker, named after it."""
    x = np.ones(256, np.float32)
    call = {
        "inputs": [x],
        "grid": (256, 1, 1),
        "threadgroup": (256, 1, 1),
        "output_shapes": [x.shape],
        "output_dtypes": [x.dtype],
    }
    return [
        Faulty(tool, metal_kernel(tool, ["x"], ["o"], source), call, [np.ones(256)], 0.0)
        for tool, source in FAULTS.items()
    ]
