"""The selective scan of Mamba-1 (S6): public op, plain reference, torch's view of the kernels.

s_t = exp(dt_t A) s_{t-1} + dt_t B_t x_t and y_t = (C_t s_t + D x_t) SiLU(z_t) (arXiv 2312.00752, algorithm 2), with a
state carried in and out, both with gradients, and documents that start afresh. It knows nothing of projections.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from bmojo_cuda.documents import forget_marks, real_tokens, starts
from bmojo_cuda.launch import MAX_GRID, has_triton, warn_of_plain_op
from bmojo_cuda.scan_launch import MAX_STATES, SEGMENT, TILE, backward, forward


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    dt_softplus: bool = True,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` in plain torch, token by token; float64 inputs are computed in float64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    u, step, Bw, Cw = (t.to(wide) for t in (x, dt, B, C))
    if dt_bias is not None:
        step = step + dt_bias.to(wide)
    if dt_softplus:
        step = torch.logaddexp(step, torch.zeros_like(step))
    h = x.new_zeros(x.shape[0], x.shape[2], A.shape[1], dtype=wide) if state is None else state.to(wide)
    fresh = None
    if segment_ids is not None:
        fresh, real = starts(segment_ids), real_tokens(segment_ids)
        step = step * real[..., None]
    out = []
    for i in range(x.shape[1]):
        decay = torch.exp(step[:, i, :, None] * A.to(wide))
        if fresh is not None:
            decay = decay.masked_fill(fresh[:, i, None, None], 0.0)
        h = decay * h + (step[:, i] * u[:, i])[..., None] * Bw[:, i, None]
        out.append((h * Cw[:, i, None]).sum(-1))
    y = torch.stack(out, 1)
    if D is not None:
        y = y + D.to(wide) * u
    if z is not None:
        y = y * F.silu(z.to(wide))
    return y.to(x.dtype), h


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    state: Tensor | None = None,
    segment_ids: Tensor | None = None,
    dt_softplus: bool = True,
) -> tuple[Tensor, Tensor]:
    """Scan x with selective decay; Triton kernels on CUDA tensors, plain torch elsewhere.

    x, dt, z (b, l, d); A (d, n), negative, not its logarithm; B, C (b, l, n); D, dt_bias (d,); state (b, d, n) float32
    before the first token, None = zero; segment_ids (b, l) ints: a change starts a document from a zero state (the
    first one continues `state`), -1 is padding, which leaves the state as it is. With `dt_softplus`, dt is
    softplus(dt + dt_bias). Arithmetic is float32.

    Returns y (b, l, d) in x's dtype and the float32 state (b, d, n) after the last token; gradients flow to every float
    argument from both. Plain torch also takes float64, and, with a warning, what the kernels are not made for: no
    Triton, n > 256. Raises ValueError naming the argument whose shape is wrong.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, state, segment_ids)
    if x.is_cuda and x.dtype != torch.float64:
        obstacle = _obstacle(x, A)
        if obstacle is None:
            marks = None if segment_ids is None else forget_marks(segment_ids)
            inputs = (x, dt, A, B, C, D, z, dt_bias, state)
            save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
            ordinary = type(x) in (Tensor, Parameter) and not torch.compiler.is_compiling()
            run = _Eager.apply if ordinary and save else _scan
            y, last, _ = run(*inputs, marks, dt_softplus, save)  # pyright: ignore[reportGeneralTypeIssues]
            return y, last
        warn_of_plain_op("selective_scan", obstacle)
    return selective_scan_reference(x, dt, A, B, C, D, z, dt_bias, state, segment_ids, dt_softplus)


def _obstacle(x: Tensor, A: Tensor) -> str | None:
    """Why the kernels cannot run, None where they can."""
    if not has_triton():
        return "Triton is not installed"
    if A.shape[1] > MAX_STATES:
        return f"{A.shape[1]} states a channel are more than {MAX_STATES}"
    if x.shape[0] > MAX_GRID or x.shape[1] > MAX_GRID * SEGMENT:
        return f"a batch of {x.shape[0]} rows of {x.shape[1]} tokens is beyond CUDA's grid"
    return None


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    state: Tensor | None,
    segment_ids: Tensor | None,
) -> None:
    if x.ndim != 3 or not x.shape[1]:
        raise ValueError(f"x: must have shape (b, l, d) with l > 0, got {tuple(x.shape)}")
    if A.ndim != 2 or A.shape[0] != x.shape[2]:
        raise ValueError(f"A: must have shape (d, n) with d = {x.shape[2]}, got {tuple(A.shape)}")
    (b, l, d), n = x.shape, A.shape[1]
    wanted = {
        "dt": (dt, (b, l, d)), "B": (B, (b, l, n)), "C": (C, (b, l, n)), "D": (D, (d,)), "z": (z, (b, l, d)),
        "dt_bias": (dt_bias, (d,)), "state": (state, (b, d, n)), "segment_ids": (segment_ids, (b, l)),
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: must have shape {shape}, got {tuple(tensor.shape)}")


# --- torch's view of the kernels ------------------------------------------------------------------------------------


@torch.library.custom_op("bmojo::selective_scan", mutates_args=(), device_types="cuda")
def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    state: Tensor | None, marks: Tensor | None, softplus: bool, save: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return forward(x, dt, A, B, C, D, z, dt_bias, state, marks, softplus, save)


@_scan.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, state, marks, softplus, save):
    (b, l, d), n = x.shape, A.shape[1]
    saved = (b, -(-l // SEGMENT), -(-d // TILE), n, TILE) if save else (0,)
    wide = {"dtype": torch.float32, "device": x.device}
    return (
        torch.empty((b, l, d), dtype=x.dtype, device=x.device),
        torch.empty(b, d, n, **wide),
        torch.empty(saved, **wide),
    )


def _gradients(*arguments: Any) -> list[Tensor]:
    return [t for t in backward(*arguments) if t is not None]


@torch.library.custom_op("bmojo::selective_scan_backward", mutates_args=(), device_types="cuda")
def _scan_backward(
    dy: Tensor, dlast: Tensor | None, saved: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, marks: Tensor | None, softplus: bool, of_state: bool,
) -> list[Tensor]:  # fmt: skip
    return _gradients(dy, dlast, saved, x, dt, A, B, C, D, z, dt_bias, marks, softplus, of_state)


@_scan_backward.register_fake
def _(dy, dlast, saved, x, dt, A, B, C, D, z, dt_bias, marks, softplus, of_state):
    given = [t for t in (x, dt, A, B, C, D, z, dt_bias) if t is not None]
    found = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in given]
    state = x.new_empty((x.shape[0], *A.shape), dtype=torch.float32)
    return [*found, state] if of_state else found


def _keep(ctx, inputs, output) -> None:
    x, dt, A, B, C, D, z, dt_bias, state, marks, ctx.softplus, _ = inputs
    ctx.state_dtype = None if state is None else state.dtype
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[2], x, dt, A, B, C, D, z, dt_bias, marks)
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx, dy, dlast, _, run: Any = _scan_backward):
    saved, x, dt, A, B, C, D, z, dt_bias, marks = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    of_state = ctx.state_dtype is not None
    found = iter(run(dy, dlast, saved, x, dt, A, B, C, D, z, dt_bias, marks, ctx.softplus, of_state))
    grads = [None if t is None else next(found) for t in (x, dt, A, B, C, D, z, dt_bias)]
    return *grads, next(found).to(ctx.state_dtype) if of_state else None, None, None, None


_scan.register_autograd(_differentiate, setup_context=_keep)


class _Eager(torch.autograd.Function):
    """`_scan` for ordinary tensors: torch's own wrapping of a custom op takes longer than launching the kernels."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        found = forward(*arguments)
        _keep(ctx, arguments, found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _differentiate(ctx, *grad_outputs, run=_gradients)
