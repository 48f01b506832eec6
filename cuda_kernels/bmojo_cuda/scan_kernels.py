"""Triton bodies of the selective scan (Mamba-1), forward and backward; scan.py launches them.

Time is cut into spans so that hundreds of warps are in flight: states at the ends of spans, states passed from span to
span, outputs of each span from its first state; backward is the mirror image. Inside a program channels lie on lanes
and the N states of a channel in registers: 1-D tensors, no shuffle, no shared memory. Tokens come in blocks of U, whose
loads all stand before their stores. Everything is float32 but what is read and written; no atomics, so results repeat.

Letters: b batch, l tokens, d channels, n states, s spans. A is in units of log2 (A * log2 e), (n, d). BC holds B and C
of a token side by side, two float32 seen as one int64, (b, l, n). RESET is (b, l) pairs of float32 seen as int64: what
is added to the exponent (0, or -1e30 where a document starts) and 1 for a real token, 0 for padding. Rows of both are
padded to whole segments.
"""

# Triton's language, not Python's: tuples grow by concatenation.
# ruff: noqa: RUF059, SIM102

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _reciprocal(x):
    """1 / x for x >= 1, without the care a division takes of every other x."""
    r = tl.rsqrt(x)
    return r * r


@triton.jit
def _sigmoid(x):
    return _reciprocal(1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) = max(x, 0) + 2 atanh(e / (2 + e)), e = exp(-|x|): exact enough for very negative x too."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    s = e * _reciprocal(2.0 + e)
    q = s * s
    series = 1.0 + q * (
        0.333333333 + q * (0.2 + q * (0.142857143 + q * (0.111111111 + q * (0.0909090909 + q * 0.085))))
    )
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def _pair(both):
    """Two float32 that were loaded as one int64."""
    first = both.to(tl.int32).to(tl.float32, bitcast=True)
    second = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def _block(X, stride, first, L, on, U: tl.constexpr):
    """Tokens first .. first + U - 1 of some channels as they are stored, 0 beyond the end."""
    xs = ()
    for u in tl.static_range(U):
        xs = xs + (tl.load(X + u * stride, mask=on & (first + u < L), other=0.0),)
    return xs


@triton.jit
def _states(BC, N: tl.constexpr):
    """B and C of one token, N pairs."""
    pairs = ()
    for n in tl.static_range(N):
        pairs = pairs + (tl.load(BC + n),)
    return pairs


@triton.jit
def _steps(
    raw, bias, first, L, RESET, U: tl.constexpr, SOFTPLUS: tl.constexpr, RESETS: tl.constexpr, EVEN: tl.constexpr
):
    """dt of a block's tokens, 0 where there is none, and what is added to their exponents."""
    dts = ()
    resets = ()
    for u in tl.static_range(U):
        dt = raw[u].to(tl.float32) + bias
        if SOFTPLUS:
            dt = _softplus(dt)
        reset = 0.0
        if RESETS:
            reset, real = _pair(tl.load(RESET + u))
            dt = dt * real
        if not EVEN:
            dt = tl.where(first + u < L, dt, 0.0)
        dts = dts + (dt,)
        resets = resets + (reset,)
    return dts, resets


@triton.jit
def _decay(dt, a, reset, RESETS: tl.constexpr):
    if RESETS:
        return tl.exp2(dt * a + reset)
    return tl.exp2(dt * a)


@triton.jit
def span_states(
    X, DT, BC, RESET, A, BIAS, ENDS, SUMS, L, D, span, x_b, x_t, dt_b, dt_t,
    N: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, SEGMENT: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, RESETS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """From a zero state: the state after every span but the last (b, s - 1, n, d), its sum of dt (b, s - 1, d)."""
    i, s, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    spans = tl.num_programs(1)
    d = i * BD + tl.arange(0, BD)
    on = d < D
    bias = tl.load(BIAS + d, mask=on, other=0.0) if HAS_BIAS else 0.0
    h = ()
    a = ()
    for n in tl.static_range(N):
        a = a + (tl.load(A + n * D + d, mask=on, other=0.0),)
        h = h + (tl.zeros([BD], tl.float32),)
    total = tl.zeros([BD], tl.float32)
    start = s * span
    x = X + b * x_b + start * x_t + d
    t = DT + b * dt_b + start * dt_t + d
    row = b * tl.cdiv(L, SEGMENT) * SEGMENT + start
    xs = _block(x, x_t, start, L, on, U)
    ts = _block(t, dt_t, start, L, on, U)
    pairs = _states(BC + row * N, N)
    for k in range(0, span, U):
        x += U * x_t
        t += U * dt_t
        ahead_x = _block(x, x_t, start + k + U, L, on, U)
        ahead_t = _block(t, dt_t, start + k + U, L, on, U)
        dts, resets = _steps(ts, bias, start + k, L, RESET + row, U, SOFTPLUS, RESETS, EVEN)
        for u in tl.static_range(U):
            row += 1
            ahead = _states(BC + row * N, N)
            total += dts[u]
            scaled = xs[u].to(tl.float32) * dts[u]
            after = ()
            for n in tl.static_range(N):
                B, C = _pair(pairs[n])
                after = after + (_decay(dts[u], a[n], resets[u], RESETS) * h[n] + scaled * B,)
            h = after
            pairs = ahead
        xs = ahead_x
        ts = ahead_t
    for n in tl.static_range(N):
        tl.store(ENDS + ((b * spans + s) * N + n) * D + d, h[n], mask=on)
    tl.store(SUMS + (b * spans + s) * D + d, total, mask=on)


@triton.jit
def pass_states(
    A, SUMS, FORGET, FIRST, ENDS, STATES, spans, D, BD: tl.constexpr, HAS_FIRST: tl.constexpr, RESETS: tl.constexpr
):
    """States at the start of every span, STATES (b, s, n, d), from ENDS (b, s - 1, n, d) and FIRST (b, n, d)."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    N = tl.num_programs(1)
    on = d < D
    a = tl.load(A + n * D + d, mask=on, other=0.0)
    h = tl.zeros([BD], tl.float32)
    if HAS_FIRST:
        h = tl.load(FIRST + (b * N + n) * D + d, mask=on, other=0.0)
    for s in range(spans - 1):
        tl.store(STATES + ((b * spans + s) * N + n) * D + d, h, mask=on)
        exponent = a * tl.load(SUMS + (b * (spans - 1) + s) * D + d, mask=on, other=0.0)
        if RESETS:
            exponent += tl.load(FORGET + b * (spans - 1) + s)
        h = tl.exp2(exponent) * h + tl.load(ENDS + ((b * (spans - 1) + s) * N + n) * D + d, mask=on, other=0.0)
    tl.store(STATES + ((b * spans + spans - 1) * N + n) * D + d, h, mask=on)


@triton.jit
def span_outputs(
    X, DT, Z, BC, RESET, A, SKIP, BIAS, FIRST, Y, SAVED, LAST, L, D, span, x_b, x_t, dt_b, dt_t, z_b, z_t,
    N: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, SEGMENT: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_FIRST: tl.constexpr, SOFTPLUS: tl.constexpr,
    RESETS: tl.constexpr, SAVE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Y (b, l, d) of a span from its first state FIRST (b, s, n, d); LAST (b, n, d) the state after the last token.

    With SAVE, SAVED (b, segments, n, d) takes the state before every SEGMENT tokens, for the backward pass.
    """
    i, s, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    spans = tl.num_programs(1)
    segments = tl.cdiv(L, SEGMENT)
    d = i * BD + tl.arange(0, BD)
    on = d < D
    bias = tl.load(BIAS + d, mask=on, other=0.0) if HAS_BIAS else 0.0
    skip = tl.load(SKIP + d, mask=on, other=0.0) if HAS_SKIP else 0.0
    h = ()
    a = ()
    for n in tl.static_range(N):
        a = a + (tl.load(A + n * D + d, mask=on, other=0.0),)
        if HAS_FIRST:
            h = h + (tl.load(FIRST + ((b * spans + s) * N + n) * D + d, mask=on, other=0.0),)
        else:
            h = h + (tl.zeros([BD], tl.float32),)
    start = s * span
    x = X + b * x_b + start * x_t + d
    t = DT + b * dt_b + start * dt_t + d
    z = Z + b * z_b + start * z_t + d
    row = b * segments * SEGMENT + start
    y = Y + (b * L + start) * D + d
    xs = _block(x, x_t, start, L, on, U)
    ts = _block(t, dt_t, start, L, on, U)
    zs = _block(z, z_t, start, L, on & HAS_Z, U)
    pairs = _states(BC + row * N, N)
    for k in range(0, tl.minimum(span, L - start), U):
        if SAVE:
            if (start + k) % SEGMENT == 0:
                for n in tl.static_range(N):
                    tl.store(SAVED + ((b * segments + (start + k) // SEGMENT) * N + n) * D + d, h[n], mask=on)
        x += U * x_t
        t += U * dt_t
        z += U * z_t
        ahead_x = _block(x, x_t, start + k + U, L, on, U)
        ahead_t = _block(t, dt_t, start + k + U, L, on, U)
        ahead_z = _block(z, z_t, start + k + U, L, on & HAS_Z, U)
        dts, resets = _steps(ts, bias, start + k, L, RESET + row, U, SOFTPLUS, RESETS, EVEN)
        for u in tl.static_range(U):
            row += 1
            ahead = _states(BC + row * N, N)
            value = xs[u].to(tl.float32)
            scaled = value * dts[u]
            even = skip * value
            odd = tl.zeros([BD], tl.float32)
            after = ()
            for n in tl.static_range(N):
                B, C = _pair(pairs[n])
                state = _decay(dts[u], a[n], resets[u], RESETS) * h[n] + scaled * B
                if n % 2 == 0:
                    even += state * C
                else:
                    odd += state * C
                after = after + (state,)
            h = after
            pairs = ahead
            out = even + odd
            if HAS_Z:
                gate = zs[u].to(tl.float32)
                out = out * gate * _sigmoid(gate)
            tl.store(y + u * D, out.to(Y.dtype.element_ty), mask=on & (start + k + u < L))
        y += U * D
        xs = ahead_x
        ts = ahead_t
        zs = ahead_z
    if s == spans - 1:
        for n in tl.static_range(N):
            tl.store(LAST + (b * N + n) * D + d, h[n], mask=on)


@triton.jit
def segment_adjoints(
    X, DT, Z, DY, BC, RESET, A, SKIP, BIAS, SAVED, BLOCKS, CARRY, SUMS, DZ, L, D, x_b, x_t, dt_b, dt_t, z_b, z_t,
    N: tl.constexpr, U: tl.constexpr, UB: tl.constexpr, BD: tl.constexpr, SEGMENT: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, RESETS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """First pass of backward, forward in time over one segment: its blocks' first states and what it hands to the left.

    BLOCKS (b, segments, SEGMENT / UB, n, d): the state before every UB tokens. CARRY (b, segments, n, d): the gradient
    of the state before the segment that comes from the segment itself; SUMS (b, segments, d): its sum of dt. The gate's
    gradient DZ (b, l, d) falls out on the way.
    """
    i, s, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    segments = tl.num_programs(1)
    d = i * BD + tl.arange(0, BD)
    on = d < D
    bias = tl.load(BIAS + d, mask=on, other=0.0) if HAS_BIAS else 0.0
    skip = tl.load(SKIP + d, mask=on, other=0.0) if HAS_SKIP else 0.0
    h = ()
    a = ()
    p = ()
    g = ()
    for n in tl.static_range(N):
        a = a + (tl.load(A + n * D + d, mask=on, other=0.0),)
        h = h + (tl.load(SAVED + ((b * segments + s) * N + n) * D + d, mask=on, other=0.0),)
        p = p + (tl.full([BD], 1.0, tl.float32),)
        g = g + (tl.zeros([BD], tl.float32),)
    total = tl.zeros([BD], tl.float32)
    start = s * SEGMENT
    row = b * segments * SEGMENT + start
    x = X + b * x_b + start * x_t + d
    t = DT + b * dt_b + start * dt_t + d
    z = Z + b * z_b + start * z_t + d
    at = (b * L + start) * D + d
    xs = _block(x, x_t, start, L, on, U)
    ts = _block(t, dt_t, start, L, on, U)
    zs = _block(z, z_t, start, L, on & HAS_Z, U)
    ups = _block(DY + at, D, start, L, on, U)
    pairs = _states(BC + row * N, N)
    for k in range(0, SEGMENT, U):
        if k % UB == 0:
            for n in tl.static_range(N):
                tl.store(BLOCKS + (((b * segments + s) * (SEGMENT // UB) + k // UB) * N + n) * D + d, h[n], mask=on)
        x += U * x_t
        t += U * dt_t
        z += U * z_t
        stop = tl.minimum(L, start + SEGMENT)
        ahead_x = _block(x, x_t, start + k + U, stop, on, U)
        ahead_t = _block(t, dt_t, start + k + U, stop, on, U)
        ahead_z = _block(z, z_t, start + k + U, stop, on & HAS_Z, U)
        ahead_up = _block(DY + at + U * D, D, start + k + U, stop, on, U)
        dts, resets = _steps(ts, bias, start + k, L, RESET + row, U, SOFTPLUS, RESETS, EVEN)
        for u in tl.static_range(U):
            row += 1
            ahead = _states(BC + row * N, N)
            total += dts[u]
            value = xs[u].to(tl.float32)
            scaled = value * dts[u]
            up = ups[u].to(tl.float32)
            dy = up
            gate = zs[u].to(tl.float32)
            half_open = tl.zeros([BD], tl.float32)
            if HAS_Z:
                half_open = _sigmoid(gate)
                dy = up * gate * half_open
            y = skip * value
            after = ()
            product = ()
            carry = ()
            for n in tl.static_range(N):
                B, C = _pair(pairs[n])
                decay = _decay(dts[u], a[n], resets[u], RESETS)
                state = decay * h[n] + scaled * B
                if HAS_Z:
                    y += state * C
                after = after + (state,)
                product = product + (decay * p[n],)
                carry = carry + (g[n] + product[n] * (C * dy),)
            h = after
            p = product
            g = carry
            pairs = ahead
            if HAS_Z:
                dz = up * y * half_open * (1.0 + gate * (1.0 - half_open))
                tl.store(DZ + at + u * D, dz.to(DZ.dtype.element_ty), mask=on & (start + k + u < L))
        at += U * D
        xs = ahead_x
        ts = ahead_t
        zs = ahead_z
        ups = ahead_up
    for n in tl.static_range(N):
        tl.store(CARRY + ((b * segments + s) * N + n) * D + d, g[n], mask=on)
    tl.store(SUMS + (b * segments + s) * D + d, total, mask=on)


@triton.jit
def pass_adjoints(
    A, SUMS, FORGET, LAST, CARRY, FIRST, segments, D,
    BD: tl.constexpr, U: tl.constexpr, HAS_LAST: tl.constexpr, RESETS: tl.constexpr,
):  # fmt: skip
    """CARRY (b, segments, n, d) becomes the gradient of the state after a segment, FIRST (b, n, d) that before all."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    N = tl.num_programs(1)
    on = d < D
    a = tl.load(A + n * D + d, mask=on, other=0.0)
    g = tl.zeros([BD], tl.float32)
    if HAS_LAST:
        g = tl.load(LAST + (b * N + n) * D + d, mask=on, other=0.0)
    for k in range(0, segments, U):
        owns = ()
        exponents = ()
        for u in tl.static_range(U):
            s = segments - 1 - k - u
            owns = owns + (tl.load(CARRY + ((b * segments + s) * N + n) * D + d, mask=on & (s >= 0), other=0.0),)
            exponent = a * tl.load(SUMS + (b * segments + s) * D + d, mask=on & (s >= 0), other=0.0)
            if RESETS:
                exponent += tl.load(FORGET + b * segments + s, mask=s >= 0, other=0.0)
            exponents = exponents + (exponent,)
        for u in tl.static_range(U):
            s = segments - 1 - k - u
            tl.store(CARRY + ((b * segments + s) * N + n) * D + d, g, mask=on & (s >= 0))
            g = tl.exp2(exponents[u]) * g + owns[u]
    tl.store(FIRST + (b * N + n) * D + d, g, mask=on)


@triton.jit
def _columns(r, COUNT: tl.constexpr):
    """1-D tensors (m,), a power of two of them up to 64, as the columns of one matrix (m, COUNT), in order."""
    m: tl.constexpr = r[0].shape[0]
    if COUNT >= 64:
        wide = ()
        for i in tl.static_range(32):
            wide = wide + (tl.join(r[i], r[i + 32]),)
        r = wide
    if COUNT >= 32:
        half = ()
        for i in tl.static_range(16):
            half = half + (tl.join(r[i], r[i + 16]),)
        r = half
    a = tl.join(tl.join(tl.join(r[0], r[8]), tl.join(r[4], r[12])), tl.join(tl.join(r[2], r[10]), tl.join(r[6], r[14])))
    b = tl.join(tl.join(tl.join(r[1], r[9]), tl.join(r[5], r[13])), tl.join(tl.join(r[3], r[11]), tl.join(r[7], r[15])))
    return tl.reshape(tl.join(a, b), [m, COUNT])


@triton.jit
def segment_gradients(
    X, DT, Z, DY, BC, RESET, A, SKIP, BIAS, BLOCKS, CARRY, DX, DDT, DBC, DA, DSKIP, DBIAS,
    L, D, x_b, x_t, dt_b, dt_t, z_b, z_t,
    N: tl.constexpr, NU: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, SEGMENT: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, RESETS: tl.constexpr, EVEN: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Second pass of backward, blocks of U tokens in reverse over one segment: the gradients that remain.

    CARRY (b, segments, n, d) holds the gradient of the state after the segment and serves as scratch. DBC (d / BD, b,
    segments, SEGMENT / U, n, 2, U), DA (b, segments, n, d), DSKIP, DBIAS (b, segments, d) take partial sums. EXACT
    sums over channels in float32; otherwise their terms are rounded to bfloat16 and one small matrix product adds.
    """
    i, s, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    segments = tl.num_programs(1)
    d = i * BD + tl.arange(0, BD)
    on = d < D
    bias = tl.load(BIAS + d, mask=on, other=0.0) if HAS_BIAS else 0.0
    skip = tl.load(SKIP + d, mask=on, other=0.0) if HAS_SKIP else 0.0
    own = (b * segments + s) * N * D + d  # this program's states in CARRY and DA
    dskip = tl.zeros([BD], tl.float32)
    dbias = tl.zeros([BD], tl.float32)
    column = tl.arange(0, NU * 2 * U)
    line = tl.arange(0, 16)
    for k in range(SEGMENT // U):
        block = SEGMENT // U - 1 - k
        start = s * SEGMENT + block * U
        row = b * segments * SEGMENT + start
        x = X + b * x_b + start * x_t + d
        out = (b * L + start) * D + d
        xs = _block(x, x_t, start, L, on, U)
        ts = _block(DT + b * dt_b + start * dt_t + d, dt_t, start, L, on, U)
        zs = _block(Z + b * z_b + start * z_t + d, z_t, start, L, on & HAS_Z, U)
        ups = _block(DY + out, D, start, L, on, U)
        firsts = BLOCKS + ((b * segments + s) * (SEGMENT // U) + block) * N * D + d
        an = ()
        first = ()
        right = ()
        before = ()
        for m in tl.static_range(NU):
            an = an + (tl.load(A + m * D + d, mask=on, other=0.0),)
            first = first + (tl.load(firsts + m * D, mask=on, other=0.0),)
            right = right + (tl.load(CARRY + own + m * D, mask=on, other=0.0),)
            before = before + (tl.load(DA + own + m * D, mask=on & (k > 0), other=0.0),)
        dts, resets = _steps(ts, bias, start, L, RESET + row, U, SOFTPLUS, RESETS, EVEN)
        scaled = ()
        dys = ()
        gx = ()
        gt = ()
        for u in tl.static_range(U):
            value = xs[u].to(tl.float32)
            dy = ups[u].to(tl.float32)
            if HAS_Z:
                gate = zs[u].to(tl.float32)
                dy = dy * gate * _sigmoid(gate)
            dskip += dy * value
            scaled = scaled + (value * dts[u],)
            dys = dys + (dy,)
            gx = gx + (tl.zeros([BD], tl.float32),)
            gt = gt + (tl.zeros([BD], tl.float32),)
        sums = DBC + (((i * tl.num_programs(2) + b) * segments + s) * (SEGMENT // U) + block) * N * 2 * U
        for n0 in range(0, N, NU):
            ahead_an = ()
            ahead_first = ()
            ahead_right = ()
            ahead_before = ()
            for m in tl.static_range(NU):  # what the next states need comes while these are computed
                n = n0 + NU + m
                more = on & (n < N)
                ahead_an = ahead_an + (tl.load(A + n * D + d, mask=more, other=0.0),)
                ahead_first = ahead_first + (tl.load(firsts + n * D, mask=more, other=0.0),)
                ahead_right = ahead_right + (tl.load(CARRY + own + n * D, mask=more, other=0.0),)
                ahead_before = ahead_before + (tl.load(DA + own + n * D, mask=more & (k > 0), other=0.0),)
            terms = ()
            for m in tl.static_range(NU):
                n = n0 + m
                h = first[m]
                decays = ()
                kept = ()
                dcs = ()
                pairs = ()
                for u in tl.static_range(U):
                    pairs = pairs + (tl.load(BC + (row + u) * N + n),)
                for u in tl.static_range(U):
                    B, C = _pair(pairs[u])
                    decay = _decay(dts[u], an[m], resets[u], RESETS)
                    keep = decay * h
                    h = scaled[u] * B + keep
                    decays = decays + (decay,)
                    kept = kept + (keep,)
                    dcs = dcs + (h * dys[u],)
                g = right[m]
                da = before[m]
                dbs = ()
                ngx = ()
                ngt = ()
                for v in tl.static_range(1, U + 1):
                    B, C = _pair(pairs[U - v])
                    dh = dys[U - v] * C + g
                    g = decays[U - v] * dh
                    de = dh * kept[U - v]  # gradient of the exponent dt * A
                    da += de * dts[U - v]
                    ngx = (gx[U - v] + dh * B,) + ngx
                    ngt = (gt[U - v] + de * an[m],) + ngt
                    dbs = (dh * scaled[U - v],) + dbs
                gx = ngx
                gt = ngt
                terms = terms + dbs + dcs
                tl.store(CARRY + own + n * D, g, mask=on)
                tl.store(DA + own + n * D, da, mask=on)
            if EXACT:
                for c in tl.static_range(NU * 2 * U):
                    tl.store(sums + n0 * 2 * U + c, tl.sum(terms[c], 0))
            else:
                ones = tl.full([16, BD], 1.0, tl.bfloat16)
                total = tl.dot(ones, _columns(terms, NU * 2 * U).to(tl.bfloat16))
                at = sums + n0 * 2 * U + column[None, :] + line[:, None] * 0
                tl.store(at, total, mask=line[:, None] == 0)
            an = ahead_an
            first = ahead_first
            right = ahead_right
            before = ahead_before
        xs = _block(x, x_t, start, L, on, U)
        for u in tl.static_range(U):
            mask = on & (start + u < L)
            # The exponent was dt A log2 e: A in units of log2 gives the gradient back the factor ln 2.
            ddt = gt[u] * LN2 + gx[u] * xs[u].to(tl.float32)
            if SOFTPLUS:  # sigmoid(raw) = 1 - exp(-dt); 0 at padding, where dt is 0
                dt = dts[u]
                series = dt * (1.0 - dt * (0.5 - dt * (0.1666666716 - dt * 0.0416666679)))
                ddt = ddt * tl.where(dt < 0.03, series, 1.0 - tl.exp2(dt * -LOG2E))
            elif RESETS:
                _, real = _pair(tl.load(RESET + row + u))
                ddt = ddt * real
            dbias += tl.where(mask, ddt, 0.0)
            tl.store(DX + out + u * D, (gx[u] * dts[u] + skip * dys[u]).to(DX.dtype.element_ty), mask=mask)
            tl.store(DDT + out + u * D, ddt.to(DDT.dtype.element_ty), mask=mask)
    tl.store(DSKIP + (b * segments + s) * D + d, dskip, mask=on)
    tl.store(DBIAS + (b * segments + s) * D + d, dbias, mask=on)
