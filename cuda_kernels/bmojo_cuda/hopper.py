"""When memory attention takes the kernels written by hand for Hopper (hopper_*_kernels.py), and how they are cut."""

from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bmojo_cuda.launch import capability

KNOWN_TRITON = ("3.6",)  # Gluon is experimental: only releases these kernels were checked with
SHARED_BYTES = 227 * 1024  # of a Hopper multiprocessor, for one program


class Wide(NamedTuple):
    """Rows of queries and keys a tile, tiles of keys in the ring."""

    queries: int
    keys: int
    slots: int


class Tall(NamedTuple):
    """Rows of queries and keys a tile, warps, tiles that copies run ahead."""

    queries: int
    keys: int
    warps: int
    depth: int


KEYS = Tall(64, 128, 8, 2)


@functools.cache
def kernels(name: str) -> Any:
    """The module hopper_{name}_kernels, None where this Triton has no Gluon that is known to work."""
    try:
        import triton

        if not triton.__version__.startswith(KNOWN_TRITON):
            return None
        return importlib.import_module(f"bmojo_cuda.hopper_{name}_kernels")
    except ImportError:
        return None


def takes(q: Tensor) -> bool:
    """Whether these kernels can run for queries (b, l, h, p)."""
    halves = (torch.bfloat16, torch.float16)
    return capability(q)[0] == 9 and q.dtype in halves and q.shape[-1] in (64, 128) and kernels("keys") is not None


def forward_tiles(p: int, kinds: int, rows: int | None) -> Wide | None:
    """Tiles for so many kinds of queries and rows of a chunk (None: no chunks); None: left to others."""
    if rows is not None and rows % 128:
        return None
    tiles = Wide(128, 64, 0) if p == 128 else Wide(128, 128, 0)
    # Beside the ring stand the queries, what storing the output takes (the queries' bytes at most), and barriers.
    left = SHARED_BYTES - 2 * 128 * p * kinds - 128 * p - 4096
    return tiles._replace(slots=min(5, left // (4 * tiles.keys * p)))


def constants(portable: dict[str, Any]) -> dict[str, Any]:
    """Those of the portable kernels that these take too."""
    return {name: portable[name] for name in ("H", "G", "P")}
