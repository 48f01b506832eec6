"""What the launchers ask of the machine. Triton itself is imported only where a kernel is about to run."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import Any

import torch
from torch import Tensor

MAX_GRID = 65535  # programs along a grid's second and third axis
_HAS_TRITON = importlib.util.find_spec("triton") is not None  # found once: torch.compile can't trace the search


def has_triton() -> bool:
    """Whether Triton can be imported."""
    return _HAS_TRITON


def warn_of_plain_op(op: str, reason: str) -> None:
    """Say that plain PyTorch computes `op` of CUDA tensors, which is slow, and why."""
    warnings.warn(f"{op}: {reason}; plain PyTorch takes over, slowly", RuntimeWarning, stacklevel=3)


@functools.cache
def _properties(device: int) -> tuple[int, tuple[int, int]]:
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, (found.major, found.minor)


def streaming_multiprocessors(x: Tensor) -> int:
    """Of the GPU that holds x; 1 where x is on the CPU (Triton's interpreter)."""
    return _properties(x.get_device())[0] if x.is_cuda else 1


def capability(x: Tensor) -> tuple[int, int]:
    """Compute capability of the GPU that holds x; (0, 0) where x is on the CPU (Triton's interpreter)."""
    return _properties(x.get_device())[1] if x.is_cuda else (0, 0)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](...), for a kernel of a module that type checkers may not be able to read."""
    kernel[grid](*arguments, **constants)
