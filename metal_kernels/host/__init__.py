"""Runs the source of mx.fast.metal_kernel kernels on an x86-64 Linux CPU, and checks them. For tests, never shipped.

    from metal_kernels.host import Run, installed, metal_kernel

    with installed(Run(mode="check")):  # mx.fast.metal_kernel is the harness in here
        ...

See metal_kernels/README.md for how it works and what it cannot show.
"""

from .errors import CheckError, CompileError, Finding, KernelError, LintError, TypeCheckError
from .kernel import HostKernel, Run, metal_kernel
from .runtime import ORDERS, Statistics
from .toolchain import unavailable_reason

__all__ = [
    "ORDERS",
    "CheckError",
    "CompileError",
    "Finding",
    "HostKernel",
    "KernelError",
    "LintError",
    "Run",
    "Statistics",
    "TypeCheckError",
    "metal_kernel",
    "unavailable_reason",
]
