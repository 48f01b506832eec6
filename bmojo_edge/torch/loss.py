"""Cross-entropy over a large vocabulary without all its logits: some tokens' at a time, with their gradients.

It knows neither models nor data: activations, the head's weight and targets go in, a sum in float32 comes out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bmojo_edge.torch.ops import linear_wide, wide

CHUNK_LOGITS = 2**27  # logits that exist at one time: 512 MiB in float32


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100) -> Tensor:
    """Sum over targets of -log softmax(hidden weight^T)[target], a float32 scalar (float64 for float64).

    hidden (..., d); weight (v, d) of the head; targets (...) ints below v, those equal to `ignore_index` count nothing.
    Logits are not rounded to a half-precision dtype. Gradients flow to hidden and weight, sums over tokens are added in
    one order: they repeat bit for bit. Raises ValueError where shapes do not fit.
    """
    if hidden.shape[:-1] != targets.shape or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "hidden, weight, targets: must have shapes (..., d), (v, d), (...); "
            f"got {tuple(hidden.shape)}, {tuple(weight.shape)}, {tuple(targets.shape)}"
        )
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2), weight, targets.flatten(), ignore_index)


class _LinearCrossEntropy(torch.autograd.Function):
    """Gradients of a sum are known up to a factor when it is computed, so no logit is kept or computed twice."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        kind, rows = wide(hidden.dtype), max(1, CHUNK_LOGITS // weight.shape[0])
        losses_of = _compiled_losses() if hidden.is_cuda else _losses
        total = torch.zeros((), dtype=kind, device=hidden.device)
        dweight = torch.zeros_like(weight, dtype=kind) if ctx.needs_input_grad[1] else None
        dhidden = []
        for h, target in zip(hidden.split(rows), targets.split(rows), strict=True):
            losses, dlogits = losses_of(linear_wide(h, weight), target, ignore_index, hidden.dtype)
            total = total + losses
            if ctx.needs_input_grad[0]:
                dhidden.append(dlogits @ weight)
            if dweight is not None:
                dweight += linear_wide(dlogits.t(), h.t())
        empty = hidden.new_zeros(0)
        found = (torch.cat(dhidden) if dhidden else empty, empty if dweight is None else dweight.to(weight.dtype))
        ctx.save_for_backward(*found)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
        return *((x * grad).to(x.dtype) if wanted else None for x, wanted in found), None, None


def _losses(logits: Tensor, targets: Tensor, ignore_index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sum of the losses of logits (n, v), and what it changes by with each of them, in `dtype`."""
    counts = (targets != ignore_index)[:, None]
    target = targets.clamp(min=0)[:, None]
    logs = logits - logits.logsumexp(dim=1, keepdim=True)
    losses = torch.where(counts, -logs.gather(1, target), 0).sum()
    hit = target == torch.arange(logits.shape[1], device=logits.device)
    return losses, torch.where(counts, logs.exp() - hit.to(logits.dtype), 0).to(dtype)


@functools.cache
def _compiled_losses() -> Callable[..., tuple[Tensor, Tensor]]:
    """`_losses` in two passes over the logits instead of six; made when needed, for importing a compiler takes long."""
    return torch.compile(_losses, dynamic=False)
