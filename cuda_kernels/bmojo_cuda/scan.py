"""The selective scan of Mamba-1 (S6): public op, launcher of the Triton kernels, plain reference.

s_t = exp(dt_t A) s_{t-1} + dt_t B_t x_t and y_t = (C_t s_t + D x_t) SiLU(z_t) (arXiv 2312.00752, algorithm 2), with a
state carried in and out, both with gradients, and documents that start afresh. It knows nothing of projections.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bmojo_cuda.documents import forget_marks, real_tokens, starts
from bmojo_cuda.launch import has_triton, launch, streaming_multiprocessors

LOG2E = 1.4426950408889634
SEGMENT = 64  # tokens between saved states
MAX_STATES = 64  # of one channel: they live in registers


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
    argument from both. Raises ValueError naming the argument whose shape is wrong.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, state, segment_ids)
    if x.is_cuda and has_triton() and A.shape[1] <= MAX_STATES and x.dtype != torch.float64:
        marks = None if segment_ids is None else forget_marks(segment_ids)
        inputs = (x, dt, A, B, C, D, z, dt_bias, state)
        save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        y, last, _ = _scan(*inputs, marks, dt_softplus, save)
        return y, last
    return selective_scan_reference(x, dt, A, B, C, D, z, dt_bias, state, segment_ids, dt_softplus)


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


# --- launcher -------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """How one kernel is cut: channels a program, tokens a block, warps, states whose sums over channels go together."""

    channels: int
    tokens: int
    warps: int = 1
    states: int = 2


FORWARD = Plan(64, 4)
ADJOINTS = Plan(32, 8)
GRADIENTS = Plan(64, 8)


def _spans(b: int, l: int, d: int, plan: Plan, processors: int) -> int:
    """Spans that time is cut into: enough for eight warps a multiprocessor, none shorter than two segments."""
    programs = b * -(-d // plan.channels) * plan.warps
    wanted = -(-8 * processors // programs)
    return max(1, min(wanted, l // (2 * SEGMENT)))


def _rows(t: Tensor) -> Tensor:
    """t itself where channels lie side by side, else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _interleaved(B: Tensor, C: Tensor, segments: int) -> Tensor:
    """B and C as one int64 a (token, state), rows padded to whole segments, and one more at the end."""
    b, l, n = B.shape
    flat = B.new_zeros(b * segments * SEGMENT + 1, n, 2, dtype=torch.float32)
    both = flat[:-1].view(b, segments * SEGMENT, n, 2)
    both[:, :l, :, 0] = B
    both[:, :l, :, 1] = C
    return flat.view(torch.int64)[..., 0]


class _Setting(NamedTuple):
    """What all kernels of one call share."""

    b: int
    l: int
    d: int
    n: int
    segments: int
    A: Tensor  # (n, d), in units of log2
    BC: Tensor
    marks: Tensor  # (b, segments * SEGMENT) int64, see scan_kernels
    strides: tuple[int, ...]
    flags: dict[str, bool]

    def forget(self, spans: int, span: int) -> Tensor:
        """What a whole span adds to the exponent of its decay, (b, spans)."""
        if not self.flags["RESETS"]:
            return self.A
        marks = self.marks.view(torch.float32).view(self.b, -1, 2)[..., 0]
        marks = F.pad(marks, (0, max(0, spans * span - marks.shape[1])))[:, : spans * span]
        return marks.reshape(self.b, spans, span).amin(-1).contiguous()


def _setting(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, z: Tensor | None, dt_bias: Tensor | None,
    marks: Tensor | None, softplus: bool,
) -> _Setting:  # fmt: skip
    (b, l, d), n = x.shape, A.shape[1]
    segments = -(-l // SEGMENT)
    gate = x if z is None else z
    strides = tuple(stride for t in (x, dt, gate) for stride in t.stride()[:2])
    flags = {
        "HAS_Z": z is not None, "HAS_BIAS": dt_bias is not None, "SOFTPLUS": softplus, "RESETS": marks is not None,
        "EVEN": l % SEGMENT == 0,
    }  # fmt: skip
    packed = _interleaved(B, C, segments)
    if marks is not None:
        pairs = marks.new_zeros(b, segments * SEGMENT, 2)
        pairs[:, :l] = marks
        marks = pairs.view(torch.int64)[..., 0]
    log2A = (A.float() * LOG2E).t().contiguous()
    return _Setting(b, l, d, n, segments, log2A, packed, packed if marks is None else marks, strides, flags)


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    state: Tensor | None, marks: Tensor | None, softplus: bool, save: bool, plan: Plan = FORWARD,
    spans: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (b, l, d), last state (b, d, n), and with `save` the states before every segment (b, segments, n, d)."""
    from bmojo_cuda import scan_kernels as kernels

    x, dt, z = _rows(x), _rows(dt), None if z is None else _rows(z)
    at = _setting(x, dt, A, B, C, z, dt_bias, marks, softplus)
    b, l, d, n, segments = at[:5]
    spans = _spans(b, l, d, plan, streaming_multiprocessors(x)) if spans is None else spans
    span = -(-segments // spans) * SEGMENT
    spans = -(-l // span)
    wide = {"dtype": torch.float32, "device": x.device}
    bias = at.A if dt_bias is None else dt_bias.float().contiguous()
    first = None if state is None else state.float().transpose(1, 2).contiguous()  # (b, n, d)
    blocks = -(-d // plan.channels)
    cut = {"N": n, "U": plan.tokens, "BD": plan.channels, "num_warps": plan.warps, "num_stages": 1}
    keys = ("HAS_BIAS", "SOFTPLUS", "RESETS", "EVEN")
    starts_ = first
    if spans > 1:
        starts_ = torch.empty(b, spans, n, d, **wide)
        ends, sums = torch.empty(b, spans - 1, n, d, **wide), torch.empty(b, spans - 1, d, **wide)
        launch(
        kernels.span_states, (blocks, spans - 1, b),
            x, dt, at.BC, at.marks, at.A, bias, ends, sums, l, d, span, *at.strides[:4],
            SEGMENT=SEGMENT, **{key: at.flags[key] for key in keys}, **cut,
        )  # fmt: skip
        launch(
        kernels.pass_states, (-(-d // 256), n, b),
            at.A, sums, at.forget(spans - 1, span), at.A if first is None else first, ends, starts_, spans, d,
            BD=256, HAS_FIRST=first is not None, RESETS=marks is not None, num_warps=4,
        )  # fmt: skip
    y = torch.empty(b, l, d, dtype=x.dtype, device=x.device)
    saved = torch.empty((b, segments, n, d) if save else (0,), **wide)
    last = torch.empty(b, n, d, **wide)
    launch(
        kernels.span_outputs, (blocks, spans, b),
        x, dt, x if z is None else z, at.BC, at.marks, at.A, at.A if D is None else D.float().contiguous(), bias,
        at.A if starts_ is None else starts_, y, saved, last, l, d, span, *at.strides,
        SEGMENT=SEGMENT, HAS_SKIP=D is not None, HAS_FIRST=starts_ is not None, SAVE=save, **at.flags, **cut,
    )  # fmt: skip
    return y, last.transpose(1, 2).contiguous(), saved


class Gradients(NamedTuple):
    """Of a scan's float arguments, each in its argument's dtype (None where the argument was None)."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    state: Tensor  # (b, d, n) float32


def backward(
    dy: Tensor, dlast: Tensor | None, saved: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, marks: Tensor | None, softplus: bool,
    adjoints: Plan = ADJOINTS, gradients: Plan = GRADIENTS,
) -> Gradients:  # fmt: skip
    """Gradients from those of y (b, l, d) and of the last state (b, d, n)."""
    from bmojo_cuda import scan_kernels as kernels

    x, dt, z, dy = _rows(x), _rows(dt), None if z is None else _rows(z), dy.contiguous()
    at = _setting(x, dt, A, B, C, z, dt_bias, marks, softplus)
    b, l, d, n, segments = at[:5]
    wide = {"dtype": torch.float32, "device": x.device}
    bias = at.A if dt_bias is None else dt_bias.float().contiguous()
    gate = x if z is None else z
    skip = at.A if D is None else D.float().contiguous()
    dx, ddt = (torch.empty(b, l, d, dtype=t.dtype, device=x.device) for t in (x, dt))
    dz = None if z is None else torch.empty(b, l, d, dtype=z.dtype, device=x.device)
    unit = gradients.tokens
    blocks = torch.empty(b, segments, SEGMENT // unit, n, d, **wide)
    carry, sums = torch.empty(b, segments, n, d, **wide), torch.empty(b, segments, d, **wide)
    launch(
        kernels.segment_adjoints, (-(-d // adjoints.channels), segments, b),
        x, dt, gate, dy, at.BC, at.marks, at.A, skip, bias, saved, blocks, carry, sums, dx if dz is None else dz, l, d,
        *at.strides, N=n, U=adjoints.tokens, UB=unit, BD=adjoints.channels, SEGMENT=SEGMENT, HAS_SKIP=D is not None,
        **at.flags, num_warps=adjoints.warps, num_stages=1,
    )  # fmt: skip
    dfirst = torch.empty(b, n, d, **wide)
    launch(
        kernels.pass_adjoints, (-(-d // 256), n, b),
        at.A, sums, at.forget(segments, SEGMENT), at.A if dlast is None else dlast.float().transpose(1, 2).contiguous(),
        carry, dfirst, segments, d, BD=256, U=8, HAS_LAST=dlast is not None, RESETS=marks is not None, num_warps=4,
    )  # fmt: skip
    parts = -(-d // gradients.channels)
    dBC = torch.empty(parts, b, segments, SEGMENT // unit, n, 2, unit, **wide)
    dA = torch.empty(b, segments, n, d, **wide)
    dskip, dbias = (torch.empty(b, segments, d, **wide) for _ in range(2))
    launch(
        kernels.segment_gradients, (parts, segments, b),
        x, dt, gate, dy, at.BC, at.marks, at.A, skip, bias, blocks, carry, dx, ddt, dBC, dA, dskip, dbias, l, d,
        *at.strides, N=n, NU=math.gcd(n, gradients.states), U=unit, BD=gradients.channels, SEGMENT=SEGMENT,
        HAS_SKIP=D is not None, EXACT=x.dtype == torch.float32, **at.flags, num_warps=gradients.warps, num_stages=1,
    )  # fmt: skip
    dB, dC = dBC.sum(0).permute(4, 0, 1, 2, 5, 3).reshape(2, b, -1, n)[:, :, :l]
    return Gradients(
        dx, ddt, dA.sum((0, 1)).t().to(A.dtype), dB.to(B.dtype), dC.to(C.dtype),
        None if D is None else dskip.sum((0, 1)).to(D.dtype), dz,
        None if dt_bias is None else dbias.sum((0, 1)).to(dt_bias.dtype), dfirst.transpose(1, 2).contiguous(),
    )  # fmt: skip


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
    saved = (b, -(-l // SEGMENT), n, d) if save else (0,)
    wide = {"dtype": torch.float32, "device": x.device}
    return (
        torch.empty((b, l, d), dtype=x.dtype, device=x.device),
        torch.empty(b, d, n, **wide),
        torch.empty(saved, **wide),
    )


@torch.library.custom_op("bmojo::selective_scan_backward", mutates_args=(), device_types="cuda")
def _scan_backward(
    dy: Tensor, dlast: Tensor, saved: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, dt_bias: Tensor | None, marks: Tensor | None, softplus: bool,
) -> list[Tensor]:  # fmt: skip
    found = backward(dy, dlast, saved, x, dt, A, B, C, D, z, dt_bias, marks, softplus)
    return [t for t in found if t is not None]


@_scan_backward.register_fake
def _(dy, dlast, saved, x, dt, A, B, C, D, z, dt_bias, marks, softplus):
    given = [x, dt, A, B, C, *(t for t in (D, z, dt_bias) if t is not None)]
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in given] + [torch.empty_like(dlast)]


def _keep(ctx, inputs, output) -> None:
    x, dt, A, B, C, D, z, dt_bias, state, marks, ctx.softplus, save = inputs
    if not save:
        return
    ctx.has_state = state is not None
    ctx.save_for_backward(output[2], x, dt, A, B, C, D, z, dt_bias, marks)
    ctx.mark_non_differentiable(output[2])


def _differentiate(ctx, dy, dlast, _):
    saved, x, dt, A, B, C, D, z, dt_bias, marks = ctx.saved_tensors
    found = iter(_scan_backward(dy, dlast, saved, x, dt, A, B, C, D, z, dt_bias, marks, ctx.softplus))
    grads = [None if t is None else next(found) for t in (x, dt, A, B, C, D, z, dt_bias)]
    return *grads, next(found) if ctx.has_state else None, None, None, None


_scan.register_autograd(_differentiate, setup_context=_keep)
