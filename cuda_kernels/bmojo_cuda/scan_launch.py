"""Launches the Triton kernels of the selective scan: how they are cut, what they read, how their parts are added up.

It knows shapes and dtypes; the arithmetic is in scan_kernels.py, the public op in scan.py.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from bmojo_cuda.launch import launch, streaming_multiprocessors

LOG2E = 1.4426950408889634
SEGMENT = 64  # tokens between saved states
TILE = 64  # channels of a plane's tile, as in scan_kernels
MAX_STATES = 256  # of one channel: 8 a lane
GROUP = 16  # states that the backward pass takes at a time


class Walk(NamedTuple):
    """How the forward kernel is cut: states a lane, tokens a round (at least a tile), tokens whose B and C wait."""

    states: int = 4
    tokens: int = 8
    ahead: int = 2

    def lanes(self, n: int) -> int:
        """Lanes that share the n states of a channel, a power of two."""
        return 1 << (-(-n // self.states) - 1).bit_length()


class Plan(NamedTuple):
    """How a backward kernel is cut: channels a program (at most TILE), tokens a block, warps, states summed at once."""

    channels: int
    tokens: int
    warps: int = 1
    states: int = 1

    def options(self) -> dict[str, int]:
        """What Triton is told beside the kernel's own constants."""
        return {"num_warps": self.warps, "num_stages": 1}


FORWARD = Walk()
FORWARD_WIDE = Walk(states=8, tokens=4)  # above 16 states
ADJOINTS = Plan(32, 2)
GRADIENTS = Plan(64, 8)


def _spans(warps: int, l: int, processors: int) -> int:
    """Spans that time is cut into: 1 where `warps` half fill the GPU (16 a processor), else as many as fill it."""
    room = 16 * processors
    return 1 if 2 * warps >= room else max(1, min(room // warps, l // (2 * SEGMENT)))


def _rows(t: Tensor) -> Tensor:
    """t itself where channels lie side by side, else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _interleaved(B: Tensor, C: Tensor, segments: int) -> Tensor:
    """B and C of a (token, state) as one integer, rows padded to whole segments: (b, segments * SEGMENT, n)."""
    b, l, n = B.shape
    packed = torch.bfloat16 if B.dtype == C.dtype == torch.bfloat16 else torch.float32
    flat = B.new_empty(b * segments * SEGMENT + 1, n, 2, dtype=packed)  # the kernels look one token ahead
    both = flat[:-1].view(b, segments * SEGMENT, n, 2)
    both[:, :l, :, 0] = B
    both[:, :l, :, 1] = C
    if l % SEGMENT:
        both[:, l:] = 0
    return both.view(torch.int32 if packed == torch.bfloat16 else torch.int64)[..., 0]


def _planes(t: Tensor) -> Tensor:
    """(..., d, n) as float32 planes (..., d / TILE, n, TILE)."""
    t, more = t.float(), -t.shape[-2] % TILE
    padded = F.pad(t, (0, 0, 0, more)) if more else t
    return padded.unflatten(-2, (-1, TILE)).transpose(-1, -2).contiguous()


def _from_planes(t: Tensor, d: int) -> Tensor:
    """Planes (..., d / TILE, n, TILE) as (..., d, n)."""
    return t.transpose(-1, -2).flatten(-3, -2)[..., :d, :].contiguous()


class _Setting(NamedTuple):
    """What all kernels of one call share."""

    b: int
    l: int
    d: int
    n: int
    segments: int
    A: Tensor  # a plane, in units of log2
    marks: Tensor  # (b, segments * SEGMENT) int64, see scan_kernels; any tensor without RESETS
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
    x: Tensor, dt: Tensor, A: Tensor, z: Tensor | None, dt_bias: Tensor | None, marks: Tensor | None, softplus: bool
) -> _Setting:
    (b, l, d), n = x.shape, A.shape[1]
    segments = -(-l // SEGMENT)
    gate = x if z is None else z
    strides = tuple(stride for t in (x, dt, gate) for stride in t.stride()[:2])
    flags = {
        "HAS_Z": z is not None, "HAS_BIAS": dt_bias is not None, "SOFTPLUS": softplus, "RESETS": marks is not None,
        "EVEN": l % SEGMENT == 0,
    }  # fmt: skip
    plane = _planes(A.float() * LOG2E)
    if marks is None:
        padded = plane
    else:
        padded = F.pad(marks, (0, 0, 0, segments * SEGMENT - l)).contiguous().view(torch.int64)[..., 0]
    return _Setting(b, l, d, n, segments, plane, padded, strides, flags)


def _padded(t: Tensor, rows: int, n: int, more: int) -> Tensor:
    """t (b, l, n') as float32 (b * rows + more, n) with zeros around; of the last `more` rows nothing is used."""
    b, l, own = t.shape
    flat = t.new_empty(b * rows + more, n, dtype=torch.float32)
    body = flat[: b * rows].view(b, rows, n)
    if (l, own) != (rows, n):
        body.zero_()
    body[:, :l, :own] = t
    return flat


def forward(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None,
    state: Tensor | None, marks: Tensor | None, softplus: bool, save: bool, walk: Walk | None = None,
    spans: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y (b, l, d), last state (b, d, n), and with `save` the states before every segment, planes (b, segments, ...)."""
    from bmojo_cuda import scan_kernels as kernels

    x, dt, z = _rows(x), _rows(dt), None if z is None else _rows(z)
    at = _setting(x, dt, A, z, dt_bias, marks, softplus)
    b, l, d, n, segments = at[:5]
    walk = walk or (FORWARD if n <= 16 else FORWARD_WIDE)
    lanes = walk.lanes(n)
    tiles = max(1, walk.tokens // lanes)
    blocks = -(-d // (32 // lanes))
    spans = _spans(b * blocks, l, streaming_multiprocessors(x)) if spans is None else spans
    span = -(-segments // spans) * SEGMENT
    spans = -(-l // span)
    wide = {"dtype": torch.float32, "device": x.device}
    Bs, Cs = (_padded(t, segments * SEGMENT, lanes * walk.states, tiles * lanes + walk.ahead) for t in (B, C))
    skip, bias = (at.A if t is None else t.float().contiguous() for t in (D, dt_bias))
    first = None if state is None else _planes(state)
    y = torch.empty(b, l, d, dtype=x.dtype, device=x.device)
    fill = torch.zeros if d % TILE else torch.empty  # an output of the op: nothing in it may be left to chance
    saved = fill((b, segments, *at.A.shape) if save else (0,), **wide)
    last = torch.empty(b, *at.A.shape, **wide)
    inputs = (x, dt, x if z is None else z, Bs, Cs, at.marks, at.A, skip, bias)
    cut = {
        "N": n, "G": lanes, "W": walk.states, "R": tiles, "AHEAD": walk.ahead, "SEGMENT": SEGMENT,
        "HAS_SKIP": D is not None, **at.flags, "num_warps": 1, "num_stages": 1,
    }  # fmt: skip
    starts = first
    if spans > 1:
        starts = torch.empty(b, spans, *at.A.shape, **wide)
        ends, sums = torch.empty(b, spans - 1, *at.A.shape, **wide), torch.empty(b, spans - 1, d, **wide)
        launch(
            kernels.scan_spans, (blocks, spans - 1, b),
            *inputs, at.A, y, saved, ends, sums, l, d, span, -1, *at.strides, HAS_FIRST=False, OUTPUTS=False, **cut,
        )  # fmt: skip
        launch(
            kernels.pass_states, (-(-at.A.numel() // 256), b),
            at.A, sums, at.forget(spans - 1, span), at.A if first is None else first, ends, starts, spans, d,
            N=n, BD=256, HAS_FIRST=first is not None, RESETS=marks is not None, num_warps=4,
        )  # fmt: skip
    launch(
        kernels.scan_spans, (blocks, spans, b),
        *inputs, at.A if starts is None else starts, y, saved, last, last, l, d, span,
        0 if save else -1, *at.strides, HAS_FIRST=starts is not None, OUTPUTS=True, **cut,
    )  # fmt: skip
    return y, _from_planes(last, d), saved


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
    state: Tensor | None  # (b, d, n) float32; None where it was not asked for


def backward(
    dy: Tensor, dlast: Tensor | None, saved: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, marks: Tensor | None, softplus: bool,
    of_state: bool = True, adjoints: Plan = ADJOINTS, gradients: Plan = GRADIENTS,
) -> Gradients:  # fmt: skip
    """Gradients from those of y (b, l, d) and of the last state (b, d, n), None = zero.

    The states of a channel only meet in sums, so that GROUP of them are taken at a time: what a lane can hold.
    """
    plans, n = (adjoints, gradients), A.shape[1]
    if n <= GROUP:
        return _backward(dy, dlast, saved, x, dt, A, B, C, D, z, dt_bias, marks, softplus, of_state, None, *plans)
    found = []
    for first in range(0, n, GROUP):
        part = slice(first, min(n, first + GROUP))
        found.append(
            _backward(
                dy, None if dlast is None else dlast[..., part], saved[..., part, :].contiguous(), x, dt, A[:, part],
                B[..., part], C[..., part], None if first else D, z, dt_bias, marks, softplus, of_state, torch.float32,
                *plans,
            )
        )  # fmt: skip

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in found], -1)

    def total(name: str, like: Tensor) -> Tensor:
        return functools.reduce(torch.add, [getattr(part, name) for part in found]).to(like.dtype)

    return Gradients(
        total("x", x), total("dt", dt), joined("A"), joined("B"), joined("C"), found[0].D,
        None if z is None else total("z", z), None if dt_bias is None else total("dt_bias", dt_bias),
        joined("state") if of_state else None,
    )  # fmt: skip


def _backward(
    dy: Tensor, dlast: Tensor | None, saved: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, dt_bias: Tensor | None, marks: Tensor | None, softplus: bool, of_state: bool,
    dtype: torch.dtype | None, adjoints: Plan, gradients: Plan,
) -> Gradients:  # fmt: skip
    """`backward` of at most GROUP states; gradients of x, dt, z and dt_bias in `dtype`, None = their own."""
    from bmojo_cuda import scan_kernels as kernels

    x, dt, z, dy = _rows(x), _rows(dt), None if z is None else _rows(z), dy.contiguous()
    at = _setting(x, dt, A, z, dt_bias, marks, softplus)
    BC = _interleaved(B, C, -(-x.shape[1] // SEGMENT))
    b, l, d, n, segments = at[:5]
    wide = {"dtype": torch.float32, "device": x.device}
    skip, bias = (at.A if t is None else t.float().contiguous() for t in (D, dt_bias))
    gate = x if z is None else z
    dx, ddt = (torch.empty(b, l, d, dtype=dtype or t.dtype, device=x.device) for t in (x, dt))
    dz = None if z is None else torch.empty(b, l, d, dtype=dtype or z.dtype, device=x.device)
    unit = gradients.tokens
    blocks = torch.empty(b, segments, SEGMENT // unit, *at.A.shape, **wide)
    carry, sums = torch.empty(b, segments, *at.A.shape, **wide), torch.empty(b, segments, d, **wide)
    launch(
        kernels.segment_adjoints, (-(-d // adjoints.channels), segments, b),
        x, dt, gate, dy, BC, at.marks, at.A, skip, bias, saved, blocks, carry, sums, dx if dz is None else dz, l, d,
        *at.strides, N=n, U=adjoints.tokens, UB=unit, BD=adjoints.channels, SEGMENT=SEGMENT, HAS_SKIP=D is not None,
        **at.flags, **adjoints.options(),
    )  # fmt: skip
    dfirst = torch.empty(b, *at.A.shape, **wide)
    launch(
        kernels.pass_adjoints, (-(-at.A.numel() // 256), b),
        at.A, sums, at.forget(segments, SEGMENT), at.A if dlast is None else _planes(dlast),
        carry, dfirst, segments, d, N=n, BD=256, U=8, HAS_LAST=dlast is not None, RESETS=marks is not None, num_warps=4,
    )  # fmt: skip
    parts = -(-d // gradients.channels)
    dBC = torch.empty(parts, b, segments, SEGMENT // unit, n, 2, unit, **wide)
    dA = torch.empty(b, segments, *at.A.shape, **wide)
    dskip, dbias = (torch.empty(b, segments, d, **wide) for _ in range(2))
    launch(
        kernels.segment_gradients, (parts, segments, b),
        x, dt, gate, dy, BC.transpose(1, 2).contiguous(), at.marks, at.A, skip, bias, blocks, carry,
        dx, ddt, dBC, dA, dskip, dbias, l, d, *at.strides, N=n, NU=math.gcd(n, gradients.states), U=unit,
        BD=gradients.channels, SEGMENT=SEGMENT, HAS_SKIP=D is not None, EXACT=x.dtype == torch.float32, **at.flags,
        **gradients.options(),
    )  # fmt: skip
    dB, dC = dBC.sum(0).permute(4, 0, 1, 2, 5, 3).reshape(2, b, -1, n)[:, :, :l]
    return Gradients(
        dx, ddt, _from_planes(dA.sum((0, 1)), d).to(A.dtype), dB.to(B.dtype, copy=True), dC.to(C.dtype, copy=True),
        None if D is None else dskip.sum((0, 1)).to(D.dtype), dz,
        None if dt_bias is None else dbias.sum((0, 1)).to(dtype or dt_bias.dtype),
        _from_planes(dfirst, d) if of_state else None,
    )  # fmt: skip
