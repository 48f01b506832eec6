"""When memory attention takes the kernels written by hand for Hopper (hopper_kernels.py), and how they are cut."""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bmojo_cuda.launch import capability

KNOWN_TRITON = ("3.6",)  # Gluon is experimental: only releases these kernels were checked with


class Wide(NamedTuple):
    """Rows of queries and keys a tile, warps, tiles that copies run ahead; does forward hold queries in registers?"""

    queries: int
    keys: int
    warps: int
    depth: int
    hold: bool = False


@functools.cache
def kernels() -> Any:
    """The module of the kernels, None where this Triton has no Gluon that is known to work."""
    try:
        import triton

        if not triton.__version__.startswith(KNOWN_TRITON):
            return None
        return importlib.import_module("bmojo_cuda.hopper_kernels")
    except ImportError:
        return None


def tiles_for(q: Tensor, rows: int | None) -> Wide | None:
    """Tiles for queries (b, l, h, p) whose chunks hold `rows` rows (None: no chunks); None: the portable kernels."""
    if capability(q)[0] != 9 or q.dtype not in (torch.bfloat16, torch.float16) or q.shape[-1] not in (64, 128):
        return None
    if kernels() is None:
        return None
    if rows is None or rows % 128 == 0:
        return Wide(128, 64, 8, 2)
    return Wide(64, 64, 4, 1) if rows % 64 == 0 else None


def constants(portable: dict[str, Any]) -> dict[str, Any]:
    """Those of the portable kernels that these take too."""
    return {name: portable[name] for name in ("H", "G", "P")}
