"""Triton bodies of the selective scan (Mamba-1), forward and backward; scan_launch.py launches them.

Forward, a warp walks over time with the states of a channel spread over several lanes, so that channels alone fill the
GPU and every exponential is taken once; where there are few channels, time is cut into spans: states at the ends of
spans, states passed from span to span, outputs. Backward cuts time into segments, channels on lanes, all states of a
channel in registers. No shared memory but for the sums over channels, no atomics: results repeat. Arithmetic is
float32. Loads stand ahead of their use: tokens by a block, B and C by a token.

Letters: b batch, l tokens, d channels, n states, s spans or segments. A is in units of log2 (A * log2 e). Whatever is
kept per channel and state lies in planes (d / TILE, n, TILE), so that the states of a lane are a constant stride apart:
A, states, their gradients. BC (b, l, n) holds B and C of a token side by side, two bfloat16 seen as one int32 or two
float32 as one int64; BCT is the same (b, n, l). RESET is (b, l) pairs of float32 seen as int64: what is added to the
exponent (0, or -1e30 where a document starts) and 1 for a real token, 0 for padding. Rows of B, C, BC, BCT and RESET
are padded to whole segments.
"""

# Triton's language, not Python's: tuples grow by concatenation.

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TILE = tl.constexpr(64)


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
    """Two float32 that were loaded as one int64, or two bfloat16 that were loaded as one int32."""
    if both.dtype == tl.int32:
        first = both << 16
        second = both & -65536
    else:
        first = both.to(tl.int32)
        second = (both >> 32).to(tl.int32)
    return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


@triton.jit
def _in_plane(i, BD: tl.constexpr, N: tl.constexpr):
    """Where state 0 of the channels of block i stands in a plane; state n is n * TILE further."""
    each: tl.constexpr = TILE // BD
    return (i // each) * (N * TILE) + (i % each) * BD + tl.arange(0, BD)


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
def _line(BCT, U: tl.constexpr):
    """B and C of one state at U tokens, U pairs; those of bfloat16 come two tokens a load."""
    pairs = ()
    if BCT.dtype.element_ty == tl.int32:
        for u in tl.static_range(U // 2):
            two = tl.load((BCT + 2 * u).to(tl.pointer_type(tl.int64)))
            pairs = pairs + (two.to(tl.int32), (two >> 32).to(tl.int32))
    else:
        for u in tl.static_range(U):
            pairs = pairs + (tl.load(BCT + u),)
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
def _quads(P, W: tl.constexpr):
    """W adjacent values of every lane, as W tensors of the shape of the pointers P (g, channels)."""
    values = ()
    for k in tl.static_range(W // 4):
        quad = tl.load(P[:, :, None] + (4 * k + tl.arange(0, 4))[None, None, :])
        even, odd = tl.split(tl.reshape(quad, [P.shape[0], P.shape[1], 2, 2]))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        values = values + (first, second, third, fourth)
    return values


@triton.jit
def _queue(P, W: tl.constexpr, AHEAD: tl.constexpr):
    """W values of each of the next AHEAD tokens."""
    values = ()
    for u in tl.static_range(AHEAD):
        values = values + _quads(P + u * (P.shape[0] * W), W)
    return values


@triton.jit
def _tiles(X, stride, first, token, L, on, R: tl.constexpr):
    """R tiles of tokens, one a lane, 0 beyond the end; X points at the first."""
    G: tl.constexpr = token.shape[0]
    tiles = ()
    for r in tl.static_range(R):
        tiles = tiles + (tl.load(X + r * G * stride, mask=on & (first + r * G + token < L), other=0.0),)
    return tiles


@triton.jit
def _token(tile, u: tl.constexpr):
    """Row u of a tile (g, channels) on all its rows."""
    if tile.shape[0] == 1:
        return tile
    return tl.gather(tile, tl.full(tile.shape, u, tl.int32), 0)


@triton.jit
def scan_spans(
    X, DT, Z, B, C, RESET, A, SKIP, BIAS, FIRST, Y, SAVED, STATES, SUMS, L, D, span, phase,
    x_b, x_t, dt_b, dt_t, z_b, z_t,
    N: tl.constexpr, G: tl.constexpr, W: tl.constexpr, R: tl.constexpr, AHEAD: tl.constexpr, SEGMENT: tl.constexpr,
    HAS_Z: tl.constexpr, HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_FIRST: tl.constexpr,
    SOFTPLUS: tl.constexpr, RESETS: tl.constexpr, OUTPUTS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """One warp walks over a span: 32 / G channels, G lanes a channel, W of the G * W >= N states a lane.

    With OUTPUTS: Y (b, l, d) from the state before every span, FIRST (b, s, plane), and STATES (b, plane), the state
    after the last token; SAVED (b, segments, plane) takes the state before every SEGMENT tokens, phase tokens in: 0, or
    -1 to save nothing. Without: from zero states, STATES (b, s, plane) after every span and SUMS (b, s, d) of its dt.
    B and C are (b, l, G * W).

    A tile is G tokens, one a lane: what is computed per token and channel is computed once, then handed to the lanes
    of the channel. All tensors are (g, channels). B and C of the first AHEAD tokens of a round (R tiles), and all else,
    are read a round ahead; the branch behind these loads keeps the assembler from moving them down to their use.
    """
    BD: tl.constexpr = 32 // G
    U: tl.constexpr = G * R
    i, s, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    spans = tl.num_programs(1)
    segments = tl.cdiv(L, SEGMENT)
    lane = tl.arange(0, G)[:, None] + tl.zeros([1, BD], tl.int32)
    d = i * BD + tl.arange(0, BD)[None, :] + tl.zeros([G, 1], tl.int32)
    on = d < D
    plane = tl.cdiv(D, TILE) * TILE * N
    spot = (d // TILE) * (N * TILE) + d % TILE + lane * W * TILE
    bias = tl.load(BIAS + d, mask=on, other=0.0) if HAS_BIAS else 0.0
    skip = tl.load(SKIP + d, mask=on, other=0.0) if HAS_SKIP else 0.0
    h = ()
    a = ()
    for j in tl.static_range(W):
        held = on & (lane * W + j < N)
        a = a + (tl.load(A + spot + j * TILE, mask=held, other=0.0),)
        if HAS_FIRST:
            h = h + (tl.load(FIRST + (b * spans + s) * plane + spot + j * TILE, mask=held, other=0.0),)
        else:
            h = h + (tl.zeros([G, BD], tl.float32),)
    sums = tl.zeros([G, BD], tl.float32)
    start = s * span
    row = b * segments * SEGMENT + start
    x = X + b * x_b + start * x_t + d + lane * x_t
    t = DT + b * dt_b + start * dt_t + d + lane * dt_t
    z = Z + b * z_b + start * z_t + d + lane * z_t
    y = Y + (b * L + start) * D + d + lane * D
    Bp = B + row * (G * W) + lane * W
    Cp = C + row * (G * W) + lane * W
    xs = _tiles(x, x_t, start, lane, L, on, R)
    ts = _tiles(t, dt_t, start, lane, L, on, R)
    zs = _tiles(z, z_t, start, lane, L, on & HAS_Z & OUTPUTS, R)
    Bs = _queue(Bp, W, AHEAD)
    Cs = _queue(Cp, W, AHEAD) if OUTPUTS else Bs
    for k in range(0, tl.minimum(span, L - start), U):
        x += U * x_t
        t += U * dt_t
        z += U * z_t
        Bp += U * (G * W)
        Cp += U * (G * W)
        ahead_x = _tiles(x, x_t, start + k + U, lane, L, on, R)
        ahead_t = _tiles(t, dt_t, start + k + U, lane, L, on, R)
        ahead_z = _tiles(z, z_t, start + k + U, lane, L, on & HAS_Z & OUTPUTS, R)
        ahead_B = _queue(Bp, W, AHEAD)
        ahead_C = _queue(Cp, W, AHEAD) if OUTPUTS else ahead_B
        if (start + k) % SEGMENT == phase:
            saved = SAVED + (b * segments + (start + k) // SEGMENT) * plane + spot
            for j in tl.static_range(W):
                tl.store(saved + j * TILE, h[j], mask=on & (lane * W + j < N))
        for r in tl.static_range(R):
            first = start + k + r * G
            dt = ts[r].to(tl.float32) + bias
            if SOFTPLUS:
                dt = _softplus(dt)
            if RESETS:
                reset, real = _pair(tl.load(RESET + row + r * G + lane))
                dt = dt * real
            if not EVEN:
                dt = tl.where(first + lane < L, dt, 0.0)
            sums += dt
            value = xs[r].to(tl.float32)
            scaled = value * dt
            out = tl.zeros([G, BD], tl.float32)
            for u in tl.static_range(G):
                if r * G + u >= AHEAD:
                    Bs = Bs + _quads(Bp + (r * G + u - U) * (G * W), W)
                    Cs = (Cs + _quads(Cp + (r * G + u - U) * (G * W), W)) if OUTPUTS else Bs
                dt_u = _token(dt, u)
                scaled_u = _token(scaled, u)
                if RESETS:
                    reset_u = _token(reset, u)
                after = ()
                for j in tl.static_range(W):
                    decay = _decay(dt_u, a[j], reset_u if RESETS else 0.0, RESETS)
                    after = after + (decay * h[j] + scaled_u * Bs[(r * G + u) * W + j],)
                h = after
                if OUTPUTS:
                    part = h[0] * Cs[(r * G + u) * W]
                    for j in tl.static_range(1, W):
                        part += h[j] * Cs[(r * G + u) * W + j]
                    out = tl.where(lane == u, tl.sum(part, 0)[None, :], out)
            if OUTPUTS:
                out += skip * value
                if HAS_Z:
                    gate = zs[r].to(tl.float32)
                    out = out * gate * _sigmoid(gate)
                tl.store(y + r * G * D, out.to(Y.dtype.element_ty), mask=on & (first + lane < L))
        row += U
        y += U * D
        xs = ahead_x
        ts = ahead_t
        zs = ahead_z
        Bs = ahead_B
        Cs = ahead_C
    if OUTPUTS:
        states = STATES + b * plane + spot
    else:
        states = STATES + (b * spans + s) * plane + spot
        tl.store(SUMS + (b * spans + s) * D + d, tl.sum(sums, 0)[None, :], mask=on & (lane == 0))
    if (not OUTPUTS) or (s == spans - 1):
        for j in tl.static_range(W):
            tl.store(states + j * TILE, h[j], mask=on & (lane * W + j < N))


@triton.jit
def pass_states(
    A, SUMS, FORGET, FIRST, ENDS, STATES, spans, D,
    N: tl.constexpr, BD: tl.constexpr, HAS_FIRST: tl.constexpr, RESETS: tl.constexpr,
):  # fmt: skip
    """States at the start of every span, STATES (b, s, plane), from ENDS (b, s - 1, plane) and FIRST (b, plane)."""
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    b = tl.program_id(1).to(tl.int64)
    plane = tl.cdiv(D, TILE) * TILE * N
    d = c // (N * TILE) * TILE + c % TILE
    on = (c < plane) & (d < D)
    a = tl.load(A + c, mask=on, other=0.0)
    h = tl.zeros([BD], tl.float32)
    if HAS_FIRST:
        h = tl.load(FIRST + b * plane + c, mask=on, other=0.0)
    for s in range(spans - 1):
        tl.store(STATES + (b * spans + s) * plane + c, h, mask=on)
        exponent = a * tl.load(SUMS + (b * (spans - 1) + s) * D + d, mask=on, other=0.0)
        if RESETS:
            exponent += tl.load(FORGET + b * (spans - 1) + s)
        h = tl.exp2(exponent) * h + tl.load(ENDS + (b * (spans - 1) + s) * plane + c, mask=on, other=0.0)
    tl.store(STATES + (b * spans + spans - 1) * plane + c, h, mask=on)


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
    plane = tl.cdiv(D, TILE) * TILE * N
    spot = _in_plane(i, BD, N)
    bias = tl.load(BIAS + d, mask=on, other=0.0) if HAS_BIAS else 0.0
    skip = tl.load(SKIP + d, mask=on, other=0.0) if HAS_SKIP else 0.0
    h = ()
    a = ()
    p = ()
    g = ()
    for n in tl.static_range(N):
        a = a + (tl.load(A + spot + n * TILE, mask=on, other=0.0),)
        h = h + (tl.load(SAVED + (b * segments + s) * plane + spot + n * TILE, mask=on, other=0.0),)
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
            block = BLOCKS + ((b * segments + s) * (SEGMENT // UB) + k // UB) * plane + spot
            for n in tl.static_range(N):
                tl.store(block + n * TILE, h[n], mask=on)
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
        tl.store(CARRY + (b * segments + s) * plane + spot + n * TILE, g[n], mask=on)
    tl.store(SUMS + (b * segments + s) * D + d, total, mask=on)


@triton.jit
def pass_adjoints(
    A, SUMS, FORGET, LAST, CARRY, FIRST, segments, D,
    N: tl.constexpr, BD: tl.constexpr, U: tl.constexpr, HAS_LAST: tl.constexpr, RESETS: tl.constexpr,
):  # fmt: skip
    """CARRY (b, segments, plane) becomes the gradient of the state after a segment, FIRST (b, plane) before all."""
    c = tl.program_id(0) * BD + tl.arange(0, BD)
    b = tl.program_id(1).to(tl.int64)
    plane = tl.cdiv(D, TILE) * TILE * N
    d = c // (N * TILE) * TILE + c % TILE
    on = (c < plane) & (d < D)
    a = tl.load(A + c, mask=on, other=0.0)
    g = tl.zeros([BD], tl.float32)
    if HAS_LAST:
        g = tl.load(LAST + b * plane + c, mask=on, other=0.0)
    for k in range(0, segments, U):
        owns = ()
        exponents = ()
        for u in tl.static_range(U):
            s = segments - 1 - k - u
            owns = owns + (tl.load(CARRY + (b * segments + s) * plane + c, mask=on & (s >= 0), other=0.0),)
            exponent = a * tl.load(SUMS + (b * segments + s) * D + d, mask=on & (s >= 0), other=0.0)
            if RESETS:
                exponent += tl.load(FORGET + b * segments + s, mask=s >= 0, other=0.0)
            exponents = exponents + (exponent,)
        for u in tl.static_range(U):
            s = segments - 1 - k - u
            tl.store(CARRY + (b * segments + s) * plane + c, g, mask=on & (s >= 0))
            g = tl.exp2(exponents[u]) * g + owns[u]
    tl.store(FIRST + b * plane + c, g, mask=on)


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
    X, DT, Z, DY, BCT, RESET, A, SKIP, BIAS, BLOCKS, CARRY, DX, DDT, DBC, DA, DSKIP, DBIAS,
    L, D, x_b, x_t, dt_b, dt_t, z_b, z_t,
    N: tl.constexpr, NU: tl.constexpr, U: tl.constexpr, BD: tl.constexpr, SEGMENT: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_SKIP: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, RESETS: tl.constexpr, EVEN: tl.constexpr,
    EXACT: tl.constexpr,
):  # fmt: skip
    """Second pass of backward, blocks of U tokens in reverse over one segment: the gradients that remain.

    CARRY (b, segments, n, d) holds the gradient of the state after the segment and serves as scratch. DBC (d / BD, b,
    segments, SEGMENT / U, n, 2, U), DA (b, segments, n, d), DSKIP, DBIAS (b, segments, d) take partial sums. EXACT
    sums over channels in float32; else one small matrix product adds terms rounded to bfloat16, tf32 for other inputs.
    """
    i, s, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    segments = tl.num_programs(1)
    d = i * BD + tl.arange(0, BD)
    on = d < D
    plane = tl.cdiv(D, TILE) * TILE * N
    spot = _in_plane(i, BD, N)
    bias = tl.load(BIAS + d, mask=on, other=0.0) if HAS_BIAS else 0.0
    skip = tl.load(SKIP + d, mask=on, other=0.0) if HAS_SKIP else 0.0
    own = (b * segments + s) * plane + spot  # this program's states in CARRY and DA
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
        firsts = BLOCKS + ((b * segments + s) * (SEGMENT // U) + block) * plane + spot
        bct = BCT + b * N * segments * SEGMENT + s * SEGMENT + block * U
        an = ()
        first = ()
        right = ()
        before = ()
        lines = ()
        for m in tl.static_range(NU):
            lines = lines + _line(bct + m * segments * SEGMENT, U)
            an = an + (tl.load(A + spot + m * TILE, mask=on, other=0.0),)
            first = first + (tl.load(firsts + m * TILE, mask=on, other=0.0),)
            right = right + (tl.load(CARRY + own + m * TILE, mask=on, other=0.0),)
            before = before + (tl.load(DA + own + m * TILE, mask=on & (k > 0), other=0.0),)
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
            ahead_lines = ()
            for m in tl.static_range(NU):  # what the next states need comes while these are computed
                n = tl.minimum(n0 + NU + m, N - 1)
                more = on & (n0 + NU < N)
                ahead_lines = ahead_lines + _line(bct + n * segments * SEGMENT, U)
                ahead_an = ahead_an + (tl.load(A + spot + n * TILE, mask=more, other=0.0),)
                ahead_first = ahead_first + (tl.load(firsts + n * TILE, mask=more, other=0.0),)
                ahead_right = ahead_right + (tl.load(CARRY + own + n * TILE, mask=more, other=0.0),)
                ahead_before = ahead_before + (tl.load(DA + own + n * TILE, mask=more & (k > 0), other=0.0),)
            terms = ()
            for m in tl.static_range(NU):
                n = n0 + m
                h = first[m]
                decays = ()
                kept = ()
                dcs = ()
                for u in tl.static_range(U):
                    B, C = _pair(lines[m * U + u])
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
                    B, C = _pair(lines[m * U + U - v])
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
                tl.store(CARRY + own + n * TILE, g, mask=on)
                tl.store(DA + own + n * TILE, da, mask=on)
            if EXACT:
                for c in tl.static_range(NU * 2 * U):
                    tl.store(sums + n0 * 2 * U + c, tl.sum(terms[c], 0))
            else:
                kind: tl.constexpr = tl.bfloat16 if X.dtype.element_ty == tl.bfloat16 else tl.float32
                ones = tl.full([16, BD], 1.0, kind)
                total = tl.dot(ones, _columns(terms, NU * 2 * U).to(kind), input_precision="tf32")
                at = sums + n0 * 2 * U + column[None, :] + line[:, None] * 0
                tl.store(at, total, mask=line[:, None] == 0)
            an = ahead_an
            first = ahead_first
            right = ahead_right
            before = ahead_before
            lines = ahead_lines
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
