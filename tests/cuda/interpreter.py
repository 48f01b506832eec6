"""Triton's interpreter made right for bfloat16 (it computes on the bit patterns), and fit for this NumPy.

Import before any kernel is defined, with TRITON_INTERPRET=1 set. Without it, dots of bfloat16 are of the order of 1e10,
sums and products are of bit patterns, and casts to bfloat16 cut instead of rounding to nearest even.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import numpy as np


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 as its bits, uint16, to float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrowed(x: np.ndarray) -> np.ndarray:
    """float32 to bfloat16 as its bits, uint16, rounded to nearest, ties to even."""
    wide = np.ascontiguousarray(x, dtype=np.float32)
    bits = wide.view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(wide), np.uint16(0x7FC0), rounded).astype(np.uint16)


def repair() -> None:
    """Patch the interpreter of Triton 3.6 to 3.9; called once, below."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("TRITON_INTERPRET=1 must be set before Triton is imported")
    tl: Any = importlib.import_module("triton.language")
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    Handle, Builder, Reduce = interpreter.TensorHandle, interpreter.InterpreterBuilder, interpreter.ReduceOps

    def is_bfloat16(handle) -> bool:
        return handle.dtype.scalar == tl.bfloat16

    def packed(x: np.ndarray, like):
        return Handle(x, like.dtype.scalar) if x.dtype == np.bool_ else Handle(narrowed(x), tl.bfloat16)

    convert, binary, unary = interpreter._convert_float, Builder.binary_op, Builder.unary_op
    fma, dot, total, extreme = Builder.create_fma, Builder.create_dot, Reduce.sum, Reduce.min_max
    on_bits = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)

    def convert_float(x, source, target, rounding):
        if source == tl.bfloat16 and target == tl.float32:
            return widened(x).view(np.uint32)
        if source == tl.float32 and target == tl.bfloat16:
            return narrowed(x)
        return convert(x, source, target, rounding)

    def binary_op(self, a, b, op):
        if is_bfloat16(a) and is_bfloat16(b) and op not in on_bits:
            return packed(op(widened(a.data), widened(b.data)), a)
        return binary(self, a, b, op)

    def unary_op(self, a, op):
        return packed(op(widened(a.data)), a) if is_bfloat16(a) else unary(self, a, op)

    def create_fma(self, x, y, z):
        if is_bfloat16(z):
            return packed((widened(x.data) * widened(y.data) + widened(z.data)), z)
        return fma(self, x, y, z)

    def create_dot(self, a, b, d, *rest):
        a, b = (Handle(widened(t.data), tl.float32) if is_bfloat16(t) else t for t in (a, b))
        return dot(self, a, b, d, *rest)

    def in_float32(reduce):
        def reduced(self, x, *rest, **named):
            if x.dtype.scalar != tl.bfloat16:
                return reduce(self, x, *rest, **named)
            found = reduce(self, self.to_tensor(widened(x.handle.data), tl.float32), *rest, **named)

            def back(t):
                if t.dtype.scalar != tl.float32:
                    return t
                return tl.core.tensor(Handle(narrowed(t.handle.data), tl.bfloat16), t.type.with_element_ty(tl.bfloat16))

            return tuple(back(t) for t in found) if isinstance(found, tuple) else back(found)

        return reduced

    interpreter._convert_float = convert_float
    Builder.binary_op, Builder.unary_op, Builder.create_fma, Builder.create_dot = (
        binary_op, unary_op, create_fma, create_dot
    )  # fmt: skip
    Reduce.sum, Reduce.min_max = in_float32(total), in_float32(extreme)
    if not hasattr(Builder, "get_bf16"):  # Triton 3.6: tl.full(..., tl.bfloat16)
        Builder.get_bf16 = lambda self, value: Handle(narrowed(np.array([value], np.float32)), tl.bfloat16)

    patch_tensor = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, scope):
        """Loop bounds known at run time: int() of an array of one dimension is an error since NumPy 2.4."""
        patched = patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))
        return patched

    interpreter._patch_lang_tensor = patch_lang_tensor


repair()
