"""Triton bodies of memory attention, forward and backward: one softmax over in-context, fading and eidetic keys.

Letters: b batch, i queries, j key rows, g key/value heads, G query heads of one of them, p head_dim. A program's tile
holds BM rows of the (position, query head of the group) grid of one key/value head, so keys and values are read once
for the whole group: row r is position r // G, head r % G. A query's own key row is its position + PAST.

    in-context: 0 <= a - j < W    fading: W <= a - j < W + F    eidetic: rows of the chunk's list, position <= a - W

where a = i + PAST, and j is at or after START of the query's document. Tiles that every row sees whole take a loop of
their own without masks. Scores are in units of log2; LSE and DELTA are (b, i, heads) float32. Backward computes scores
key-major (k q^T) where gradients of keys are wanted, so no tile of registers is ever transposed: Triton 3.4 to 3.7.0
miscompiles that on Hopper, silently. No atomics on floats, so results repeat.
"""

# Triton's language, not Python's: constant conditions stand alone.

import triton
import triton.language as tl

NEG = tl.constexpr(-1.0e30)  # finite: a masked row never becomes NaN
NEVER = tl.constexpr(1 << 30)  # the position of an empty slot


@triton.jit
def _tile(X, row, on, t_stride, d, P: tl.constexpr, MASK: tl.constexpr):
    """Rows `row` of one head, (n, BP); those not `on` and columns from P on are 0."""
    at = X + row[:, None].to(tl.int64) * t_stride + d[None, :]
    if MASK:
        return tl.load(at, mask=on[:, None] & (d[None, :] < P), other=0.0)
    if d.shape[0] == P:
        return tl.load(at)
    return tl.load(at, mask=d[None, :] < P, other=0.0)


@triton.jit
def _band(top, low, full_low, spread, BN: tl.constexpr):
    """Tiles of BN keys from `top` (exclusive) down to `low`: how many are masked at the near end, whole, masked at the
    far.

    The first `spread` keys below `top` are not seen by every row, nor are those below `full_low`.
    """
    near = tl.minimum(tl.cdiv(spread, BN), tl.cdiv(tl.maximum(top - low, 0), BN))
    rest = top - near * BN
    whole = tl.maximum(rest - tl.maximum(full_low, low), 0) // BN
    far = tl.cdiv(tl.maximum(rest - whole * BN - low, 0), BN)
    return near, whole, far


@triton.jit
def _soften(q, k, v, seen, scale, acc, m, l, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of keys into the running softmax (acc, m, l)."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASK:
        s = tl.where(seen, s, NEG)
    peak = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - peak[:, None])
    shrink = tl.exp2(m - peak)
    l = l * shrink + tl.sum(p, 1)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, peak, l


@triton.jit
def _read_bands(
    q, a, start, K, V, k_t, v_t, KF, VF, kf_t, vf_t, top, near, whole, far, top_f, near_f, whole_f, far_f, W, F,
    scale, acc, m, l, d, P: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The in-context and the fading tiles, as `_band` counts them; masked ones first: the diagonal gives a maximum."""
    masked = near + far
    for n in range(masked + near_f + far_f):
        fading = n >= masked
        t = tl.where(fading, n - masked, n)
        t = tl.where(t < tl.where(fading, near_f, near), t, t + tl.where(fading, whole_f, whole))
        j = tl.where(fading, top_f, top) - (t + 1) * BN + tl.arange(0, BN)
        e = a[:, None] - j[None, :]
        lo = tl.where(fading, W, 0)
        seen = (e >= lo) & (e < tl.where(fading, W + F, W)) & (j[None, :] >= start[:, None])
        k = _tile(tl.where(fading, KF, K), j, j >= 0, tl.where(fading, kf_t, k_t), d, P, True)
        v = _tile(tl.where(fading, VF, V), j, j >= 0, tl.where(fading, vf_t, v_t), d, P, True)
        acc, m, l = _soften(q, k, v, seen, scale, acc, m, l, True, PRECISION)
    for n in range(whole + whole_f):
        fading = n >= whole
        t = tl.where(fading, n - whole + near_f, n + near)
        j = tl.where(fading, top_f, top) - (t + 1) * BN + tl.arange(0, BN)
        k = _tile(tl.where(fading, KF, K), j, j >= 0, tl.where(fading, kf_t, k_t), d, P, False)
        v = _tile(tl.where(fading, VF, V), j, j >= 0, tl.where(fading, vf_t, v_t), d, P, False)
        acc, m, l = _soften(q, k, v, None, scale, acc, m, l, False, PRECISION)
    return acc, m, l


@triton.jit
def survey_slots(INDEX, POSITION, PLACES, COUNT, SAFE, PAST, W, C, E, R, PLACED: tl.constexpr, BE: tl.constexpr):
    """Of a chunk's list: PLACES (b, chunks, e), the positions of its rows; COUNT, how many slots up to the last one in
    use; SAFE, how many leading ones every query of the chunk sees.
    """
    c = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    at = b * tl.num_programs(0) + c
    count = 0
    safe = E
    for e0 in range(0, E, BE):
        e = e0 + tl.arange(0, BE)
        j = tl.load(INDEX + at * E + e, mask=e < E, other=-1)
        place = j
        if PLACED:
            place = tl.load(POSITION + b * R + j, mask=j >= 0, other=0)
        place = tl.where(j >= 0, place, NEVER)
        tl.store(PLACES + at * E + e, place, mask=e < E)
        count = tl.maximum(count, tl.max(tl.where(j >= 0, e + 1, 0), 0))
        safe = tl.minimum(safe, tl.min(tl.where(place <= c * C + PAST - W, E, e), 0))
    tl.store(COUNT + at, count)
    tl.store(SAFE + at, safe)


@triton.jit
def attend_forward(
    Q, QF, QE, K, V, KF, VF, KE, VE, INDEX, COUNT, SAFE, PLACES, START, O, LSE, LQ, PAST, W, F, C, E, scale,
    q_b, q_t, qf_b, qf_t, qe_b, qe_t, k_b, k_t, v_b, v_t, kf_b, kf_t, vf_b, vf_t, ke_b, ke_t, ve_b, ve_t,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FADING: tl.constexpr, EIDETIC: tl.constexpr, TIED_F: tl.constexpr, TIED_E: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """O (b, i, heads, p) and LSE. With EIDETIC a tile lies within one chunk of C queries: BM divides C * G."""
    first = tl.program_id(0) * BM
    kv = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row = first + tl.arange(0, BM)
    i = row // G
    head = kv * G + row % G
    d = tl.arange(0, BP)
    on = i < LQ
    a = i + PAST
    a0 = first // G + PAST
    a1 = tl.minimum((first + BM - 1) // G, LQ - 1) + PAST
    start = tl.zeros([BM], tl.int32)
    low = 0
    high = 0  # a key row at or after `low` is in the first row's document, one at or after `high` in every row's
    if DOCUMENTS:
        start = tl.load(START + b * LQ + i, mask=on, other=0)
        low = tl.load(START + b * LQ + a0 - PAST)
        high = tl.load(START + b * LQ + a1 - PAST)
    q = _tile(Q + b * q_b + head[:, None] * P, i, on, q_t, d, P, True)
    K += b * k_b + kv * P
    V += b * v_b + kv * P
    KF += b * kf_b + kv * P
    VF += b * vf_b + kv * P
    acc = tl.zeros([BM, BP], tl.float32)
    m = tl.full([BM], NEG, tl.float32)
    l = tl.zeros([BM], tl.float32)
    top = a1 + 1
    near, whole, far = _band(top, tl.maximum(a0 - W + 1, low), tl.maximum(a1 - W + 1, high), a1 - a0, BN)
    top_f = a1 - W + 1
    near_f = 0
    whole_f = 0
    far_f = 0
    if FADING:
        near_f, whole_f, far_f = _band(
            top_f, tl.maximum(a0 - W - F + 1, low), tl.maximum(a1 - W - F + 1, high), a1 - a0, BN
        )
    if TIED_F:
        acc, m, l = _read_bands(
            q, a, start, K, V, k_t, v_t, KF, VF, kf_t, vf_t, top, near, whole, far, top_f, near_f, whole_f, far_f, W, F,
            scale, acc, m, l, d, P, BN, PRECISION,
        )  # fmt: skip
    else:
        acc, m, l = _read_bands(
            q, a, start, K, V, k_t, v_t, K, V, k_t, v_t, top, near, whole, far, top_f, 0, 0, 0, W, F,
            scale, acc, m, l, d, P, BN, PRECISION,
        )  # fmt: skip
        qf = _tile(QF + b * qf_b + head[:, None] * P, i, on, qf_t, d, P, True)
        acc, m, l = _read_bands(
            qf, a, start, KF, VF, kf_t, vf_t, KF, VF, kf_t, vf_t, top, 0, 0, 0, top_f, near_f, whole_f, far_f, W, F,
            scale, acc, m, l, d, P, BN, PRECISION,
        )  # fmt: skip
    if EIDETIC:
        if not TIED_E:
            q = _tile(QE + b * qe_b + head[:, None] * P, i, on, qe_t, d, P, True)
        KE += b * ke_b + kv * P
        VE += b * ve_b + kv * P
        chunk = b * tl.cdiv(LQ, C) + (first // G) // C
        INDEX += chunk * E
        PLACES += chunk * E
        count = tl.load(COUNT + chunk)
        safe = tl.load(SAFE + chunk) // BN * BN
        for e0 in range(0, safe, BN):
            j = tl.load(INDEX + e0 + tl.arange(0, BN))
            k = _tile(KE, j, j >= 0, ke_t, d, P, False)
            v = _tile(VE, j, j >= 0, ve_t, d, P, False)
            acc, m, l = _soften(q, k, v, None, scale, acc, m, l, False, PRECISION)
        for e0 in range(safe, count, BN):
            e = e0 + tl.arange(0, BN)
            j = tl.load(INDEX + e, mask=e < count, other=-1)
            place = tl.load(PLACES + e, mask=e < count, other=NEVER)
            seen = place[None, :] <= a[:, None] - W
            k = _tile(KE, j, j >= 0, ke_t, d, P, True)
            v = _tile(VE, j, j >= 0, ve_t, d, P, True)
            acc, m, l = _soften(q, k, v, seen, scale, acc, m, l, True, PRECISION)
    out = O + ((b * LQ + i[:, None]) * H + head[:, None]) * P + d[None, :]
    tl.store(out, (acc / l[:, None]).to(O.dtype.element_ty), mask=on[:, None] & (d[None, :] < P))
    tl.store(LSE + (b * LQ + i) * H + head, m + tl.log2(l), mask=on)


@triton.jit
def row_products(O, DO, DELTA, rows, P: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr):
    """DELTA: minus the sum of O * DO over p, for `rows` contiguous rows of p."""
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    d = tl.arange(0, BP)
    on = r < rows
    at = r[:, None] * P + d[None, :]
    mask = on[:, None] & (d[None, :] < P)
    o = tl.load(O + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(DELTA + r, -tl.sum(o * tl.load(DO + at, mask=mask, other=0.0).to(tl.float32), 1), mask=on)


@triton.jit
def _query_step(q, do, lse, delta, k, v, seen, scale, dq, MASK: tl.constexpr, PRECISION: tl.constexpr):
    """What one tile of keys adds to the gradient of the queries."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
    p = tl.exp2(s * scale - lse[:, None])
    if MASK:
        p = tl.where(seen, p, 0.0)
    ds = p * (dp + delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def _query_bands(
    q, do, lse, delta, on, a, start, K, V, k_t, v_t, KF, VF, kf_t, vf_t, top, near, whole, far, top_f, near_f, whole_f,
    far_f, W, F, scale, dq, d, P: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`_read_bands` for the gradient of the queries."""
    masked = near + far
    for n in range(masked + near_f + far_f):
        fading = n >= masked
        t = tl.where(fading, n - masked, n)
        t = tl.where(t < tl.where(fading, near_f, near), t, t + tl.where(fading, whole_f, whole))
        j = tl.where(fading, top_f, top) - (t + 1) * BN + tl.arange(0, BN)
        e = a[:, None] - j[None, :]
        lo = tl.where(fading, W, 0)
        seen = (e >= lo) & (e < tl.where(fading, W + F, W)) & (j[None, :] >= start[:, None]) & on[:, None]
        k = _tile(tl.where(fading, KF, K), j, j >= 0, tl.where(fading, kf_t, k_t), d, P, True)
        v = _tile(tl.where(fading, VF, V), j, j >= 0, tl.where(fading, vf_t, v_t), d, P, True)
        dq = _query_step(q, do, lse, delta, k, v, seen, scale, dq, True, PRECISION)
    for n in range(whole + whole_f):
        fading = n >= whole
        t = tl.where(fading, n - whole + near_f, n + near)
        j = tl.where(fading, top_f, top) - (t + 1) * BN + tl.arange(0, BN)
        k = _tile(tl.where(fading, KF, K), j, j >= 0, tl.where(fading, kf_t, k_t), d, P, False)
        v = _tile(tl.where(fading, VF, V), j, j >= 0, tl.where(fading, vf_t, v_t), d, P, False)
        dq = _query_step(q, do, lse, delta, k, v, None, scale, dq, False, PRECISION)
    return dq


@triton.jit
def attend_backward_queries(
    Q, QF, QE, K, V, KF, VF, KE, VE, INDEX, COUNT, SAFE, PLACES, START, DO, LSE, DELTA, DQ, DQF, DQE,
    LQ, PAST, W, F, C, E, scale, natural,
    q_b, q_t, qf_b, qf_t, qe_b, qe_t, k_b, k_t, v_b, v_t, kf_b, kf_t, vf_b, vf_t, ke_b, ke_t, ve_b, ve_t,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FADING: tl.constexpr, EIDETIC: tl.constexpr, TIED_F: tl.constexpr, TIED_E: tl.constexpr, DOCUMENTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the queries, (b, i, heads, p); tied queries share DQ. `natural` is the scale of q k^T."""
    first = tl.program_id(0) * BM
    kv = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    row = first + tl.arange(0, BM)
    i = row // G
    head = kv * G + row % G
    d = tl.arange(0, BP)
    on = i < LQ
    a = i + PAST
    a0 = first // G + PAST
    a1 = tl.minimum((first + BM - 1) // G, LQ - 1) + PAST
    start = tl.zeros([BM], tl.int32)
    low = 0
    high = 0
    if DOCUMENTS:
        start = tl.load(START + b * LQ + i, mask=on, other=0)
        low = tl.load(START + b * LQ + a0 - PAST)
        high = tl.load(START + b * LQ + a1 - PAST)
    at = ((b * LQ + i[:, None]) * H + head[:, None]) * P + d[None, :]
    mask = on[:, None] & (d[None, :] < P)
    do = tl.load(DO + at, mask=mask, other=0.0)
    lse = tl.load(LSE + (b * LQ + i) * H + head, mask=on, other=0.0)
    delta = tl.load(DELTA + (b * LQ + i) * H + head, mask=on, other=0.0)
    q = _tile(Q + b * q_b + head[:, None] * P, i, on, q_t, d, P, True)
    K += b * k_b + kv * P
    V += b * v_b + kv * P
    KF += b * kf_b + kv * P
    VF += b * vf_b + kv * P
    dq = tl.zeros([BM, BP], tl.float32)
    top = a1 + 1
    near, whole, far = _band(top, tl.maximum(a0 - W + 1, low), tl.maximum(a1 - W + 1, high), a1 - a0, BN)
    top_f = a1 - W + 1
    near_f = 0
    whole_f = 0
    far_f = 0
    if FADING:
        near_f, whole_f, far_f = _band(
            top_f, tl.maximum(a0 - W - F + 1, low), tl.maximum(a1 - W - F + 1, high), a1 - a0, BN
        )
    if TIED_F:
        dq = _query_bands(
            q, do, lse, delta, on, a, start, K, V, k_t, v_t, KF, VF, kf_t, vf_t, top, near, whole, far, top_f, near_f,
            whole_f, far_f, W, F, scale, dq, d, P, BN, PRECISION,
        )  # fmt: skip
    else:
        qf = _tile(QF + b * qf_b + head[:, None] * P, i, on, qf_t, d, P, True)
        dqf = _query_bands(
            qf, do, lse, delta, on, a, start, KF, VF, kf_t, vf_t, KF, VF, kf_t, vf_t, top, 0, 0, 0, top_f, near_f,
            whole_f, far_f, W, F, scale, tl.zeros([BM, BP], tl.float32), d, P, BN, PRECISION,
        )  # fmt: skip
        tl.store(DQF + at, (dqf * natural).to(DQF.dtype.element_ty), mask=mask)
        dq = _query_bands(
            q, do, lse, delta, on, a, start, K, V, k_t, v_t, K, V, k_t, v_t, top, near, whole, far, top_f, 0,
            0, 0, W, F, scale, dq, d, P, BN, PRECISION,
        )  # fmt: skip
    if EIDETIC:
        if not TIED_E:
            tl.store(DQ + at, (dq * natural).to(DQ.dtype.element_ty), mask=mask)
            dq = tl.zeros([BM, BP], tl.float32)
            q = _tile(QE + b * qe_b + head[:, None] * P, i, on, qe_t, d, P, True)
        KE += b * ke_b + kv * P
        VE += b * ve_b + kv * P
        chunk = b * tl.cdiv(LQ, C) + (first // G) // C
        INDEX += chunk * E
        PLACES += chunk * E
        count = tl.load(COUNT + chunk)
        safe = tl.load(SAFE + chunk) // BN * BN
        for e0 in range(0, safe, BN):
            j = tl.load(INDEX + e0 + tl.arange(0, BN))
            k = _tile(KE, j, j >= 0, ke_t, d, P, False)
            v = _tile(VE, j, j >= 0, ve_t, d, P, False)
            dq = _query_step(q, do, lse, delta, k, v, None, scale, dq, False, PRECISION)
        for e0 in range(safe, count, BN):
            e = e0 + tl.arange(0, BN)
            j = tl.load(INDEX + e, mask=e < count, other=-1)
            place = tl.load(PLACES + e, mask=e < count, other=NEVER)
            seen = (place[None, :] <= a[:, None] - W) & on[:, None]
            k = _tile(KE, j, j >= 0, ke_t, d, P, True)
            v = _tile(VE, j, j >= 0, ve_t, d, P, True)
            dq = _query_step(q, do, lse, delta, k, v, seen, scale, dq, True, PRECISION)
    if EIDETIC and not TIED_E:
        tl.store(DQE + at, (dq * natural).to(DQE.dtype.element_ty), mask=mask)
    else:
        tl.store(DQ + at, (dq * natural).to(DQ.dtype.element_ty), mask=mask)


@triton.jit
def _key_step(
    k, v, Q, DO, LSE, DELTA, row, b, kv, LQ, q_t, seen, scale, dk, dv, d,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one tile of query rows adds to the gradients of keys and values; `seen` (keys, rows)."""
    i = row // G
    head = kv * G + row % G
    on = i < LQ
    q = _tile(Q + head[:, None] * P, i, on, q_t, d, P, True)
    at = (b * LQ + i) * H + head
    do = _tile(DO, at, on, P, d, P, True)
    lse = tl.load(LSE + at, mask=on, other=0.0)
    delta = tl.load(DELTA + at, mask=on, other=0.0)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p = tl.exp2(s * scale - lse[None, :])
    if MASK:
        p = tl.where(seen & on[None, :], p, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
    ds = p * (dp + delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def attend_backward_keys(
    Q, QF, K, V, KF, VF, END, DO, LSE, DELTA, DK, DV, DKF, DVF, LQ, LK, PAST, W, F, scale, natural,
    q_b, q_t, qf_b, qf_t, k_b, k_t, v_b, v_t, kf_b, kf_t, vf_b, vf_t,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    FADING: tl.constexpr, DOCUMENTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of in-context and fading keys and values, (b, j, g, p); the grid's last axis is 2 b with FADING."""
    j0 = tl.program_id(0) * BN
    kv = tl.program_id(1)
    heads = tl.num_programs(1)
    b = tl.program_id(2).to(tl.int64)
    lo = 0
    hi = W
    if FADING:
        b = (tl.program_id(2) // 2).to(tl.int64)
        fading = tl.program_id(2) % 2 == 1
        Q, q_b, q_t = tl.where(fading, QF, Q), tl.where(fading, qf_b, q_b), tl.where(fading, qf_t, q_t)
        K, k_b, k_t = tl.where(fading, KF, K), tl.where(fading, kf_b, k_b), tl.where(fading, kf_t, k_t)
        V, v_b, v_t = tl.where(fading, VF, V), tl.where(fading, vf_b, v_b), tl.where(fading, vf_t, v_t)
        DK, DV = tl.where(fading, DKF, DK), tl.where(fading, DVF, DV)
        lo = tl.where(fading, W, 0)
        hi = tl.where(fading, W + F, W)
    j = j0 + tl.arange(0, BN)
    d = tl.arange(0, BP)
    on = j < LK
    k = _tile(K + b * k_b + kv * P, j, on, k_t, d, P, True)
    v = _tile(V + b * v_b + kv * P, j, on, v_t, d, P, True)
    Q += b * q_b
    end = tl.full([BN], 0, tl.int32) + (LQ + PAST)  # queries before it see the key
    last = LQ + PAST
    least = LQ + PAST
    if DOCUMENTS:
        end = tl.load(END + b * LK + j, mask=on, other=0)
        least = tl.load(END + b * LK + j0)
        last = tl.load(END + b * LK + tl.minimum(j0 + BN, LK) - 1)
    begin = tl.maximum(j0 + lo, PAST)  # first query that sees a key of the tile
    stop = tl.minimum(tl.minimum(j0 + BN - 1 + hi, last), LQ + PAST)
    # From `full` on every key is past the near edge; from `fall` on some are past the far one.
    full = tl.maximum(j0 + BN - 1 + lo, begin)
    fall = tl.minimum(tl.minimum(j0 + hi, least), stop)
    rows = tl.maximum(stop - begin, 0) * G
    near = tl.minimum(tl.cdiv((full - begin) * G, BM), tl.cdiv(rows, BM))
    whole = tl.maximum((fall - begin) * G - near * BM, 0) // BM
    far = tl.cdiv(tl.maximum(rows - (near + whole) * BM, 0), BM)
    base = (begin - PAST) * G
    dk = tl.zeros([BN, BP], tl.float32)
    dv = tl.zeros([BN, BP], tl.float32)
    for n in range(near + far):
        t = tl.where(n < near, n, n + whole)
        row = base + t * BM + tl.arange(0, BM)
        a = row // G + PAST
        e = a[None, :] - j[:, None]
        seen = (e >= lo) & (e < hi) & (a[None, :] < end[:, None]) & on[:, None]
        dk, dv = _key_step(
            k, v, Q, DO, LSE, DELTA, row, b, kv, LQ, q_t, seen, scale, dk, dv, d, H, G, P, True, PRECISION
        )
    for n in range(whole):
        row = base + (near + n) * BM + tl.arange(0, BM)
        dk, dv = _key_step(
            k, v, Q, DO, LSE, DELTA, row, b, kv, LQ, q_t, None, scale, dk, dv, d, H, G, P, False, PRECISION
        )
    out = ((b * LK + j[:, None]) * heads + kv) * P + d[None, :]
    mask = on[:, None] & (d[None, :] < P)
    tl.store(DK + out, (dk * natural).to(DK.dtype.element_ty), mask=mask)
    tl.store(DV + out, dv.to(DV.dtype.element_ty), mask=mask)


@triton.jit
def mark_members(INDEX, BITS, E, R, chunks, groups, CHUNKS: tl.constexpr, BE: tl.constexpr):
    """Bit c of BITS (b, groups, R) int32, zero before: row is in the list of the group's c-th chunk (CHUNKS <= 32)."""
    chunk = tl.program_id(0)
    b = tl.program_id(1).to(tl.int64)
    bits = BITS + (b * groups + chunk // CHUNKS) * R
    bit = (tl.full([BE], 1, tl.int32)) << (chunk % CHUNKS)
    for e0 in range(0, E, BE):
        e = e0 + tl.arange(0, BE)
        j = tl.load(INDEX + (b * chunks + chunk) * E + e, mask=e < E, other=-1)
        tl.atomic_or(bits + j, bit, mask=j >= 0, sem="relaxed")


@triton.jit
def gather_members(BITS, UNION, PLACE, COUNT, R, U, BR: tl.constexpr):
    """Rows with any bit, ascending: UNION (b * groups, U); PLACE (b * groups, R) where each stands, -1; COUNT."""
    at = tl.program_id(0).to(tl.int64)
    found = 0
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR)
        member = tl.load(BITS + at * R + r, mask=r < R, other=0) != 0
        rank = found + tl.cumsum(member.to(tl.int32), 0) - 1
        tl.store(UNION + at * U + rank, r, mask=member & (rank < U))
        tl.store(PLACE + at * R + r, tl.where(member, rank, -1), mask=r < R)
        found += tl.sum(member.to(tl.int32), 0)
    tl.store(COUNT + at, found)


@triton.jit
def attend_backward_slots(
    Q, KE, VE, UNION, BITS, COUNT, POSITION, DO, LSE, DELTA, PARTS, LQ, PAST, W, C, R, U, groups, scale, natural,
    q_b, q_t, ke_b, ke_t, ve_b, ve_t,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    CHUNKS: tl.constexpr, PLACED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the eidetic keys and values of one group of chunks: PARTS (b, groups, U, g, 2, p) float32."""
    u0 = tl.program_id(0) * BN
    kv = tl.program_id(1)
    heads = tl.num_programs(1)
    at = tl.program_id(2).to(tl.int64)  # b * groups + group
    b = at // groups
    group = (at % groups).to(tl.int32)
    count = tl.load(COUNT + at)
    if u0 < count:
        u = u0 + tl.arange(0, BN)
        on = u < count
        d = tl.arange(0, BP)
        j = tl.load(UNION + at * U + u, mask=on, other=0)
        bits = tl.load(BITS + at * R + j, mask=on, other=0)
        place = j
        if PLACED:
            place = tl.load(POSITION + b * R + j, mask=on, other=0)
        k = _tile(KE + b * ke_b + kv * P, j, on, ke_t, d, P, True)
        v = _tile(VE + b * ve_b + kv * P, j, on, ve_t, d, P, True)
        dk = tl.zeros([BN, BP], tl.float32)
        dv = tl.zeros([BN, BP], tl.float32)
        begin = group * CHUNKS * C
        stop = tl.minimum(begin + CHUNKS * C, LQ)
        for r0 in range(begin * G, stop * G, BM):
            row = r0 + tl.arange(0, BM)
            i = row // G
            member = (bits[:, None] >> (i // C - group * CHUNKS)[None, :]) & 1
            seen = (member != 0) & (place[:, None] <= i[None, :] + PAST - W) & (i < stop)[None, :]
            dk, dv = _key_step(
                k, v, Q + b * q_b, DO, LSE, DELTA, row, b, kv, LQ, q_t, seen, scale, dk, dv, d, H, G, P, True, PRECISION
            )
        out = PARTS + (((at * U + u[:, None]) * heads + kv) * 2) * P + d[None, :]
        mask = on[:, None] & (d[None, :] < P)
        tl.store(out, dk * natural, mask=mask)
        tl.store(out + P, dv, mask=mask)


@triton.jit
def add_slots(PARTS, PLACE, DKE, DVE, R, U, groups, heads, P: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr):
    """Add a row's PARTS, over the groups of chunks in their order, to DKE and DVE (b, R, g, p)."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    kv = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BP)
    dk = tl.zeros([BR, BP], tl.float32)
    dv = tl.zeros([BR, BP], tl.float32)
    held = r < 0
    for group in range(groups):
        at = b * groups + group
        place = tl.load(PLACE + at * R + r, mask=r < R, other=-1)
        if tl.max(place, 0) >= 0:
            mask = (place >= 0)[:, None] & (d[None, :] < P)
            part = PARTS + (((at * U + place[:, None]) * heads + kv) * 2) * P + d[None, :]
            dk += tl.load(part, mask=mask, other=0.0)
            dv += tl.load(part + P, mask=mask, other=0.0)
            held = held | (place >= 0)
    out = ((b * R + r[:, None]) * heads + kv) * P + d[None, :]
    mask = held[:, None] & (d[None, :] < P)
    dk += tl.load(DKE + out, mask=mask, other=0.0).to(tl.float32)
    dv += tl.load(DVE + out, mask=mask, other=0.0).to(tl.float32)
    tl.store(DKE + out, dk.to(DKE.dtype.element_ty), mask=mask)
    tl.store(DVE + out, dv.to(DVE.dtype.element_ty), mask=mask)
