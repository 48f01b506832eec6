"""Memory attention for Hopper GPUs in Gluon: the sums of attention_kernels.py, with copies and matrix products in
flight.

Triton leaves a warp group idle between the two products of a tile, and serialises those of the keys' gradients at
head_dim 128. Here every step is placed by hand: tiles are copied to shared memory one step ahead (cp.async, one
pointer a row), and the product that ends one tile runs while the scores of the next are turned into weights.

The keys of a tile of queries form ONE list: in-context from the newest down, fading from the newest down, then eidetic.
x counts along it. A tile of the list may straddle two memories, since every row has a pointer of its own; only tiles
that some query does not see whole are masked. Letters as in attention_kernels.py.
"""

# Triton's language, not Python's: constant conditions stand alone.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

NEG = gl.constexpr(-1.0e30)
NEVER = gl.constexpr(1 << 30)


@gluon.jit
def _copy(slot, x0, x, kept, d, X, XF, XE, x_t, xf_t, xe_t, contexts, bands, top, top_f, BN: gl.constexpr):
    """Start copying the key rows at places x0 + x of the list into a shared tile; `kept` are those that are eidetic."""
    if (x0 + BN <= contexts) | ((x0 >= contexts) & (x0 + BN <= bands)):  # one memory: one base for all rows
        fading = x0 >= contexts
        base = gl.where(fading, XF, X)
        stride = gl.where(fading, xf_t, x_t)
        j = gl.where(fading, top_f + contexts, top) - 1 - x0 - x
        at = base + gl.maximum(j, 0).to(gl.int64) * stride
        async_copy.async_copy_global_to_shared(slot, gl.expand_dims(at, 1) + gl.expand_dims(d, 0))
    else:
        y = x0 + x
        near = y < contexts
        band = y < bands
        jy = gl.where(near, top - 1 - y, gl.where(band, top_f - 1 - y + contexts, kept))
        bases = gl.where(near, X, gl.where(band, XF, XE))
        strides = gl.where(near, x_t, gl.where(band, xf_t, xe_t))
        each = bases + gl.maximum(jy, 0).to(gl.int64) * strides
        async_copy.async_copy_global_to_shared(slot, gl.expand_dims(each, 1) + gl.expand_dims(d, 0))


@gluon.jit
def _copy_rows(slot, X, b, kv, r, d, LQ, x_b, x_t, G: gl.constexpr, P: gl.constexpr):
    """Start copying rows r of the (position, head) grid of one key/value head into a shared tile."""
    i = gl.minimum(r // G, LQ - 1).to(gl.int64)
    at = X + b * x_b + i * x_t + (kv * G + r % G) * P
    async_copy.async_copy_global_to_shared(slot, gl.expand_dims(at, 1) + gl.expand_dims(d, 0))


@gluon.jit
def _copy_line(lse, LSE, delta, DELTA, b, kv, c, LQ, H: gl.constexpr, G: gl.constexpr):
    """Start copying the log-sum-exp and DELTA of rows c."""
    at = (b * LQ + gl.minimum(c // G, LQ - 1)) * H + kv * G + c % G
    async_copy.async_copy_global_to_shared(lse, LSE + at)
    async_copy.async_copy_global_to_shared(delta, DELTA + at)


@gluon.jit
def _kept(y, INDEX, chunk, E, bands, total, EIDETIC: gl.constexpr):
    """The eidetic rows at places y, -1 elsewhere."""
    if EIDETIC:
        return gl.load(INDEX + chunk.to(gl.int64) * E + y - bands, mask=(y >= bands) & (y < total), other=-1)
    return y * 0 - 1


@gluon.jit
def _seen(
    y, a, start, INDEX, POSITION, chunk, E, b, R, contexts, bands, total, top, top_f, W, F,
    EIDETIC: gl.constexpr, BOUNDED: gl.constexpr, PLACED: gl.constexpr,
):  # fmt: skip
    """Which queries (rows, at a) see which places y of the list (columns)."""
    place = _kept(y, INDEX, chunk, E, bands, total, EIDETIC)
    held = place >= 0
    if PLACED:
        place = gl.load(POSITION + b * R + place, mask=held, other=0)
    near = y < contexts
    band = y < bands
    j = gl.where(near, top - 1 - y, gl.where(band, top_f - 1 - y + contexts, place))
    lo = gl.where(near, 0, gl.where(band | held, W, NEVER))
    hi = gl.where(near, W, gl.where(band, W + F, NEVER))
    e = gl.expand_dims(a, 1) - gl.expand_dims(j, 0)
    seen = (e >= gl.expand_dims(lo, 0)) & (e < gl.expand_dims(hi, 0))
    if BOUNDED:
        seen = seen & ((gl.expand_dims(j, 0) >= gl.expand_dims(start, 1)) | gl.expand_dims(y >= bands, 0))
    return seen


@gluon.jit
def _list(
    a0, a1, low, high, W, F, BN: gl.constexpr, FADING: gl.constexpr, ALIGN_F: gl.constexpr, ALIGN_E: gl.constexpr
):
    """The list's in-context part, its in-context and fading parts, and how far every query sees each of the two.

    A part whose successor has queries of its own is filled up to whole tiles with rows that nobody sees.
    """
    contexts = gl.minimum(W + a1 - a0, a1 + 1 - low)
    whole = a1 + 1 - gl.maximum(a1 - W + 1, high)
    fadings = contexts * 0
    whole_f = contexts * 0
    if FADING:
        fadings = gl.maximum(gl.minimum(F + a1 - a0, a1 - W + 1 - low), 0)
        whole_f = a1 - W + 1 - gl.maximum(a1 - W - F + 1, high)
    if ALIGN_F:
        contexts = gl.cdiv(contexts, BN) * BN
    bands = contexts + fadings
    if ALIGN_E:
        bands = gl.cdiv(bands, BN) * BN
    return contexts, whole, bands, whole_f


@gluon.jit
def _is_whole(x0, BN: gl.constexpr, spread, contexts, whole, bands, whole_f, safe):
    """Whether every query sees all BN places from x0."""
    x1 = x0 + BN
    near = (x0 >= spread) & (x1 <= whole)
    far = (x0 >= contexts + spread) & (x1 <= contexts + whole_f)
    return near | far | ((x0 >= bands) & (x1 <= bands + safe))


@gluon.jit
def attend_forward(
    Q, QF, QE, K, V, KF, VF, KE, VE, INDEX, COUNT, SAFE, POSITION, START, O, LSE, LQ, PAST, W, F, C, E, R, scale,
    q_b, q_t, qf_b, qf_t, qe_b, qe_t, k_b, k_t, v_b, v_t, kf_b, kf_t, vf_b, vf_t, ke_b, ke_t, ve_b, ve_t,
    H: gl.constexpr, G: gl.constexpr, P: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, FADING: gl.constexpr,
    EIDETIC: gl.constexpr, TIED_F: gl.constexpr, TIED_E: gl.constexpr, DOCUMENTS: gl.constexpr, PLACED: gl.constexpr,
    WARPS: gl.constexpr, DEPTH: gl.constexpr, HOLD: gl.constexpr,
):  # fmt: skip
    """O (b, i, heads, p) and LSE. With EIDETIC a tile lies within one chunk of C queries: BM divides C * G."""
    dtype: gl.constexpr = Q.dtype.element_ty
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, P, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [256 // P, P // 8], [WARPS, 1], [1, 0])
    across: gl.constexpr = gl.SliceLayout(1, copies)
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, P], dtype)
    ALIGN_F: gl.constexpr = FADING and not TIED_F
    ALIGN_E: gl.constexpr = EIDETIC and not TIED_E
    KINDS: gl.constexpr = 1 + (1 if ALIGN_F else 0) + (1 if ALIGN_E else 0)
    BOUNDED: gl.constexpr = DOCUMENTS or KINDS > 1

    first = gl.program_id(0) * BM
    kv = gl.program_id(1)
    b = gl.program_id(2).to(gl.int64)
    d = gl.arange(0, P, gl.SliceLayout(0, copies))
    a0 = first // G + PAST
    a1 = gl.minimum((first + BM - 1) // G, LQ - 1) + PAST
    low = 0
    high = 0  # a key row at or after `low` is in the first query's document, one at or after `high` in every query's
    row = first + gl.arange(0, BM, by_row)
    i = gl.minimum(row // G, LQ - 1)
    a = i + PAST
    start = i * 0
    if DOCUMENTS:
        start = gl.load(START + b * LQ + i)
        low = gl.load(START + b * LQ + a0 - PAST)
        high = gl.load(START + b * LQ + a1 - PAST)
    contexts, whole, bands, whole_f = _list(a0, a1, low, high, W, F, BN, FADING, ALIGN_F, ALIGN_E)
    total = bands
    safe = bands * 0
    chunk = bands * 0
    if EIDETIC:
        chunk = (b * gl.cdiv(LQ, C) + (first // G) // C).to(gl.int32)
        total = bands + gl.load(COUNT + chunk)
        safe = gl.load(SAFE + chunk)
    top = a1 + 1
    top_f = a1 - W + 1
    spread = a1 - a0
    K += b * k_b + kv * P
    V += b * v_b + kv * P
    KF += b * kf_b + kv * P
    VF += b * vf_b + kv * P
    KE += b * ke_b + kv * P
    VE += b * ve_b + kv * P

    q = gl.allocate_shared_memory(dtype, [KINDS, BM, P], shared)
    SLOTS: gl.constexpr = DEPTH + 1
    keys = gl.allocate_shared_memory(dtype, [2 * SLOTS, BN, P], shared)  # keys in the first SLOTS, values in the others
    r = first + gl.arange(0, BM, across)
    _copy_rows(q.index(0), Q, b, kv, r, d, LQ, q_b, q_t, G, P)
    if ALIGN_F:
        _copy_rows(q.index(1), QF, b, kv, r, d, LQ, qf_b, qf_t, G, P)
    if ALIGN_E:
        _copy_rows(q.index(KINDS - 1), QE, b, kv, r, d, LQ, qe_b, qe_t, G, P)
    x = gl.arange(0, BN, across)
    tiles = gl.cdiv(total, BN)
    kept_v = _kept(x, INDEX, chunk, E, bands, total, EIDETIC)
    kept_k = kept_v
    for t in gl.static_range(DEPTH):  # group t brings keys t and values t - 1
        if t > 0:
            _copy(
                keys.index(SLOTS + t - 1), (t - 1) * BN, x, kept_v, d, V, VF, VE, v_t, vf_t, ve_t, contexts, bands, top,
                top_f, BN,
            )  # fmt: skip
            kept_v = kept_k
        _copy(keys.index(t), t * BN, x, kept_k, d, K, KF, KE, k_t, kf_t, ke_t, contexts, bands, top, top_f, BN)
        async_copy.commit_group()
        kept_k = _kept(x + (t + 1) * BN, INDEX, chunk, E, bands, total, EIDETIC)

    column = gl.arange(0, BN, gl.SliceLayout(0, scores))
    m = gl.full([BM], NEG, gl.float32, by_row)
    l = gl.full([BM], 0.0, gl.float32, by_row)
    nothing = gl.zeros([BM, BN], gl.float32, scores)
    w = nothing
    acc = warpgroup_mma_init(gl.zeros([BM, P], gl.float32, sums))
    if HOLD:  # queries of one kind stay in registers
        async_copy.wait_group(DEPTH - 1)
        held = q.index(0).load(gl.DotOperandLayout(0, scores, 2))
    for n in range(tiles):
        async_copy.wait_group(DEPTH - 1)  # keys n and values n - 1 have come; Triton puts a barrier here
        x0 = n * BN
        kind = 0
        if KINDS > 1:
            if ALIGN_F:
                kind = gl.where(x0 >= contexts, 1, 0)
            if ALIGN_E:
                kind = gl.where(x0 >= bands, KINDS - 1, kind)
        k = keys.index(n % SLOTS).permute((1, 0))
        if HOLD:
            s = warpgroup_mma(held, k, nothing, use_acc=False, is_async=True)
        else:
            s = warpgroup_mma(q.index(kind), k, nothing, use_acc=False, is_async=True)
        p = gl.convert_layout(w.to(dtype), weights)
        # The first time the weights are 0, and keys 0 stand for the values of a tile before them.
        before = gl.where(n == 0, 0, SLOTS + (n + SLOTS - 1) % SLOTS)
        acc = warpgroup_mma(p, keys.index(before), acc, is_async=True)
        if n + DEPTH - 1 < tiles:
            _copy(
                keys.index(SLOTS + (n + DEPTH - 1) % SLOTS), x0 + (DEPTH - 1) * BN, x, kept_v, d, V, VF, VE, v_t, vf_t,
                ve_t, contexts, bands, top, top_f, BN,
            )  # fmt: skip
        if n + DEPTH < tiles:
            _copy(
                keys.index((n + DEPTH) % SLOTS), x0 + DEPTH * BN, x, kept_k, d, K, KF, KE, k_t, kf_t, ke_t, contexts,
                bands, top, top_f, BN,
            )  # fmt: skip
        async_copy.commit_group()
        kept_v = kept_k
        kept_k = _kept(x + x0 + (DEPTH + 1) * BN, INDEX, chunk, E, bands, total, EIDETIC)
        s = warpgroup_mma_wait(1, deps=(s,))
        if not _is_whole(x0, BN, spread, contexts, whole, bands, whole_f, safe):
            seen = _seen(
                column + x0, a, start, INDEX, POSITION, chunk, E, b, R, contexts, bands, total, top, top_f, W, F,
                EIDETIC, BOUNDED, PLACED,
            )  # fmt: skip
            s = gl.where(seen, s, NEG)
        peak = gl.maximum(m, gl.max(s, 1) * scale)
        w = gl.exp2(s * scale - gl.expand_dims(peak, 1))
        shrink = gl.exp2(m - peak)
        l = l * shrink + gl.sum(w, 1)
        m = peak
        grown = warpgroup_mma_wait(0, deps=(acc,))
        acc = warpgroup_mma_init(grown * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, sums)), 1))
    p = gl.convert_layout(w.to(dtype), weights)
    async_copy.wait_group(0)
    acc = warpgroup_mma(p, keys.index(SLOTS + (tiles + SLOTS - 1) % SLOTS), acc, is_async=True)
    out = warpgroup_mma_wait(0, deps=(acc,))
    out = out / gl.expand_dims(gl.convert_layout(l, gl.SliceLayout(1, sums)), 1)
    wide = gl.convert_layout(out.to(dtype), copies)
    at = (b * LQ + r // G) * (H * P) + (kv * G + r % G) * P
    gl.store(O + gl.expand_dims(at, 1) + gl.expand_dims(d, 0), wide, mask=gl.expand_dims(r // G < LQ, 1))
    gl.store(LSE + (b * LQ + i) * H + kv * G + row % G, m + gl.log2(l), mask=row // G < LQ)


@gluon.jit
def _query_pass(
    q, do, k, v, lse, delta, x_begin, x_end, x, d, column, a, start, K, V, KF, VF, KE, VE, k_t, v_t, kf_t, vf_t, ke_t,
    ve_t, INDEX, POSITION, chunk, E, b, R, contexts, whole, bands, whole_f, total, safe, spread, top, top_f, W, F,
    scale, BM: gl.constexpr, BN: gl.constexpr, P: gl.constexpr, EIDETIC: gl.constexpr, BOUNDED: gl.constexpr,
    PLACED: gl.constexpr, WARPS: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """The gradient of one kind of queries, before its scale, from places x_begin .. x_end - 1 of the list."""
    dtype: gl.constexpr = q.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, P, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    nothing = gl.zeros([BM, BN], gl.float32, scores)
    tiles = gl.cdiv(x_end - x_begin, BN)
    kept = _kept(x + x_begin, INDEX, chunk, E, bands, total, EIDETIC)
    for t in gl.static_range(DEPTH):
        x0 = x_begin + t * BN
        _copy(k.index(t), x0, x, kept, d, K, KF, KE, k_t, kf_t, ke_t, contexts, bands, top, top_f, BN)
        _copy(v.index(t), x0, x, kept, d, V, VF, VE, v_t, vf_t, ve_t, contexts, bands, top, top_f, BN)
        async_copy.commit_group()
        kept = _kept(x + x0 + BN, INDEX, chunk, E, bands, total, EIDETIC)
    dq = warpgroup_mma_init(gl.zeros([BM, P], gl.float32, sums))
    change = nothing
    for n in range(tiles):
        x0 = x_begin + n * BN
        async_copy.wait_group(DEPTH - 1)
        s = warpgroup_mma(q, k.index(n % (DEPTH + 2)).permute((1, 0)), nothing, use_acc=False, is_async=True)
        dp = warpgroup_mma(do, v.index(n % (DEPTH + 1)).permute((1, 0)), nothing, use_acc=False, is_async=True)
        ds = gl.convert_layout(change.to(dtype), weights)
        # The first time `ds` is 0, and keys 0 stand for those of a tile before them.
        before = gl.where(n == 0, 0, (n + DEPTH + 1) % (DEPTH + 2))
        dq = warpgroup_mma(ds, k.index(before), dq, is_async=True)
        if n + DEPTH < tiles:
            _copy(
                k.index((n + DEPTH) % (DEPTH + 2)), x0 + DEPTH * BN, x, kept, d, K, KF, KE, k_t, kf_t, ke_t, contexts,
                bands, top, top_f, BN,
            )  # fmt: skip
            _copy(
                v.index((n + DEPTH) % (DEPTH + 1)), x0 + DEPTH * BN, x, kept, d, V, VF, VE, v_t, vf_t, ve_t, contexts,
                bands, top, top_f, BN,
            )  # fmt: skip
        async_copy.commit_group()
        kept = _kept(x + x0 + (DEPTH + 1) * BN, INDEX, chunk, E, bands, total, EIDETIC)
        s, dp = warpgroup_mma_wait(1, deps=(s, dp))
        p = gl.exp2(s * scale - gl.expand_dims(lse, 1))
        if not _is_whole(x0, BN, spread, contexts, whole, bands, whole_f, safe):
            seen = _seen(
                column + x0, a, start, INDEX, POSITION, chunk, E, b, R, contexts, bands, total, top, top_f, W, F,
                EIDETIC, BOUNDED, PLACED,
            )  # fmt: skip
            p = gl.where(seen, p, 0.0)
        change = p * (dp + gl.expand_dims(delta, 1))
        dq = warpgroup_mma_init(warpgroup_mma_wait(0, deps=(dq,)))
    ds = gl.convert_layout(change.to(dtype), weights)
    dq = warpgroup_mma(ds, k.index((tiles + DEPTH + 1) % (DEPTH + 2)), dq, is_async=True)
    async_copy.wait_group(0)
    return warpgroup_mma_wait(0, deps=(dq,))


@gluon.jit
def attend_backward_queries(
    Q, QF, QE, K, V, KF, VF, KE, VE, INDEX, COUNT, SAFE, POSITION, START, DO, LSE, DELTA, DQ, DQF, DQE,
    LQ, PAST, W, F, C, E, R, scale, natural,
    q_b, q_t, qf_b, qf_t, qe_b, qe_t, k_b, k_t, v_b, v_t, kf_b, kf_t, vf_b, vf_t, ke_b, ke_t, ve_b, ve_t,
    H: gl.constexpr, G: gl.constexpr, P: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, FADING: gl.constexpr,
    EIDETIC: gl.constexpr, TIED_F: gl.constexpr, TIED_E: gl.constexpr, DOCUMENTS: gl.constexpr, PLACED: gl.constexpr,
    WARPS: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """Gradients of the queries, (b, i, heads, p); tied queries share DQ. `natural` is the scale of q k^T."""
    dtype: gl.constexpr = Q.dtype.element_ty
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BN, 16])
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [256 // P, P // 8], [WARPS, 1], [1, 0])
    across: gl.constexpr = gl.SliceLayout(1, copies)
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, P], dtype)
    ALIGN_F: gl.constexpr = FADING and not TIED_F
    ALIGN_E: gl.constexpr = EIDETIC and not TIED_E
    BOUNDED: gl.constexpr = DOCUMENTS or ALIGN_F or ALIGN_E

    first = gl.program_id(0) * BM
    kv = gl.program_id(1)
    b = gl.program_id(2).to(gl.int64)
    d = gl.arange(0, P, gl.SliceLayout(0, copies))
    a0 = first // G + PAST
    a1 = gl.minimum((first + BM - 1) // G, LQ - 1) + PAST
    low = 0
    high = 0
    row = first + gl.arange(0, BM, gl.SliceLayout(1, scores))
    i = gl.minimum(row // G, LQ - 1)
    a = i + PAST
    start = i * 0
    if DOCUMENTS:
        start = gl.load(START + b * LQ + i)
        low = gl.load(START + b * LQ + a0 - PAST)
        high = gl.load(START + b * LQ + a1 - PAST)
    contexts, whole, bands, whole_f = _list(a0, a1, low, high, W, F, BN, FADING, ALIGN_F, ALIGN_E)
    total = bands
    safe = bands * 0
    chunk = bands * 0
    if EIDETIC:
        chunk = (b * gl.cdiv(LQ, C) + (first // G) // C).to(gl.int32)
        total = bands + gl.load(COUNT + chunk)
        safe = gl.load(SAFE + chunk)
    top = a1 + 1
    top_f = a1 - W + 1
    K += b * k_b + kv * P
    V += b * v_b + kv * P
    KF += b * kf_b + kv * P
    VF += b * vf_b + kv * P
    KE += b * ke_b + kv * P
    VE += b * ve_b + kv * P
    lse = gl.load(LSE + (b * LQ + i) * H + kv * G + row % G)
    delta = gl.load(DELTA + (b * LQ + i) * H + kv * G + row % G)

    q = gl.allocate_shared_memory(dtype, [BM, P], shared)
    do = gl.allocate_shared_memory(dtype, [BM, P], shared)
    k = gl.allocate_shared_memory(dtype, [DEPTH + 2, BN, P], shared)
    v = gl.allocate_shared_memory(dtype, [DEPTH + 1, BN, P], shared)
    r = first + gl.arange(0, BM, across)
    x = gl.arange(0, BN, across)
    column = gl.arange(0, BN, gl.SliceLayout(0, scores))
    at = (b * LQ + r // G) * (H * P) + (kv * G + r % G) * P
    at = gl.expand_dims(at, 1) + gl.expand_dims(d, 0)
    on = gl.expand_dims(r // G < LQ, 1)
    _copy_rows(do, DO, b, kv, r, d, LQ, LQ * H * P, H * P, G, P)
    for kind in gl.static_range(3):  # each kind of queries has a stretch of the list of its own
        if kind == 0 or (kind == 1 and ALIGN_F) or (kind == 2 and ALIGN_E):
            begin = bands * 0
            end = total
            if kind == 0:
                _copy_rows(q, Q, b, kv, r, d, LQ, q_b, q_t, G, P)
                if ALIGN_F:
                    end = contexts
                elif ALIGN_E:
                    end = bands
            if kind == 1:
                gl.thread_barrier()
                _copy_rows(q, QF, b, kv, r, d, LQ, qf_b, qf_t, G, P)
                begin = contexts
                if ALIGN_E:
                    end = bands
            if kind == 2:
                gl.thread_barrier()
                _copy_rows(q, QE, b, kv, r, d, LQ, qe_b, qe_t, G, P)
                begin = bands
            dq = _query_pass(
                q, do, k, v, lse, delta, begin, end, x, d, column, a, start, K, V, KF, VF, KE, VE, k_t, v_t, kf_t, vf_t,
                ke_t, ve_t, INDEX, POSITION, chunk, E, b, R, contexts, whole, bands, whole_f, total, safe, a1 - a0, top,
                top_f, W, F, scale, BM, BN, P, EIDETIC, BOUNDED, PLACED, WARPS, DEPTH,
            )  # fmt: skip
            wide = gl.convert_layout((dq * natural).to(dtype), copies)
            if kind == 0:
                gl.store(DQ + at, wide, mask=on)
            elif kind == 1:
                gl.store(DQF + at, wide, mask=on)
            else:
                gl.store(DQE + at, wide, mask=on)


@gluon.jit
def attend_backward_keys(
    Q, QF, K, V, KF, VF, END, DO, LSE, DELTA, DK, DV, DKF, DVF, LQ, LK, PAST, W, F, scale, natural,
    q_b, q_t, qf_b, qf_t, k_b, k_t, v_b, v_t, kf_b, kf_t, vf_b, vf_t,
    H: gl.constexpr, G: gl.constexpr, P: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, FADING: gl.constexpr,
    DOCUMENTS: gl.constexpr, WARPS: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """Gradients of in-context and fading keys and values, (b, j, g, p); the grid's last axis is 2 b with FADING."""
    dtype: gl.constexpr = Q.dtype.element_ty
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, P, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [256 // P, P // 8], [WARPS, 1], [1, 0])
    across: gl.constexpr = gl.SliceLayout(1, copies)
    by_column: gl.constexpr = gl.SliceLayout(0, scores)
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, P], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])

    j0 = gl.program_id(0) * BN
    kv = gl.program_id(1)
    heads = gl.num_programs(1)
    b = gl.program_id(2).to(gl.int64)
    lo = 0
    hi = W
    if FADING:
        b = (gl.program_id(2) // 2).to(gl.int64)
        fading = gl.program_id(2) % 2 == 1
        Q, q_b, q_t = gl.where(fading, QF, Q), gl.where(fading, qf_b, q_b), gl.where(fading, qf_t, q_t)
        K, k_b, k_t = gl.where(fading, KF, K), gl.where(fading, kf_b, k_b), gl.where(fading, kf_t, k_t)
        V, v_b, v_t = gl.where(fading, VF, V), gl.where(fading, vf_b, v_b), gl.where(fading, vf_t, v_t)
        DK, DV = gl.where(fading, DKF, DK), gl.where(fading, DVF, DV)
        lo = gl.where(fading, W, 0)
        hi = gl.where(fading, W + F, W)
    d = gl.arange(0, P, gl.SliceLayout(0, copies))
    rj = j0 + gl.arange(0, BN, across)
    j = j0 + gl.arange(0, BN, gl.SliceLayout(1, scores))
    end = j * 0 + LQ + PAST  # queries before it see the key
    least = LQ + PAST
    last = LQ + PAST
    if DOCUMENTS:
        end = gl.load(END + b * LK + j, mask=j < LK, other=0)
        least = gl.load(END + b * LK + j0)
        last = gl.load(END + b * LK + gl.minimum(j0 + BN, LK) - 1)
    begin = gl.maximum(j0 + lo, PAST)  # first query that sees a key of the tile
    stop = gl.minimum(gl.minimum(j0 + BN - 1 + hi, last), LQ + PAST)
    # From `full` on every key is past the near edge; from `fall` on some are past the far one.
    full = gl.maximum(j0 + BN - 1 + lo, begin)
    fall = gl.minimum(gl.minimum(j0 + hi, least), stop)
    rows = gl.maximum(stop - begin, 0) * G
    near = gl.minimum(gl.cdiv((full - begin) * G, BM), gl.cdiv(rows, BM))
    inner = near + gl.maximum((fall - begin) * G - near * BM, 0) // BM
    base = (begin - PAST) * G
    tiles = gl.cdiv(rows, BM)

    k = gl.allocate_shared_memory(dtype, [BN, P], shared)
    v = gl.allocate_shared_memory(dtype, [BN, P], shared)
    SLOTS: gl.constexpr = DEPTH + 2
    q = gl.allocate_shared_memory(dtype, [SLOTS, BM, P], shared)
    do = gl.allocate_shared_memory(dtype, [SLOTS, BM, P], shared)
    lse = gl.allocate_shared_memory(gl.float32, [SLOTS, BM], flat)
    delta = gl.allocate_shared_memory(gl.float32, [SLOTS, BM], flat)
    at = gl.expand_dims(gl.minimum(rj, LK - 1).to(gl.int64), 1)
    async_copy.async_copy_global_to_shared(k, K + b * k_b + kv * P + at * k_t + gl.expand_dims(d, 0))
    async_copy.async_copy_global_to_shared(v, V + b * v_b + kv * P + at * v_t + gl.expand_dims(d, 0))
    r = base + gl.arange(0, BM, across)
    c = base + gl.arange(0, BM, line)
    for t in gl.static_range(DEPTH):
        _copy_rows(q.index(t), Q, b, kv, r + t * BM, d, LQ, q_b, q_t, G, P)
        _copy_rows(do.index(t), DO, b, kv, r + t * BM, d, LQ, LQ * H * P, H * P, G, P)
        _copy_line(lse.index(t), LSE, delta.index(t), DELTA, b, kv, c + t * BM, LQ, H, G)
        async_copy.commit_group()

    column = base + gl.arange(0, BM, by_column)
    dk = warpgroup_mma_init(gl.zeros([BN, P], gl.float32, sums))
    dv = warpgroup_mma_init(gl.zeros([BN, P], gl.float32, sums))
    blank = gl.zeros([BN, BM], gl.float32, scores)
    for n in range(tiles):
        async_copy.wait_group(DEPTH - 1)
        slot = n % SLOTS
        if n + DEPTH < tiles:
            ahead = (n + DEPTH) % SLOTS
            far = (n + DEPTH) * BM
            _copy_rows(q.index(ahead), Q, b, kv, r + far, d, LQ, q_b, q_t, G, P)
            _copy_rows(do.index(ahead), DO, b, kv, r + far, d, LQ, LQ * H * P, H * P, G, P)
            _copy_line(lse.index(ahead), LSE, delta.index(ahead), DELTA, b, kv, c + far, LQ, H, G)
        async_copy.commit_group()
        s = warpgroup_mma(k, q.index(slot).permute((1, 0)), blank, use_acc=False, is_async=True)
        dp = warpgroup_mma(v, do.index(slot).permute((1, 0)), blank, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        p = gl.exp2(s * scale - gl.expand_dims(lse.index(slot).load(by_column), 0))
        if (n < near) | (n >= inner):
            a = gl.expand_dims((column + n * BM) // G + PAST, 0)
            e = a - gl.expand_dims(j, 1)
            seen = (e >= lo) & (e < hi) & (a < gl.expand_dims(end, 1)) & (gl.expand_dims(j, 1) < LK)
            p = gl.where(seen & (a < LQ + PAST), p, 0.0)
        dv = warpgroup_mma(gl.convert_layout(p.to(dtype), weights), do.index(slot), dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds = p * (dp + gl.expand_dims(delta.index(slot).load(by_column), 0))
        dk = warpgroup_mma(gl.convert_layout(ds.to(dtype), weights), q.index(slot), dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    async_copy.wait_group(0)
    at = ((b * LK + rj) * heads + kv) * P
    at = gl.expand_dims(at, 1) + gl.expand_dims(d, 0)
    on = gl.expand_dims(rj < LK, 1)
    gl.store(DK + at, gl.convert_layout((dk * natural).to(dtype), copies), mask=on)
    gl.store(DV + at, gl.convert_layout(dv.to(dtype), copies), mask=on)
