"""Depthwise causal convolution with SiLU and a carried state: public op, launcher of the kernels, plain reference."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bmojo_cuda.documents import forget_marks, real_tokens, starts
from bmojo_cuda.launch import MAX_GRID, has_triton, launch, warn_of_plain_op

SPAN = 64  # tokens a program walks over
MAX_TAPS = 8  # they are unrolled


def causal_conv_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv` in plain torch, token by token; float64 inputs are computed in float64."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    (b, l, d), taps = x.shape, weight.shape[1]
    window = x.new_zeros(b, taps - 1, d) if state is None else state.to(x.dtype)
    fresh = real = None
    if segment_ids is not None:
        fresh, real = starts(segment_ids), real_tokens(segment_ids)
    out = []
    for i in range(l):
        if fresh is not None:
            window = window.masked_fill(fresh[:, i, None, None], 0.0)
        seen = torch.cat([window, x[:, i : i + 1]], 1)
        y = (seen.to(wide) * weight.t().to(wide)).sum(1)
        y = F.silu(y if bias is None else y + bias.to(wide))
        if real is not None:
            y = y * real[:, i, None]
            window = torch.where(real[:, i, None, None], seen[:, 1:], window)
        else:
            window = seen[:, 1:]
        out.append(y)
    return torch.stack(out, 1).to(x.dtype), window


def causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """SiLU of a depthwise causal convolution; Triton kernels on CUDA tensors, plain torch elsewhere.

    x (b, l, d); weight (d, taps), oldest tap first; bias (d,); state (b, taps - 1, d): the inputs before the first,
    oldest first, None = zeros; segment_ids (b, l) ints: a change starts a document (the first one continues `state`),
    -1 is padding (output 0, not remembered). Returns y (b, l, d) and the state after the last real token, both in x's
    dtype. Plain torch also takes float64, and, with a warning, what the kernels are not made for: no Triton, more than
    8 taps. Raises ValueError naming the argument whose shape is wrong.
    """
    if x.ndim != 3 or not x.shape[1]:
        raise ValueError(f"x: must have shape (b, l, d) with l > 0, got {tuple(x.shape)}")
    b, l, d = x.shape
    if weight.ndim != 2 or weight.shape[0] != d or not weight.shape[1]:
        raise ValueError(f"weight: must have shape (d, taps) with d = {d} and taps > 0, got {tuple(weight.shape)}")
    taps = weight.shape[1]
    wanted = {"bias": (bias, (d,)), "state": (state, (b, taps - 1, d)), "segment_ids": (segment_ids, (b, l))}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: must have shape {shape}, got {tuple(tensor.shape)}")
    if x.is_cuda and x.dtype != torch.float64:
        obstacle = _obstacle(x, taps)
        if obstacle is None:
            return kernels(x, weight, bias, state, segment_ids)
        warn_of_plain_op("causal_conv", obstacle)
    return causal_conv_reference(x, weight, bias, state, segment_ids)


def _obstacle(x: Tensor, taps: int) -> str | None:
    """Why the kernels cannot run, None where they can."""
    if not has_triton():
        return "Triton is not installed"
    if taps > MAX_TAPS:
        return f"{taps} taps are more than {MAX_TAPS}"
    if x.shape[0] > MAX_GRID or x.shape[1] > (MAX_GRID - 1) * SPAN:
        return f"a batch of {x.shape[0]} rows of {x.shape[1]} tokens is beyond CUDA's grid"
    return None


def kernels(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`causal_conv` by the kernels, whatever the device: arguments as there."""
    taps = weight.shape[1]
    if state is not None and segment_ids is not None:  # the state becomes the first tokens of the first document
        x, segment_ids, rows = _with_state(x, state, segment_ids)
        y, last = kernels(x, weight, bias, None, segment_ids)
        return y.gather(1, rows.expand(-1, -1, y.shape[2])), last
    marks = None if segment_ids is None else forget_marks(segment_ids)
    return _conv(x, weight, bias, state, marks), _last_inputs(x, taps, state, segment_ids)


def _with_state(x: Tensor, state: Tensor, segment_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x and ids with the state before each row's first real token, and where x's tokens went, (b, l, 1)."""
    (b, l, d), past = x.shape, state.shape[1]
    column = torch.arange(l, device=x.device)
    real = real_tokens(segment_ids)
    first = torch.where(real, column, l).amin(1, keepdim=True)  # (b, 1)
    name = segment_ids.gather(1, first.clamp(max=l - 1)).clamp(min=0)
    place = torch.arange(l + past, device=x.device).expand(b, -1)
    source = torch.where(place < first, place + past, torch.where(place < first + past, place - first, place))
    tokens = torch.cat([state.to(x.dtype), x], 1).gather(1, source[..., None].expand(-1, -1, d))
    ids = torch.cat([name.expand(-1, past), segment_ids], 1).gather(1, source)
    return tokens, ids, (column + torch.where(column < first, 0, past))[..., None]


def _last_inputs(x: Tensor, taps: int, state: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    """The last taps - 1 real inputs of each row's last document, zeros where it has fewer: (b, taps - 1, d).

    Not both of a state and segment ids.
    """
    b, l, d = x.shape
    if segment_ids is None:
        if l >= taps - 1:
            return x[:, l - taps + 1 :].clone()  # a view would keep all of x alive
        past = x.new_zeros(b, taps - 1 - l, d) if state is None else state[:, l:].to(x.dtype)
        return torch.cat([past, x], 1)
    column = torch.arange(l, device=x.device)
    last = torch.where(real_tokens(segment_ids), column, -1).amax(1)  # (b,)
    first = torch.where(starts(segment_ids), column, 0).amax(1)
    wanted = last[:, None] + torch.arange(2 - taps, 1, device=x.device)  # (b, taps - 1)
    rows = torch.arange(b, device=x.device)[:, None]
    at = wanted.clamp(min=0)
    held = (wanted >= first[:, None]) & real_tokens(segment_ids)[rows, at]
    return x[rows, at].masked_fill(~held[..., None], 0.0)


def _settings(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, marks: Tensor | None):
    w = weight.float().t().contiguous()
    tensors = (
        x, w, w if bias is None else bias.float().contiguous(), w if state is None else state.to(x.dtype).contiguous(),
        w if marks is None else marks.contiguous().view(torch.int64)[..., 0],
    )  # fmt: skip
    cut = {
        "TAPS": weight.shape[1], "SPAN": SPAN, "U": 8, "BD": 64, "HAS_BIAS": bias is not None,
        "HAS_PAST": state is not None, "RESETS": marks is not None, "num_warps": 1, "num_stages": 1,
    }  # fmt: skip
    return tensors, (-(-x.shape[2] // 64), -(-x.shape[1] // SPAN), x.shape[0]), cut


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, marks: Tensor | None) -> Tensor:
    """Launch the forward kernel: y (b, l, d)."""
    from bmojo_cuda import conv_kernels

    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tensors, grid, cut = _settings(x, weight, bias, state, marks)
    launch(conv_kernels.conv_forward, grid, *tensors, y, x.shape[1], x.shape[2], *x.stride()[:2], **cut)
    return y


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, marks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight (d, taps), bias (d,) and state (b, taps - 1, d; none without a state) from that of y."""
    from bmojo_cuda import conv_kernels

    x, dy = x if x.stride(-1) == 1 else x.contiguous(), dy.contiguous()
    (b, l, d), taps = x.shape, weight.shape[1]
    wide = {"dtype": torch.float32, "device": x.device}
    tensors, grid, cut = _settings(x, weight, bias, state, marks)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dpast = torch.empty(b, 0 if state is None else taps - 1, d, **wide)
    dw, dbias = torch.empty(b, grid[1], taps, d, **wide), torch.empty(b, grid[1], d, **wide)
    launch(conv_kernels.conv_backward, grid, *tensors, dy, dx, dpast, dw, dbias, l, d, *x.stride()[:2], **cut)
    return dx, dw.sum((0, 1)).t().to(weight.dtype).contiguous(), dbias.sum((0, 1)), dpast


# --- torch's view of the kernels ------------------------------------------------------------------------------------


@torch.library.custom_op("bmojo::causal_conv", mutates_args=(), device_types="cuda")
def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, marks: Tensor | None) -> Tensor:
    return forward(x, weight, bias, state, marks)


@_conv.register_fake
def _(x, weight, bias, state, marks):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("bmojo::causal_conv_backward", mutates_args=(), device_types="cuda")
def _conv_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, marks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backward(dy, x, weight, bias, state, marks)


@_conv_backward.register_fake
def _(dy, x, weight, bias, state, marks):
    (b, _, d), taps = x.shape, weight.shape[1]
    wide = {"dtype": torch.float32, "device": x.device}
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    return dx, dw, torch.empty(d, **wide), torch.empty(b, 0 if state is None else taps - 1, d, **wide)


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    x, weight, bias, state, marks = ctx.saved_tensors
    dx, dw, dbias, dpast = _conv_backward(dy, x, weight, bias, state, marks)
    dbias = None if bias is None else dbias.to(bias.dtype)
    return dx, dw, dbias, None if state is None else dpast.to(state.dtype), None


_conv.register_autograd(_differentiate, setup_context=_keep)
