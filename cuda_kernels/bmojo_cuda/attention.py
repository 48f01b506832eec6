"""Memory attention: one softmax over the in-context, fading and eidetic keys of every query (docs/model.md, step 7).

The public op and its registration with torch. It knows nothing of how keys are made or rotated, nor of how eidetic
tokens are chosen: it reads lists of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from bmojo_cuda import attention_launch
from bmojo_cuda.attention_reference import memory_attention_reference, slots_of
from bmojo_cuda.documents import document_bounds
from bmojo_cuda.launch import has_triton, warn_of_plain_op

HEAD_DIMS = (32, 64, 96, 128)


def memory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_fading: Tensor | None = None,
    v_fading: Tensor | None = None,
    eidetic_index: Tensor | None = None,
    *,
    window: int,
    n_fading: int = 0,
    chunk: int = 64,
    n_sinks: int = 0,
    segment_ids: Tensor | None = None,
    q_fading: Tensor | None = None,
    q_eidetic: Tensor | None = None,
    k_eidetic: Tensor | None = None,
    v_eidetic: Tensor | None = None,
    eidetic_position: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One softmax over three memories; Triton kernels on CUDA tensors, plain torch elsewhere.

    q (b, lq, h, p); k, v (b, lk, g, p) with g dividing h and lk >= lq: the last lq rows are the queries' own tokens,
    those before are a carried past. Query i, whose own row is a = i + lk - lq, sees rows j of its document:
    in-context 0 <= a - j < window of k, v; fading window <= a - j < window + n_fading of k_fading, v_fading
    (b, lk, g, p);
    and of k_eidetic, v_eidetic (b, r, g, p; default k, v) the rows in eidetic_index (b, ceil(lq / chunk), e),
    -1 = empty, of its chunk i // chunk, and the first n_sinks of its document, where these stand at or before
    a - window.
    A row of k_eidetic stands at its own index, or at eidetic_position (b, r).
    segment_ids (b, lk): a change starts a document, -1 is padding; documents start at multiples of chunk where
    there are eidetic rows or sinks. q_fading, q_eidetic (b, lq, h, p): queries of their own for the fading and the
    eidetic keys (default q), such as rotary queries pinned at one distance. scale defaults to 1 / sqrt(p).

    Returns (b, lq, h, p) in q's dtype. Gradients flow to all floats, none through the choice of rows, and repeat bit
    for bit. Raises ValueError naming the argument whose shape is wrong.
    """
    given = (q, k, v, k_fading, v_fading, q_fading, q_eidetic, k_eidetic, v_eidetic)
    _check(*given, eidetic_index, segment_ids, eidetic_position, window, n_fading, chunk)
    if q.is_cuda and has_triton():
        refusal = why_not(q, chunk, eidetic_index is not None or n_sinks > 0)
        if refusal is None:
            shape = (window, n_fading, chunk, n_sinks, scale)
            arguments = prepared(given, eidetic_index, eidetic_position, segment_ids, shape)
            ordinary = type(q) in (Tensor, Parameter) and not torch.compiler.is_compiling()
            return (_Eager.apply if ordinary else _attend)(*arguments)[0]  # pyright: ignore[reportIndexIssue]
        warn_of_plain_op("memory_attention", refusal)
    return memory_attention_reference(
        q, k, v, k_fading, v_fading, eidetic_index, window=window, n_fading=n_fading, chunk=chunk, n_sinks=n_sinks,
        segment_ids=segment_ids, q_fading=q_fading, q_eidetic=q_eidetic, k_eidetic=k_eidetic, v_eidetic=v_eidetic,
        eidetic_position=eidetic_position, scale=scale,
    )  # fmt: skip


def why_not(q: Tensor, chunk: int, slots: bool) -> str | None:
    """Why the kernels do not take these queries, None if they do."""
    if q.shape[-1] not in HEAD_DIMS:
        return f"the kernels know head_dim {HEAD_DIMS}, not {q.shape[-1]}"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels do not compute in {q.dtype}"
    if slots and chunk % 32:
        return f"with eidetic rows or sinks the kernels need a chunk that is a multiple of 32, not {chunk}"
    return None


def fits(q: Tensor, chunk: int, slots: bool) -> bool:
    """Whether the kernels take these queries, with `slots` (eidetic rows or sinks) or without."""
    return why_not(q, chunk, slots) is None


def prepared(
    floats: tuple[Tensor | None, ...],
    eidetic_index: Tensor | None,
    eidetic_position: Tensor | None,
    segment_ids: Tensor | None,
    shape: tuple[int, int, int, int, float | None],
) -> tuple[Any, ...]:
    """Arguments of the launchers from those of the public op: floats in the order of `Gradients`, sinks among slots."""
    q, k = floats[0], floats[1]
    assert q is not None and k is not None
    window, n_fading, chunk, n_sinks, scale = shape
    slots = slots_of(q, eidetic_index, n_sinks, segment_ids, k.shape[1], chunk)
    bounds = (None, None) if segment_ids is None else document_bounds(segment_ids)
    if slots is not None:
        slots = slots.to(torch.int32).contiguous()
    if not n_fading:
        floats = (*floats[:3], None, None, None, *floats[6:])
    position = None if eidetic_position is None else eidetic_position.to(torch.int32).contiguous()
    return *floats, slots, position, *bounds, window, n_fading, chunk, q.shape[-1] ** -0.5 if scale is None else scale


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_fading: Tensor | None,
    v_fading: Tensor | None,
    q_fading: Tensor | None,
    q_eidetic: Tensor | None,
    k_eidetic: Tensor | None,
    v_eidetic: Tensor | None,
    eidetic_index: Tensor | None,
    segment_ids: Tensor | None,
    eidetic_position: Tensor | None,
    window: int,
    n_fading: int,
    chunk: int,
) -> None:
    if q.ndim != 4 or not q.shape[1]:
        raise ValueError(f"q: must have shape (b, l, h, p) with l > 0, got {tuple(q.shape)}")
    (b, lq, h, p), lk, g = q.shape, k.shape[1], k.shape[2]
    if k.ndim != 4 or k.shape != (b, lk, g, p) or lk < lq or h % g:
        raise ValueError(f"k: must have shape ({b}, at least {lq}, a divisor of {h}, {p}), got {tuple(k.shape)}")
    if window < 1 or n_fading < 0 or chunk < 1:
        raise ValueError(f"window, n_fading, chunk: must be at least 1, 0, 1; got {window}, {n_fading}, {chunk}")
    if n_fading and (k_fading is None or v_fading is None):
        raise ValueError(f"k_fading, v_fading: are required with n_fading = {n_fading}")
    r = lk if k_eidetic is None else k_eidetic.shape[1]
    chunks, e = -(-lq // chunk), 0 if eidetic_index is None else eidetic_index.shape[-1]
    wanted = {
        "k": (k, (b, lk, g, p)), "v": (v, (b, lk, g, p)),
        "k_fading": (k_fading, (b, lk, g, p)), "v_fading": (v_fading, (b, lk, g, p)),
        "q_fading": (q_fading, (b, lq, h, p)), "q_eidetic": (q_eidetic, (b, lq, h, p)),
        "k_eidetic": (k_eidetic, (b, r, g, p)), "v_eidetic": (v_eidetic, (b, r, g, p)),
        "eidetic_index": (eidetic_index, (b, chunks, e)), "segment_ids": (segment_ids, (b, lk)),
        "eidetic_position": (eidetic_position, (b, r)),
    }  # fmt: skip
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: must have shape {shape}, got {tuple(tensor.shape)}")
        if tensor is not None and tensor.is_floating_point() and (tensor.dtype, tensor.device) != (q.dtype, q.device):
            wrong = f"must be {q.dtype} on {q.device} like q, got {tensor.dtype} on {tensor.device}"
            raise ValueError(f"{name}: {wrong}")
    if k_eidetic is not None and v_eidetic is None and r != lk:
        raise ValueError(f"v_eidetic: is required where k_eidetic has other rows than k ({r}, {lk})")
    if eidetic_index is None and eidetic_position is not None:
        raise ValueError("eidetic_position: means nothing without eidetic_index")


# --- torch's view of the kernels ------------------------------------------------------------------------------------


@torch.library.custom_op("bmojo::memory_attention", mutates_args=(), device_types="cuda")
def _attend(
    q: Tensor, k: Tensor, v: Tensor, k_fading: Tensor | None, v_fading: Tensor | None, q_fading: Tensor | None,
    q_eidetic: Tensor | None, k_eidetic: Tensor | None, v_eidetic: Tensor | None, slots: Tensor | None,
    position: Tensor | None, start: Tensor | None, end: Tensor | None, window: int, n_fading: int, chunk: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return attention_launch.forward(
        q, k, v, k_fading, v_fading, q_fading, q_eidetic, k_eidetic, v_eidetic, slots, position, start, end, window,
        n_fading, chunk, scale,
    )  # fmt: skip


@_attend.register_fake
def _(q, *_):
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("bmojo::memory_attention_backward", mutates_args=(), device_types="cuda")
def _attend_backward(
    do: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, k_fading: Tensor | None,
    v_fading: Tensor | None, q_fading: Tensor | None, q_eidetic: Tensor | None, k_eidetic: Tensor | None,
    v_eidetic: Tensor | None, slots: Tensor | None, position: Tensor | None, start: Tensor | None, end: Tensor | None,
    window: int, n_fading: int, chunk: int, scale: float,
) -> list[Tensor]:  # fmt: skip
    found = attention_launch.backward(
        do, out, lse, q, k, v, k_fading, v_fading, q_fading, q_eidetic, k_eidetic, v_eidetic, slots, position, start,
        end, window, n_fading, chunk, scale,
    )  # fmt: skip
    return [t for t in found if t is not None]


@_attend_backward.register_fake
def _(do, out, lse, *inputs):
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in inputs[:9] if t is not None]


def _keep(ctx, inputs, output) -> None:
    ctx.numbers = inputs[13:]
    ctx.save_for_backward(*output, *inputs[:13])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, do, _):
    out, lse, *inputs = ctx.saved_tensors
    found = iter(_attend_backward(do, out, lse, *inputs, *ctx.numbers))
    return *(None if t is None else next(found) for t in inputs[:9]), *(None,) * 8


_attend.register_autograd(_differentiate, setup_context=_keep)


class _Eager(torch.autograd.Function):
    """`_attend` for ordinary tensors: torch's own wrapping of a custom op takes longer than launching the kernels."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        found = attention_launch.forward(*arguments)
        _keep(ctx, arguments, found)
        return found

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        out, lse, *inputs = ctx.saved_tensors
        return *attention_launch.backward(grad_outputs[0], out, lse, *inputs, *ctx.numbers), *(None,) * 8
