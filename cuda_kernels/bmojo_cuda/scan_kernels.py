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
# pyright: reportMissingImports=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false, reportGeneralTypeIssues=false
# pyright: reportOptionalOperand=false, reportOptionalMemberAccess=false, reportReturnType=false

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) with a small relative error for very negative x too (dt is then about exp(x))."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    series = e * (1.0 - e * (0.5 - e * (0.3333333433 - e * 0.25)))
    return tl.maximum(x, 0.0) + tl.where(e < 0.03, series, LN2 * tl.log2(1.0 + e))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def _pair(pointer):
    """Two neighbouring float32 with one 64-bit load."""
    both = tl.load(pointer)
    first = both.to(tl.int32).to(tl.float32, bitcast=True)
    second = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return first, second


@triton.jit
def _step(DT, offset, bias, mask, RESET, row, SOFTPLUS: tl.constexpr, RESETS: tl.constexpr, EVEN: tl.constexpr):
    """dt of one token (0 where there is none), and what is added to its exponent."""
    raw = tl.load(DT + offset, mask=mask, other=0.0).to(tl.float32) + bias
    dt = _softplus(raw) if SOFTPLUS else raw
    reset = 0.0
    if RESETS:
        reset, real = _pair(RESET + row)
        dt = dt * real
    if not EVEN:
        dt = tl.where(mask, dt, 0.0)
    return dt, reset


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
    for k in range(0, span, U):
        scaled = ()
        dts = ()
        resets = ()
        for u in tl.static_range(U):
            mask = on & (start + k + u < L)
            dt, reset = _step(t, u * dt_t, bias, mask, RESET, row + u, SOFTPLUS, RESETS, EVEN)
            scaled = scaled + (tl.load(x + u * x_t, mask=mask, other=0.0).to(tl.float32) * dt,)
            dts = dts + (dt,)
            resets = resets + (reset,)
        for u in tl.static_range(U):
            total += dts[u]
            after = ()
            for n in tl.static_range(N):
                B, C = _pair(BC + (row + u) * N + n)
                after = after + (_decay(dts[u], a[n], resets[u], RESETS) * h[n] + scaled[u] * B,)
            h = after
        x += U * x_t
        t += U * dt_t
        row += U
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
    for k in range(0, tl.minimum(span, L - start), U):
        if SAVE:
            if (start + k) % SEGMENT == 0:
                for n in tl.static_range(N):
                    tl.store(SAVED + ((b * segments + (start + k) // SEGMENT) * N + n) * D + d, h[n], mask=on)
        xs = ()
        zs = ()
        dts = ()
        resets = ()
        for u in tl.static_range(U):
            mask = on & (start + k + u < L)
            dt, reset = _step(t, u * dt_t, bias, mask, RESET, row + u, SOFTPLUS, RESETS, EVEN)
            xs = xs + (tl.load(x + u * x_t, mask=mask, other=0.0).to(tl.float32),)
            if HAS_Z:
                zs = zs + (tl.load(z + u * z_t, mask=mask, other=0.0),)
            dts = dts + (dt,)
            resets = resets + (reset,)
        ys = ()
        for u in tl.static_range(U):
            scaled = dts[u] * xs[u]
            even = skip * xs[u]
            odd = tl.zeros([BD], tl.float32)
            after = ()
            for n in tl.static_range(N):
                B, C = _pair(BC + (row + u) * N + n)
                state = _decay(dts[u], a[n], resets[u], RESETS) * h[n] + scaled * B
                if n % 2 == 0:
                    even += state * C
                else:
                    odd += state * C
                after = after + (state,)
            h = after
            out = even + odd
            if HAS_Z:
                gate = zs[u].to(tl.float32)
                out = out * gate * _sigmoid(gate)
            ys = ys + (out,)
        for u in tl.static_range(U):
            tl.store(y + u * D, ys[u].to(Y.dtype.element_ty), mask=on & (start + k + u < L))
        x += U * x_t
        t += U * dt_t
        z += U * z_t
        y += U * D
        row += U
    if s == spans - 1:
        for n in tl.static_range(N):
            tl.store(LAST + (b * N + n) * D + d, h[n], mask=on)


@triton.jit
def segment_adjoints(
    X, DT, Z, DY, BC, RESET, A, BIAS, SAVED, BLOCKS, CARRY, SUMS, L, D, x_b, x_t, dt_b, dt_t, z_b, z_t,
    N: tl.constexpr, U: tl.constexpr, UB: tl.constexpr, BD: tl.constexpr, SEGMENT: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, RESETS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """First pass of backward, forward in time over one segment: its blocks' first states and what it hands to the left.

    BLOCKS (b, segments, SEGMENT / UB, n, d): the state before every UB tokens. CARRY (b, segments, n, d): the gradient
    of the state before the segment that comes from the segment itself; SUMS (b, segments, d): its sum of dt.
    """
    i, s, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    segments = tl.num_programs(1)
    d = i * BD + tl.arange(0, BD)
    on = d < D
    bias = tl.load(BIAS + d, mask=on, other=0.0) if HAS_BIAS else 0.0
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
    dy = DY + (b * L + start) * D + d
    for k in range(0, SEGMENT, U):
        if k % UB == 0:
            for n in tl.static_range(N):
                tl.store(BLOCKS + (((b * segments + s) * (SEGMENT // UB) + k // UB) * N + n) * D + d, h[n], mask=on)
        scaled = ()
        dts = ()
        dys = ()
        resets = ()
        for u in tl.static_range(U):
            mask = on & (start + k + u < L)
            dt, reset = _step(t, u * dt_t, bias, mask, RESET, row + u, SOFTPLUS, RESETS, EVEN)
            up = tl.load(dy + u * D, mask=mask, other=0.0).to(tl.float32)
            if HAS_Z:
                gate = tl.load(z + u * z_t, mask=mask, other=0.0).to(tl.float32)
                up = up * gate * _sigmoid(gate)
            scaled = scaled + (tl.load(x + u * x_t, mask=mask, other=0.0).to(tl.float32) * dt,)
            dts = dts + (dt,)
            dys = dys + (up,)
            resets = resets + (reset,)
        for u in tl.static_range(U):
            total += dts[u]
            after = ()
            product = ()
            carry = ()
            for n in tl.static_range(N):
                B, C = _pair(BC + (row + u) * N + n)
                decay = _decay(dts[u], a[n], resets[u], RESETS)
                after = after + (decay * h[n] + scaled[u] * B,)
                product = product + (decay * p[n],)
                carry = carry + (g[n] + product[n] * (C * dys[u]),)
            h = after
            p = product
            g = carry
        x += U * x_t
        t += U * dt_t
        z += U * z_t
        dy += U * D
        row += U
    for n in tl.static_range(N):
        tl.store(CARRY + ((b * segments + s) * N + n) * D + d, g[n], mask=on)
    tl.store(SUMS + (b * segments + s) * D + d, total, mask=on)


@triton.jit
def pass_adjoints(
    A, SUMS, FORGET, LAST, CARRY, FIRST, segments, D, BD: tl.constexpr, HAS_LAST: tl.constexpr, RESETS: tl.constexpr
):
    """CARRY (b, segments, n, d) becomes the gradient of the state after a segment, FIRST (b, n, d) that before all."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    n, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    N = tl.num_programs(1)
    on = d < D
    a = tl.load(A + n * D + d, mask=on, other=0.0)
    g = tl.zeros([BD], tl.float32)
    if HAS_LAST:
        g = tl.load(LAST + (b * N + n) * D + d, mask=on, other=0.0)
    for k in range(segments):
        s = segments - 1 - k
        at = CARRY + ((b * segments + s) * N + n) * D + d
        own = tl.load(at, mask=on, other=0.0)
        exponent = a * tl.load(SUMS + (b * segments + s) * D + d, mask=on, other=0.0)
        if RESETS:
            exponent += tl.load(FORGET + b * segments + s)
        tl.store(at, g, mask=on)
        g = tl.exp2(exponent) * g + own
    tl.store(FIRST + (b * N + n) * D + d, g, mask=on)


@triton.jit
def _interleave(r):
    """Sixteen 1-D tensors (m,) as the columns of one matrix (m, 16), in order."""
    a = tl.join(tl.join(tl.join(r[0], r[8]), tl.join(r[4], r[12])), tl.join(tl.join(r[2], r[10]), tl.join(r[6], r[14])))
    b = tl.join(tl.join(tl.join(r[1], r[9]), tl.join(r[5], r[13])), tl.join(tl.join(r[3], r[11]), tl.join(r[7], r[15])))
    return tl.reshape(tl.join(a, b), [r[0].shape[0], 16])


@triton.jit
def segment_gradients(
    X, DT, Z, DY, BC, RESET, A, SKIP, BIAS, BLOCKS, CARRY, DX, DDT, DZ, DBC, DA, DSKIP, DBIAS,
    L, D, x_b, x_t, dt_b, dt_t, z_b, z_t,
    N: tl.constexpr, NU: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, SEGMENT: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, RESETS: tl.constexpr, EVEN: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Second pass of backward, blocks of U tokens in reverse over one segment: every gradient.

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
    column = tl.arange(0, 16)
    for k in range(SEGMENT // U):
        block = SEGMENT // U - 1 - k
        start = s * SEGMENT + block * U
        row = b * segments * SEGMENT + start
        x = X + b * x_b + start * x_t + d
        t = DT + b * dt_b + start * dt_t + d
        z = Z + b * z_b + start * z_t + d
        out = (b * L + start) * D + d
        dts = ()
        scaled = ()
        dys = ()
        resets = ()
        gx = ()
        gt = ()
        ys = ()
        for u in tl.static_range(U):
            mask = on & (start + u < L)
            dt, reset = _step(t, u * dt_t, bias, mask, RESET, row + u, SOFTPLUS, RESETS, EVEN)
            value = tl.load(x + u * x_t, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(DY + out + u * D, mask=mask, other=0.0).to(tl.float32)
            if HAS_Z:
                gate = tl.load(z + u * z_t, mask=mask, other=0.0).to(tl.float32)
                up = up * gate * _sigmoid(gate)
            dskip += up * value
            dts = dts + (dt,)
            scaled = scaled + (value * dt,)
            dys = dys + (up,)
            resets = resets + (reset,)
            gx = gx + (tl.zeros([BD], tl.float32),)
            gt = gt + (tl.zeros([BD], tl.float32),)
            ys = ys + (skip * value,)
        firsts = BLOCKS + ((b * segments + s) * (SEGMENT // U) + block) * N * D + d
        sums = DBC + (((i * tl.num_programs(2) + b) * segments + s) * (SEGMENT // U) + block) * N * 2 * U
        for n0 in range(0, N, NU):
            an = ()
            first = ()
            right = ()
            for m in tl.static_range(NU):
                an = an + (tl.load(A + (n0 + m) * D + d, mask=on, other=0.0),)
                first = first + (tl.load(firsts + (n0 + m) * D, mask=on, other=0.0),)
                right = right + (tl.load(CARRY + own + (n0 + m) * D, mask=on, other=0.0),)
            for m in tl.static_range(NU):
                n = n0 + m
                h = first[m]
                g = right[m]
                decays = ()
                kept = ()
                dcs = ()
                more = ()
                for u in tl.static_range(U):
                    B, C = _pair(BC + (row + u) * N + n)
                    decay = _decay(dts[u], an[m], resets[u], RESETS)
                    keep = decay * h
                    h = scaled[u] * B + keep
                    decays = decays + (decay,)
                    kept = kept + (keep,)
                    dcs = dcs + (h * dys[u],)
                    more = more + ((ys[u] + h * C) if HAS_Z else ys[u],)
                ys = more
                da = tl.zeros([BD], tl.float32)
                dbs = ()
                ngx = ()
                ngt = ()
                for v in tl.static_range(1, U + 1):
                    B, C = _pair(BC + (row + U - v) * N + n)
                    dh = dys[U - v] * C + g
                    g = decays[U - v] * dh
                    de = dh * kept[U - v]  # gradient of the exponent dt * A
                    da += de * dts[U - v]
                    ngx = (gx[U - v] + dh * B,) + ngx
                    ngt = (gt[U - v] + de * an[m],) + ngt
                    dbs = (dh * scaled[U - v],) + dbs
                gx = ngx
                gt = ngt
                tl.store(CARRY + own + n * D, g, mask=on)
                if k == 0:
                    tl.store(DA + own + n * D, da, mask=on)
                else:
                    tl.store(DA + own + n * D, tl.load(DA + own + n * D, mask=on, other=0.0) + da, mask=on)
                if EXACT:
                    for u in tl.static_range(U):
                        tl.store(sums + n * 2 * U + u, tl.sum(dbs[u], 0))
                        tl.store(sums + n * 2 * U + U + u, tl.sum(dcs[u], 0))
                else:
                    ones = tl.full([16, BD], 1.0, tl.bfloat16)
                    if U == 8:
                        total = tl.dot(ones, _interleave(dbs + dcs).to(tl.bfloat16))
                        at = sums + n * 2 * U + column[None, :] + column[:, None] * 0
                        tl.store(at, total, mask=column[:, None] == 0)
                    else:
                        at = sums + n * 2 * U + column[None, :] + column[:, None] * 0
                        tl.store(at, tl.dot(ones, _interleave(dbs).to(tl.bfloat16)), mask=column[:, None] == 0)
                        tl.store(at + U, tl.dot(ones, _interleave(dcs).to(tl.bfloat16)), mask=column[:, None] == 0)
        for u in tl.static_range(U):
            mask = on & (start + u < L)
            value = tl.load(x + u * x_t, mask=mask, other=0.0).to(tl.float32)
            # The exponent was dt A log2 e: A in units of log2 gives the gradient back the factor ln 2.
            ddt = gt[u] * LN2 + gx[u] * value
            if SOFTPLUS:  # sigmoid(raw) = 1 - exp(-dt); 0 at padding, where dt is 0
                dt = dts[u]
                series = dt * (1.0 - dt * (0.5 - dt * (0.1666666716 - dt * 0.0416666679)))
                ddt = ddt * tl.where(dt < 0.03, series, 1.0 - tl.exp2(dt * -LOG2E))
            elif RESETS:
                _, real = _pair(RESET + row + u)
                ddt = ddt * real
            dbias += tl.where(mask, ddt, 0.0)
            tl.store(DX + out + u * D, (gx[u] * dts[u] + skip * dys[u]).to(DX.dtype.element_ty), mask=mask)
            tl.store(DDT + out + u * D, ddt.to(DDT.dtype.element_ty), mask=mask)
            if HAS_Z:
                gate = tl.load(z + u * z_t, mask=mask, other=0.0).to(tl.float32)
                up = tl.load(DY + out + u * D, mask=mask, other=0.0).to(tl.float32)
                open_ = _sigmoid(gate)
                dz = up * ys[u] * open_ * (1.0 + gate * (1.0 - open_))
                tl.store(DZ + out + u * D, dz.to(DZ.dtype.element_ty), mask=mask)
    tl.store(DSKIP + (b * segments + s) * D + d, dskip, mask=on)
    tl.store(DBIAS + (b * segments + s) * D + d, dbias, mask=on)
