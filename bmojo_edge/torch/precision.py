"""Which precision sums are kept in: float32 where a model is in half precision, its own where that is wider."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of norms, scans and softmaxes: float32, or float64 in a float64 model."""
    return torch.promote_types(dtype, torch.float32)


class _HalfLinear(torch.autograd.Function):
    """x (tokens, in) times weight (out, in), both in half precision on a GPU: the float32 sums, not rounded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return grad @ weight, grad.t() @ x


def linear_wide(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in) times weight (out, in), the result in `wide` precision instead of rounded to x's dtype."""
    kind = wide(x.dtype)
    if x.is_cuda and x.dtype != kind:
        y = _HalfLinear.apply(x.flatten(0, -2), weight.to(x.dtype)).view(*x.shape[:-1], -1)
        return y if bias is None else y + bias.to(kind)
    return F.linear(x.to(kind), weight.to(kind), None if bias is None else bias.to(kind))
