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
from bmojo_cuda.attention import fits
from bmojo_cuda.conv import MAX_TAPS
from bmojo_cuda.launch import has_triton
from bmojo_cuda.scan import MAX_STATES
from bmojo_cuda.selection import innovation
from bmojo_cuda.selection import select_eidetic as select_on_gpu

SCAN_STEPS = 32  # tokens of a scan's chunk: chunks advance together, then pass their states on
QUERY_TILE = 128  # queries whose scores exist at one time


def on_gpu(x: Tensor) -> bool:
    """Whether `bmojo_cuda`'s kernels run on x: a CUDA tensor of a dtype they know, and Triton is installed."""
    return x.is_cuda and x.dtype != torch.float64 and has_triton()


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


class Queries(NamedTuple):
    """Where t tokens stand that read memories."""

    position: Tensor  # (b, t) within the document
    document: Tensor | None  # (b, t), -1 = padding; None: the call holds one document a row
    chunk: Tensor  # (b, t) ordinal of the token's chunk within the call
    place: Tensor  # (b, t) its place in the grid of c chunks of chunk_size tokens, c * chunk_size = padding
    chunk_size: int
    aligned: bool = False  # place = column, but for padding


class Band(NamedTuple):
    """A memory read by distance: its columns are m carried slots (of document 0), then the call's t tokens, in order.

    A token sees the columns of its document with near <= its position - theirs < far; far None: all from near on.
    """

    q: Tensor  # (b, h, t, p)
    k: Tensor  # (b, g, m + t, p)
    v: Tensor  # (b, g, m + t, p)
    position: Tensor  # (b, m + t), negative = nothing written
    document: Tensor | None  # (b, m + t)
    near: int
    far: int | None


class Pinned(NamedTuple):
    """A memory read by index: each chunk lists the columns its tokens may see, from `near` tokens on."""

    q: Tensor  # (b, h, t, p)
    k: Tensor  # (b, g, n, p)
    v: Tensor  # (b, g, n, p)
    position: Tensor  # (b, n)
    columns: Tensor  # (b, c, e) of the chunk's own document, -1 = none
    near: int
    own: int = 0  # column of the call's first token; those before were carried


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """Scaled products of q (b, h, t, p) and k (b, g, n, p): (b, h, t, n) in `wide` precision."""
    (b, h, t, p), g = q.shape, k.shape[1]
    products = q.reshape(b, g, h // g * t, p) @ k.transpose(-1, -2)
    return products.view(b, h, t, -1).to(wide(q.dtype)) * scale


def _mix(weights: Tensor, v: Tensor) -> Tensor:
    """weights (b, h, t, n) over v (b, g, n, p): (b, h, t, p)."""
    (b, h, t, n), g = weights.shape, v.shape[1]
    return (weights.reshape(b, g, h // g * t, n) @ v).view(b, h, t, -1)


def _in_sight(band: Band, begin: int, end: int) -> slice:
    """Columns that tokens begin .. end - 1 may see, from the order of columns alone: shapes never depend on data."""
    t = band.q.shape[2]
    m = band.k.shape[2] - t
    sees_carried = band.far is None or begin + 1 < band.far
    oldest = 0 if sees_carried or band.far is None else m + begin - band.far + 1
    return slice(oldest, max(oldest, m + end - band.near if end > band.near else m))


def _band_scores(band: Band, at: Queries, begin: int, end: int, scale: float) -> tuple[Tensor, Tensor]:
    """Scores of tokens begin .. end - 1, -inf where nothing is visible, and the values they weigh."""
    seen = _in_sight(band, begin, end)
    position = band.position[:, None, seen]
    distance = at.position[:, begin:end, None] - position  # (b, tile, n)
    visible = (distance >= band.near) & (position >= 0)
    if band.far is not None:
        visible &= distance < band.far
    if at.document is not None and band.document is not None:
        visible &= at.document[:, begin:end, None] == band.document[:, None, seen]
    scores = _scores(band.q[:, :, begin:end], band.k[:, :, seen], scale)
    return scores.masked_fill(~visible[:, None], -math.inf), band.v[:, :, seen]


class _PinnedReader:
    """A pinned memory read chunk by chunk: tokens are laid out on a grid of chunks, lists are gathered once a chunk."""

    def __init__(self, memory: Pinned, at: Queries) -> None:
        b, c, e = memory.columns.shape
        g, p = memory.k.shape[1], memory.k.shape[3]
        self.q, self.g, self.c, self.size = memory.q, g, c, at.chunk_size
        columns = memory.columns.clamp(min=0).view(b, c * e)
        rows = columns[:, None, :, None].expand(b, g, c * e, p)
        self.k, self.v = (x.gather(2, rows).view(b, g, c, e, p) for x in (memory.k, memory.v))
        self.place = at.place[:, None, :, None]
        position = memory.position.gather(1, columns).view(b, c, e)
        position = position.masked_fill(memory.columns < 0, torch.iinfo(torch.int64).max)
        position = position.gather(1, at.chunk[..., None].expand(-1, -1, e))
        self.visible = position <= (at.position - memory.near)[..., None]  # (b, t, e)

    def _to_grid(self, x: Tensor) -> Tensor:
        """(b, h, t, y) as (b, g, c, h / g * size, y), zeros where no token stands."""
        (b, h, _, y), cells = x.shape, self.c * self.size
        grid = x.new_zeros(b, h, cells + 1, y).scatter(2, self.place.expand_as(x), x)[:, :, :cells]
        return grid.view(b, self.g, h // self.g, self.c, self.size, y).transpose(2, 3).flatten(3, 4)

    def _from_grid(self, x: Tensor) -> Tensor:
        """The inverse of `_to_grid`; what padding gets is of no consequence."""
        b, g, c, _, y = x.shape
        grid = x.view(b, g, c, -1, self.size, y).transpose(2, 3).reshape(b, -1, c * self.size, y)
        place = self.place.clamp(max=c * self.size - 1)
        return grid.gather(2, place.expand(b, grid.shape[1], -1, y))

    def scores(self, scale: float) -> Tensor:
        """(b, h, t, e), -inf where a column is not visible."""
        scores = self._from_grid(self._to_grid(self.q) @ self.k.transpose(-1, -2)).to(wide(self.q.dtype)) * scale
        return scores.masked_fill(~self.visible[:, None], -math.inf)

    def mix(self, weights: Tensor) -> Tensor:
        """weights (b, h, t, e) over each chunk's values: (b, h, t, p)."""
        return self._from_grid(self._to_grid(weights) @ self.v)


def memory_attention(bands: list[Band], pinned: Pinned | None, at: Queries, scale: float) -> Tensor:
    """One softmax over all memories of each of t tokens: (b, h, t, p).

    The first band must let every token see itself. Scores exist for QUERY_TILE tokens at a time, softmax is in `wide`
    precision, products in the values' dtype.
    """
    q = bands[0].q.transpose(1, 2)
    if on_gpu(q) and (pinned is None or at.aligned) and fits(q, at.chunk_size, pinned is not None):
        return _fused_attention(bands, pinned, at, scale)
    reader = None if pinned is None else _PinnedReader(pinned, at)
    pinned_scores = None if reader is None else reader.scores(scale)
    t, out, pinned_weights = bands[0].q.shape[2], [], []
    for begin in range(0, t, QUERY_TILE):
        end = min(begin + QUERY_TILE, t)
        scores, values = zip(*(_band_scores(band, at, begin, end, scale) for band in bands), strict=True)
        scores = [*scores] if pinned_scores is None else [*scores, pinned_scores[:, :, begin:end]]
        weights = torch.cat(scores, dim=-1).softmax(dim=-1).to(values[0].dtype)
        parts = weights.split([s.shape[-1] for s in scores], dim=-1)
        out.append(sum(_mix(w, v) for w, v in zip(parts, values, strict=False)))
        pinned_weights.append(parts[-1])
    mixed = torch.cat(out, dim=2)
    return mixed if reader is None else mixed + reader.mix(torch.cat(pinned_weights, dim=2))


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


class Slots(NamedTuple):
    """A memory of one decoding step: its query, its slots, and which of them are visible."""

    q: Tensor  # (b, h, 1, p)
    k: Tensor  # (b, g, n, p)
    v: Tensor  # (b, g, n, p)
    visible: Tensor  # (b, n)


def memory_attention_step(memories: list[Slots], scale: float) -> Tensor:
    """`memory_attention` for one token: (b, h, 1, p). Keys stay where they are; only scores are put side by side."""
    scores = [_scores(m.q, m.k, scale).masked_fill(~m.visible[:, None, None], -math.inf) for m in memories]
    weights = torch.cat(scores, dim=-1).softmax(dim=-1).to(memories[0].v.dtype)
    parts = weights.split([s.shape[-1] for s in scores], dim=-1)
    return torch.stack([_mix(w, m.v) for w, m in zip(parts, memories, strict=True)]).sum(0)
