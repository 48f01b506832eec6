"""Triton bodies of the depthwise causal convolution with SiLU, forward and backward; conv.py launches them.

Channels lie on lanes and the last TAPS - 1 inputs stay in registers while a program walks over SPAN tokens, so every
input is read once (and TAPS - 1 of the neighbouring span). MARKS (b, l) is that of the scan, a pair of float32 seen as
one int64: the first is not 0 where a document starts (what came before is forgotten), the second is 0 at padding (which
is never remembered).
"""

# Triton's language, not Python's: static loops need no variable, constant conditions stand alone.
# ruff: noqa: B007

import triton
import triton.language as tl

from bmojo_cuda.scan_kernels import _pair, _sigmoid


@triton.jit
def _push(window, x, forget, real, TAPS: tl.constexpr, RESETS: tl.constexpr):
    """The inputs a token sees, oldest first (TAPS of them), and the window after it."""
    seen = ()
    for j in tl.static_range(TAPS - 1):
        seen = seen + (tl.where(forget == 0.0, window[j], 0.0) if RESETS else window[j],)
    seen = seen + (x,)
    after = ()
    for j in tl.static_range(TAPS - 1):
        after = after + (tl.where(real != 0.0, seen[j + 1], window[j]) if RESETS else seen[j + 1],)
    return seen, after


@triton.jit
def _history(
    X, PAST, MARKS, b, start, L, d, on, x_b, x_t, D, TAPS: tl.constexpr, HAS_PAST: tl.constexpr, RESETS: tl.constexpr
):
    """The window before token `start`: the TAPS - 1 inputs before it, from PAST (b, TAPS - 1, d) before the first."""
    window = ()
    for j in tl.static_range(TAPS - 1):
        window = window + (tl.zeros_like(d).to(tl.float32),)
    for j in tl.static_range(TAPS - 1):
        at = start + j - (TAPS - 1)
        x = tl.load(X + b * x_b + at * x_t + d, mask=on & (at >= 0), other=0.0).to(tl.float32)
        if HAS_PAST:
            x += tl.load(PAST + (b * (TAPS - 1) + at + TAPS - 1) * D + d, mask=on & (at < 0), other=0.0).to(tl.float32)
        forget = 0.0
        real = 1.0
        if RESETS:
            forget, real = _pair(tl.load(MARKS + b * L + tl.maximum(at, 0)))
        _, window = _push(window, x, forget, real, TAPS, RESETS)
    return window


@triton.jit
def conv_forward(
    X, W, BIAS, PAST, MARKS, Y, L, D, x_b, x_t,
    TAPS: tl.constexpr, SPAN: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_PAST: tl.constexpr, RESETS: tl.constexpr,
):  # fmt: skip
    """Y (b, l, d) = SiLU(conv(X) + BIAS), 0 at padding. W is (taps, d) float32."""
    i, s, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    d = i * BD + tl.arange(0, BD)
    on = d < D
    bias = tl.load(BIAS + d, mask=on, other=0.0) if HAS_BIAS else 0.0
    w = ()
    for j in tl.static_range(TAPS):
        w = w + (tl.load(W + j * D + d, mask=on, other=0.0),)
    start = s * SPAN
    window = _history(X, PAST, MARKS, b, start, L, d, on, x_b, x_t, D, TAPS, HAS_PAST, RESETS)
    for k in range(0, tl.minimum(SPAN, L - start), U):
        xs = ()
        for u in tl.static_range(U):
            at = start + k + u
            xs = xs + (tl.load(X + b * x_b + at * x_t + d, mask=on & (at < L), other=0.0).to(tl.float32),)
        for u in tl.static_range(U):
            at = start + k + u
            forget = 0.0
            real = 1.0
            if RESETS:
                forget, real = _pair(tl.load(MARKS + b * L + tl.minimum(at, L - 1)))
            seen, window = _push(window, xs[u], forget, real, TAPS, RESETS)
            y = tl.zeros([BD], tl.float32) + bias
            for j in tl.static_range(TAPS):
                y += w[j] * seen[j]
            y = y * _sigmoid(y)
            if RESETS:
                y = y * real
            tl.store(Y + (b * L + at) * D + d, y.to(Y.dtype.element_ty), mask=on & (at < L))


@triton.jit
def conv_backward(
    X, W, BIAS, PAST, MARKS, DY, DX, DPAST, DW, DBIAS, L, D, x_b, x_t,
    TAPS: tl.constexpr, SPAN: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_PAST: tl.constexpr, RESETS: tl.constexpr,
):  # fmt: skip
    """DX (b, l, d), DPAST (b, TAPS - 1, d) float32, and partial sums DW (b, spans, taps, d), DBIAS (b, spans, d).

    A span takes TAPS - 1 tokens of its right neighbour too, which its own inputs reach; a token's gradient is complete,
    and is written, when the token TAPS - 1 after it has been seen.
    """
    i, s, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    spans = tl.num_programs(1)
    d = i * BD + tl.arange(0, BD)
    on = d < D
    bias = tl.load(BIAS + d, mask=on, other=0.0) if HAS_BIAS else 0.0
    w = ()
    dw = ()
    acc = ()  # gradients of the last TAPS - 1 inputs so far, oldest first
    live = ()  # 1 where that input is of the same document
    for j in tl.static_range(TAPS):
        w = w + (tl.load(W + j * D + d, mask=on, other=0.0),)
        dw = dw + (tl.zeros([BD], tl.float32),)
    for j in tl.static_range(TAPS - 1):
        acc = acc + (tl.zeros([BD], tl.float32),)
        live = live + (1.0,)
    dbias = tl.zeros([BD], tl.float32)
    start = s * SPAN
    window = _history(X, PAST, MARKS, b, start, L, d, on, x_b, x_t, D, TAPS, HAS_PAST, RESETS)
    for k in range(0, SPAN + TAPS - 1, U):
        xs = ()
        dys = ()
        for u in tl.static_range(U):
            at = start + k + u
            mask = on & (at < L) & (k + u < SPAN + TAPS - 1)
            xs = xs + (tl.load(X + b * x_b + at * x_t + d, mask=mask, other=0.0).to(tl.float32),)
            dys = dys + (tl.load(DY + (b * L + at) * D + d, mask=mask, other=0.0).to(tl.float32),)
        for u in tl.static_range(U):
            at = start + k + u
            forget = 0.0
            real = 1.0
            if RESETS:
                forget, real = _pair(tl.load(MARKS + b * L + tl.minimum(at, L - 1)))
            seen, window = _push(window, xs[u], forget, real, TAPS, RESETS)
            y = tl.zeros([BD], tl.float32) + bias
            for j in tl.static_range(TAPS):
                y += w[j] * seen[j]
            gate = _sigmoid(y)
            up = dys[u] * gate * (1.0 + y * (1.0 - gate))
            if RESETS:
                up = up * real
            own = k + u < SPAN  # tokens of the right neighbour give to inputs only
            sums = ()
            for j in tl.static_range(TAPS):
                sums = sums + (dw[j] + tl.where(own, up * seen[j], 0.0),)
            dw = sums
            dbias += tl.where(own, up, 0.0)
            alive = ()
            for j in tl.static_range(TAPS - 1):
                alive = alive + ((tl.where(forget == 0.0, live[j], 0.0) if RESETS else live[j]),)
            full = ()
            for j in tl.static_range(TAPS - 1):
                full = full + (acc[j] + up * w[j] * alive[j],)
            full = full + (up * w[TAPS - 1],)
            done = at - (TAPS - 1)
            tl.store(
                DX + (b * L + done) * D + d, full[0].to(DX.dtype.element_ty),
                mask=on & (done >= start) & (done < start + SPAN) & (done < L),
            )  # fmt: skip
            if HAS_PAST:
                tl.store(DPAST + (b * (TAPS - 1) + at) * D + d, full[0], mask=on & (done < 0))
            acc = ()
            live = ()
            for j in tl.static_range(TAPS - 1):
                acc = acc + (full[j + 1],)
                live = live + ((alive[j + 1] if j + 2 < TAPS else real),)
    for j in tl.static_range(TAPS):
        tl.store(DW + ((b * spans + s) * TAPS + j) * D + d, dw[j], mask=on)
    tl.store(DBIAS + (b * spans + s) * D + d, dbias, mask=on)
