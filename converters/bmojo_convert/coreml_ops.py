"""Operations of PyTorch that coremltools 9 has no form for and the recurrences of mamba2, gdn and gka are made of.

Importing this module teaches coremltools those that it lacks; one that a later version brings itself is left alone.
It knows MIL and nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from coremltools.converters.mil import Builder  # pyright: ignore[reportMissingImports]
from coremltools.converters.mil.frontend.torch import register_torch_op  # pyright: ignore[reportMissingImports]
from coremltools.converters.mil.frontend.torch.ops import _get_inputs  # pyright: ignore[reportMissingImports]
from coremltools.converters.mil.frontend.torch.torch_op_registry import (  # pyright: ignore[reportMissingImports]
    _TORCH_OPS_REGISTRY,
)

mb: Any = Builder  # whose operations are added at run time

Translation = Callable[[Any, Any], None]


def _given(context: Any, node: Any, most: int) -> list[Any]:
    """The first `most` arguments of an operation, None for those that it does not have."""
    found = _get_inputs(context, node)[:most]
    return [*found, *[None] * (most - len(found))]


def _lacking(translate: Translation) -> Translation:
    """Register under the function's name, unless coremltools has a form of its own."""
    if not _TORCH_OPS_REGISTRY.get_func(translate.__name__):
        register_torch_op(translate)
    return translate


@_lacking
def addcmul(context: Any, node: Any) -> None:
    start, x, y, scale = _given(context, node, 4)
    product = mb.mul(x=x, y=y)
    if scale is not None and scale.val != 1:
        product = mb.mul(x=product, y=np.float32(scale.val))
    context.add(mb.add(x=start, y=product, name=node.name))


@_lacking
def lerp(context: Any, node: Any) -> None:
    start, end, share = _given(context, node, 3)
    context.add(mb.add(x=start, y=mb.mul(x=mb.sub(x=end, y=start), y=share), name=node.name))


@_lacking
def mt(context: Any, node: Any) -> None:
    (x,) = _given(context, node, 1)
    perm = [*range(x.rank - 2), x.rank - 1, x.rank - 2]
    context.add(mb.transpose(x=x, perm=perm, name=node.name))


@_lacking
def movedim(context: Any, node: Any) -> None:
    x, source, target = _given(context, node, 3)
    moved = [[int(axis) % x.rank for axis in np.atleast_1d(axes.val)] for axes in (source, target)]
    perm = [axis for axis in range(x.rank) if axis not in moved[0]]
    for at, axis in sorted(zip(moved[1], moved[0], strict=True)):
        perm.insert(at, axis)
    context.add(mb.transpose(x=x, perm=perm, name=node.name))


@register_torch_op(override=True)  # coremltools' own knows the first axis alone and fails there
def repeat_interleave(context: Any, node: Any) -> None:
    x, times, axis = _given(context, node, 3)
    at, n = int(axis.val) % x.rank, int(times.val)
    reps = [n if d == at + 1 else 1 for d in range(x.rank + 1)]
    shape = [size * n if d == at else size for d, size in enumerate(x.shape)]
    repeated = mb.tile(x=mb.expand_dims(x=x, axes=[at + 1]), reps=reps)
    context.add(mb.reshape(x=repeated, shape=shape, name=node.name))


@register_torch_op(override=True)  # coremltools' own fails at axes counted from the end
def cumsum(context: Any, node: Any) -> None:
    x, axis, dtype = _given(context, node, 3)
    if dtype is not None:
        raise NotImplementedError("cumsum: only in the type of what is added")
    context.add(mb.cumsum(x=x, axis=int(axis.val) % x.rank, name=node.name))


@_lacking
def linalg_solve_triangular(context: Any, node: Any) -> None:
    """x with (1 + L) x = y, L below the diagonal of (..., c, c).

    X holds the inverses of the blocks of `size` on the diagonal; since the inverse of [[A, 0], [B, C]] is that of the
    two blocks less (1/C) B (1/A), X - X B X holds those of twice the size: log2(c) passes, no power of L.
    """
    system, y, upper, left, unit = _given(context, node, 5)
    if upper.val or (left is not None and not left.val) or unit is None or not unit.val:
        raise NotImplementedError("solve_triangular: only lower matrices with a diagonal of ones, from the left")
    c = int(system.shape[-1])
    row, column = np.indices((c, c))
    inverse, size = np.eye(c, dtype=np.float32), 1
    while size < c:
        below = (row // (2 * size) == column // (2 * size)) & (row // size > column // size)
        block = mb.mul(x=system, y=below.astype(np.float32))
        if size > 1:
            block = mb.matmul(x=mb.matmul(x=inverse, y=block), y=inverse)
        inverse, size = mb.sub(x=inverse, y=block), 2 * size
    context.add(mb.matmul(x=inverse, y=y, name=node.name) if c > 1 else mb.identity(x=y, name=node.name))
