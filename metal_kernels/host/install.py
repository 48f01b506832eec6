"""Puts the harness in the place of mx.fast.metal_kernel, so that unmodified MLX code runs its Metal kernels here."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from .kernel import Run, default_run, metal_kernel

mlx_metal_kernel: Any = mx.fast.metal_kernel  # MLX's own, for as long as the harness is in its place


def install() -> None:
    """Makes mx.fast.metal_kernel run kernels on this CPU, until `uninstall`."""
    mx.fast.metal_kernel = metal_kernel


def uninstall() -> None:
    """Gives mx.fast.metal_kernel back to MLX."""
    mx.fast.metal_kernel = mlx_metal_kernel


@contextmanager
def running(run: Run) -> Iterator[None]:
    """Kernels called in this block run as `run` says, also those made before it."""
    token = default_run.set(run)
    try:
        yield
    finally:
        default_run.reset(token)


@contextmanager
def installed(run: Run | None = None) -> Iterator[None]:
    """`install` for a block, with kernels running as `run` says."""
    before = mx.fast.metal_kernel
    install()
    try:
        with running(run or default_run.get()):
            yield
    finally:
        mx.fast.metal_kernel = before
