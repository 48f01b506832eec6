"""Operations of a model: norms, rotation, convolution, scan, innovation, selection, attention.

Everything here is a function of tensors, differentiable where mathematics is, and runs on any device. Nothing here
knows a config, a parameter or a state. What has a Triton kernel in `bmojo_cuda` asks `on_gpu` and uses it.

b batch, t tokens of the call, d channels, n state or columns, h query heads, g key/value heads, p head_dim, c chunks.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import bmojo_cuda
from bmojo_cuda.attention import fits, why_not
from bmojo_cuda.conv import MAX_TAPS
from bmojo_cuda.launch import has_triton
from bmojo_cuda.scan import MAX_STATES
from bmojo_cuda.selection import innovation
from bmojo_cuda.selection import select_eidetic as select_on_gpu
from bmojo_edge.torch.plain_attention import QUERY_TILE as QUERY_TILE
from bmojo_edge.torch.plain_attention import Band as Band
from bmojo_edge.torch.plain_attention import Pinned as Pinned
from bmojo_edge.torch.plain_attention import Queries as Queries
from bmojo_edge.torch.plain_attention import Slots as Slots
from bmojo_edge.torch.plain_attention import memory_attention_step as memory_attention_step
from bmojo_edge.torch.plain_attention import plain_attention
from bmojo_edge.torch.precision import linear_wide as linear_wide
from bmojo_edge.torch.precision import wide as wide

SCAN_STEPS = 32  # tokens of a scan's chunk: chunks advance together, then pass their states on


def on_gpu(x: Tensor) -> bool:
    """Whether `bmojo_cuda`'s kernels run on x: a CUDA tensor of a dtype they know, and Triton is installed."""
    return x.is_cuda and x.dtype != torch.float64 and has_triton()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed and returned in `wide` precision."""
    x = x.to(wide(x.dtype))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


# --- rotary positions (docs/model.md section 3, step 4) ---------------------------------------------------------------


class Rotary(NamedTuple):
    """Cosine and sine of each pair's angle at some positions."""

    cos: Tensor  # (b, n, p / 2)
    sin: Tensor  # (b, n, p / 2)


def rotary(positions: Tensor, turns: Tensor, dtype: torch.dtype) -> Rotary:
    """Angles of positions (b, n) int64 at `turns` (p / 2,) int64, in 2^-64 of a turn a token.

    The product wraps modulo 2^64, so positions may run for ever; only the fraction of a turn left becomes a float.
    """
    phase = positions[..., None] * turns
    angle = phase.to(dtype) * (2 * math.pi / 2.0**64)
    return Rotary(angle.cos(), angle.sin())


def rotate(x: Tensor, at: Rotary | None, inverse: bool = False) -> Tensor:
    """Rotate the pairs (j, j + p/2) of x (b, heads, n, p), in `wide` precision, back to x's dtype; `at` None: as is."""
    if at is None:
        return x
    cos, sin = at.cos[:, :, None], -at.sin[:, :, None] if inverse else at.sin[:, :, None]
    first, second = x.transpose(1, 2).to(cos.dtype).chunk(2, dim=-1)  # a token's heads stay side by side
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype).transpose(1, 2)


# --- short causal memories: convolution and innovation ----------------------------------------------------------------


def _delayed(x: Tensor, past: Tensor | None, taps: int, lookback: Tensor | None) -> list[Tensor]:
    """x delayed by 0 .. taps tokens, each (b, t, d): `past` (b, taps, d) stands before x, oldest first, None: zeros.

    Token n may look back at lookback[n] tokens, None: at all there are; beyond them it sees zeros.
    """
    padded, t = F.pad(x, (0, 0, taps, 0)) if past is None else torch.cat([past.to(x.dtype), x], dim=1), x.shape[1]
    delayed = [padded[:, taps - j : taps - j + t] for j in range(taps + 1)]
    if lookback is None:
        return delayed
    return [torch.where((lookback >= j)[..., None], y, 0) for j, y in enumerate(delayed)]


def causal_conv(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor | None, lookback: Tensor | None = None
) -> Tensor:
    """Depthwise causal convolution of x (b, t, d), after `past` (b, taps - 1, d), with weight (d, taps), oldest first.

    past None is zeros; lookback (b, t): how many earlier tokens each token may see, None = all. Computed and returned
    in `wide` precision.
    """
    kind, taps = wide(x.dtype), weight.shape[1]
    delayed = _delayed(x.to(kind), past, taps - 1, lookback)
    kernel = weight.to(kind)
    y = sum((y * kernel[:, taps - 1 - j] for j, y in enumerate(delayed)), start=torch.zeros((), dtype=kind))
    return y if bias is None else y + bias.to(kind)


def silu_conv(
    x: Tensor, past: Tensor | None, weight: Tensor, bias: Tensor | None, lookback: Tensor | None = None
) -> Tensor:
    """SiLU of `causal_conv`, in x's dtype."""
    if on_gpu(x) and 1 < weight.shape[1] <= MAX_TAPS:
        return bmojo_cuda.causal_conv(x, weight, bias, past, _segments(lookback))[0]
    return F.silu(causal_conv(x, past, weight, bias, lookback)).to(x.dtype)


def _segments(lookback: Tensor | None) -> Tensor | None:
    """Documents (b, t), as the kernels count them, of tokens that may look back at `lookback` (b, t) others."""
    return None if lookback is None else (lookback == 0).cumsum(dim=1)


@torch.no_grad()
def innovation_scores(
    signal: Tensor, past: Tensor | None, coefficients: list[float], error: str, lookback: Tensor | None = None
) -> Tensor:
    """How badly a fixed average of the past predicts a signal (step 5): (b, t) in `wide` precision, no gradient.

    signal (b, t, d); past (b, taps, d), oldest first, None = zeros; coefficients[0] weighs the latest value; error
    "relative" | "l2".
    """
    if on_gpu(signal):
        return innovation(signal, coefficients, past, error, _segments(lookback))
    kind = wide(signal.dtype)
    now, *earlier = _delayed(signal.to(kind), past, len(coefficients), lookback)
    miss = now.clone()
    for c, y in zip(coefficients, earlier, strict=True):
        miss -= c * y
    score = miss.square().sum(-1)
    return score if error == "l2" else score / (now.square().sum(-1) + 1e-6)


# --- selective scan (section 4) ---------------------------------------------------------------------------------------


def _scan_chunks(
    s: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Walk through chunks side by side: s (b, m, d, n), x and dt (b, m, q, d), B and C (b, m, q, n), reset (b, m, q).

    Returns the states at the ends of the chunks and, where C is given, the outputs of each step.
    """
    reads = [None] * x.shape[2] if C is None else C.unbind(2)
    resets = [None] * x.shape[2] if reset is None else reset.unbind(2)
    out = []
    steps = zip((dt * x).unbind(2), dt.unbind(2), B.unbind(2), reads, resets, strict=True)
    for dx_q, dt_q, B_q, C_q, reset_q in steps:
        decay = torch.exp(dt_q[..., None] * A)  # (b, m, d, n)
        if reset_q is not None:
            decay = decay.masked_fill(reset_q[..., None, None], 0)
        s = torch.addcmul(dx_q[..., None] * B_q[..., None, :], decay, s)
        if C_q is not None:
            out.append((s * C_q[..., None, :]).sum(-1))
    return s, out


def selective_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """s <- exp(dt A) s + dt B x, y = C s + D x (arXiv 2312.00752, algorithm 2): y (b, t, d) and the last s (b, d, n).

    x, dt (b, t, d); A (d, n); B, C (b, t, n); D (d); state (b, d, n). A token with dt = 0 leaves the state as it is;
    reset (b, t) marks tokens before which the state is forgotten. All in the dtype given, float32 or wider.

    Chunks of SCAN_STEPS tokens first find their own contribution side by side, then states are passed from chunk to
    chunk, then chunks run again from the right states. Only decays are multiplied, never divided by: no overflow.
    What the steps compute is 2 n times as large as y, so the backward pass computes it again.
    """
    inputs = (x, dt, A, B, C, D, state, reset)
    if torch.is_grad_enabled() and any(y is not None and y.requires_grad for y in inputs):
        return checkpoint(_scan, *inputs, use_reentrant=False, preserve_rng_state=False)
    return _scan(*inputs)


def gated_scan(
    x: Tensor,
    z: Tensor,
    dt: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    state: Tensor | None,
    reset: Tensor | None = None,
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` of x with steps softplus(dt + dt_bias), times SiLU(z): y (b, t, d) in x's dtype, and the state.

    state None is zeros; real (b, t): False at padding, which leaves the state as it is; None: no padding.
    """
    if on_gpu(x) and A.shape[1] <= MAX_STATES:
        segments = None if reset is None else reset.cumsum(dim=1)
        if real is not None:
            segments = torch.where(real, 0 if segments is None else segments, -1)
        return bmojo_cuda.selective_scan(x, dt, A, B, C, D, z, dt_bias, state, segments)
    kind = wide(x.dtype)
    steps = F.softplus(dt.to(kind) + dt_bias.to(kind))
    steps = steps if real is None else torch.where(real[..., None], steps, 0)
    first = x.new_zeros(x.shape[0], *A.shape, dtype=kind) if state is None else state
    y, last = selective_scan(x.to(kind), steps, A, B.to(kind), C.to(kind), D, first, reset)
    return (y * F.silu(z.to(kind))).to(x.dtype), last


def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    (b, t, d), n = x.shape, A.shape[1]
    q = min(SCAN_STEPS, t)
    m = -(-t // q)

    def split(y: Tensor) -> Tensor:
        return F.pad(y, (0, 0, 0, m * q - t)).view(b, m, q, -1)

    xs, dts, Bs, Cs = split(x), split(dt), split(B), split(C)
    resets = None if reset is None else F.pad(reset, (0, m * q - t)).view(b, m, q)
    starts = state[:, None]
    if m > 1:
        head = [y[:, :-1] for y in (xs, dts, Bs)]
        resets_head = None if resets is None else resets[:, :-1]
        added, _ = _scan_chunks(torch.zeros_like(starts), head[0], head[1], A, head[2], None, resets_head)
        kept = torch.exp(head[1].sum(2)[..., None] * A)  # (b, m - 1, d, n)
        if resets_head is not None:
            kept = kept.masked_fill(resets_head.any(2)[..., None, None], 0)
        passed = [state]
        for kept_m, added_m in zip(kept.unbind(1), added.unbind(1), strict=True):
            passed.append(torch.addcmul(added_m, kept_m, passed[-1]))
        starts = torch.stack(passed, dim=1)
    ends, out = _scan_chunks(starts, xs, dts, A, Bs, Cs, resets)
    y = torch.stack(out, dim=2).view(b, m * q, d)[:, :t]
    return torch.addcmul(y, x, D), ends[:, -1].view(b, d, n)


def selective_scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token of `selective_scan`: x, dt (b, d), B, C (b, n), state (b, d, n); y (b, d) and the new state."""
    state = torch.addcmul((dt * x)[..., None] * B[:, None], torch.exp(dt[..., None] * A), state)
    return torch.addcmul((state * C[:, None]).sum(-1), x, D), state


# --- eidetic choice (step 6) ------------------------------------------------------------------------------------------


class Candidates(NamedTuple):
    """What may be kept: n columns in order of position within each document."""

    scores: Tensor  # (b, n)
    position: Tensor  # (b, n), negative = no token
    document: Tensor | None  # (b, n); None: the call holds one document a row


class Grid(NamedTuple):
    """How chunks are cut when candidates are a call's own tokens and every chunk begins at a multiple of `size`."""

    size: int
    window: int


class Chunks(NamedTuple):
    """The chunks of a call, counted per row as they come, c at most: which positions a chunk's set may hold."""

    limit: Tensor  # (b, c) positions below this; 0 where a row has fewer chunks
    document: Tensor | None  # (b, c); None: the call holds one document a row
    grid: Grid | None = None  # None: chunks of a row may begin at any column


def _eligible(candidates: Candidates, chunks: Chunks, first: int) -> Tensor:
    """Which candidates compete in which chunk: (b, c, n)."""
    position = candidates.position[:, None]
    eligible = (position >= first) & (position < chunks.limit[..., None])
    if candidates.document is not None and chunks.document is not None:
        eligible = eligible & (candidates.document[:, None] == chunks.document[..., None])
    return eligible


def _columns(member: Tensor, size: int) -> Tensor:
    """Columns of the true entries of member (b, c, n), ascending, in `size` places, -1 where there are fewer."""
    places = (member.cumsum(-1) - 1).masked_fill(~member, size)
    columns = torch.arange(member.shape[-1], device=member.device).expand_as(places)
    out = torch.full((*member.shape[:-1], size + 1), -1, dtype=torch.int64, device=member.device)
    return out.scatter(-1, places, columns)[..., :size]


@torch.no_grad()
def select_eidetic(candidates: Candidates, chunks: Chunks, first: int, e: int) -> Tensor:
    """The e most surprising candidates of every chunk: (b, c, e) int64 columns, ascending, -1 = empty.

    Positions below `first` never compete; ties go to the earlier column. No gradient flows through a choice.
    """
    if chunks.grid is not None and on_gpu(candidates.scores):
        size, window = chunks.grid
        index = select_on_gpu(
            candidates.scores, window=window, chunk=size, n_eidetic=e, n_sinks=first, segment_ids=candidates.document
        )
        return torch.where(chunks.limit[..., None] > 0, index.long(), -1)
    order = candidates.scores.argsort(dim=-1, descending=True, stable=True)[:, None]  # (b, 1, n)
    eligible = _eligible(candidates, chunks, first)
    order = order.expand_as(eligible)
    eligible = eligible.gather(-1, order)
    best = eligible & (eligible.cumsum(-1, dtype=torch.int32) <= e)
    return _columns(torch.zeros_like(best).scatter(-1, order, best), e)


@torch.no_grad()
def find_eidetic(candidates: Candidates, chunks: Chunks, first: int, wanted: Tensor) -> Tensor:
    """Columns of the wanted positions (b, c, e), -1 = none: what `select_eidetic` returns when the sets are forced.

    Raises ValueError naming a position that its chunk cannot keep.
    """
    eligible = _eligible(candidates, chunks, first)
    member = torch.zeros_like(eligible)
    for one in wanted.unbind(-1):
        found = eligible & (candidates.position[:, None] == one[..., None]) & (one >= 0)[..., None]
        missing = (one >= 0) & ~found.any(-1)
        if missing.any():
            raise ValueError(f"eidetic_index: position {int(one[missing][0])} is not one this chunk can keep")
        member |= found
    return _columns(member, wanted.shape[-1])


# --- one softmax over every memory (step 7) ---------------------------------------------------------------------------


def memory_attention(bands: list[Band], pinned: Pinned | None, at: Queries, scale: float) -> Tensor:
    """One softmax over all memories of each of t tokens: (b, h, t, p).

    The first band must let every token see itself. Scores exist for QUERY_TILE tokens at a time, softmax is in `wide`
    precision, products in the values' dtype.
    """
    q = bands[0].q.transpose(1, 2)
    if on_gpu(q) and (pinned is None or at.aligned) and fits(q, at.chunk_size, pinned is not None):
        return _fused_attention(bands, pinned, at, scale)
    return plain_attention(bands, pinned, at, scale)


def why_plain(p: int, dtype: torch.dtype, chunk: int, aligned: bool) -> str | None:
    """Why a GPU reads eidetic memory and sinks by the plain operation, which is slow; None: a kernel does."""
    if not has_triton():
        return "Triton is not installed"
    if not aligned:
        return f"documents begin elsewhere than at multiples of chunk = {chunk}"
    return why_not(torch.empty(0, p, dtype=dtype), chunk, True)


def _fused_attention(bands: list[Band], pinned: Pinned | None, at: Queries, scale: float) -> Tensor:
    """`memory_attention` in one kernel: tokens before heads, and as many rows of in-context as of fading keys."""
    recent, older = bands[0], bands[1] if len(bands) > 1 else None
    t, longest = recent.q.shape[2], recent if older is None else older
    rows = longest.k.shape[2]

    def keys(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return x if x.shape[1] == rows else F.pad(x, (0, 0, 0, 0, rows - x.shape[1], 0))  # beyond the window

    segments, carried = at.document, rows - t
    if carried:
        own = torch.zeros_like(at.position) if segments is None else segments
        segments = torch.cat([torch.where(longest.position[:, :carried] < 0, -1, 0), own], dim=1)
    options: dict[str, Any] = {}
    if older is not None:
        options = {"k_fading": keys(older.k), "v_fading": keys(older.v)}
        options["q_fading"] = None if older.q is recent.q else older.q.transpose(1, 2)
    if pinned is not None:
        options["eidetic_index"] = pinned.columns[:, : -(-t // at.chunk_size)].int()
        options["q_eidetic"] = None if pinned.q is recent.q else pinned.q.transpose(1, 2)
        if pinned.k is not recent.k:
            options["k_eidetic"], options["v_eidetic"] = pinned.k.transpose(1, 2), pinned.v.transpose(1, 2)
        if carried:  # a kernel knows rows, not positions
            held, n = pinned.position[:, : pinned.own] - at.position[:, :1], pinned.k.shape[2] - pinned.own
            own = torch.arange(n, device=held.device).expand(len(held), -1)
            options["eidetic_position"] = torch.cat([held, own], dim=1) + carried
    out = bmojo_cuda.memory_attention(
        recent.q.transpose(1, 2), keys(recent.k), keys(recent.v), window=recent.far or rows,
        n_fading=0 if older is None or older.far is None else older.far - older.near, chunk=at.chunk_size,
        segment_ids=segments, scale=scale, **options,
    )  # fmt: skip
    return out.transpose(1, 2)
