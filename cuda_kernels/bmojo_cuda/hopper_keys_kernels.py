"""Gradients of memory attention's keys and values for Hopper GPUs in Gluon; letters as in attention_kernels.py.

Keys stay, queries stream past, four products a tile. Triton 3.6 makes each wait for the one before at head_dim 128;
here copies (cp.async) and products overlap. Scores are key-major (k q^T): no tile of registers is transposed.
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
def _gradients(
    Q, q_b, q_t, K, V, k_row, v_row, DO, LSE, DELTA, b, kv, LQ, PAST, base, tiles, near, inner, lo, hi, place, end,
    bits, since, latest, C, scale,
    H: gl.constexpr, G: gl.constexpr, P: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, MEMBERS: gl.constexpr,
    WARPS: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """Of BN keys and values, by `tiles` tiles of BM query rows from row `base`, before the scale.

    k_row, v_row (BN,): where the keys stand in K and V. A query at a sees a key at `place` where lo <= a - place < hi
    and a < end; all see all in tiles near .. inner - 1. With MEMBERS only those whose chunk, counted from `since`, is
    set in the key's `bits` do, and `latest` is the last of the places.
    """
    dtype: gl.constexpr = Q.dtype.element_ty
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, P, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [256 // P, P // 8], [WARPS, 1], [1, 0])
    by_column: gl.constexpr = gl.SliceLayout(0, scores)
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, P], dtype)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SLOTS: gl.constexpr = DEPTH + 2
    k = gl.allocate_shared_memory(dtype, [BN, P], shared)
    v = gl.allocate_shared_memory(dtype, [BN, P], shared)
    q = gl.allocate_shared_memory(dtype, [SLOTS, BM, P], shared)
    do = gl.allocate_shared_memory(dtype, [SLOTS, BM, P], shared)
    lse = gl.allocate_shared_memory(gl.float32, [SLOTS, BM], flat)
    delta = gl.allocate_shared_memory(gl.float32, [SLOTS, BM], flat)
    d = gl.arange(0, P, gl.SliceLayout(0, copies))
    async_copy.async_copy_global_to_shared(k, K + gl.expand_dims(k_row, 1) + gl.expand_dims(d, 0))
    async_copy.async_copy_global_to_shared(v, V + gl.expand_dims(v_row, 1) + gl.expand_dims(d, 0))
    r = base + gl.arange(0, BM, gl.SliceLayout(1, copies))
    c = base + gl.arange(0, BM, gl.BlockedLayout([1], [32], [WARPS], [0]))
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
        if MEMBERS:
            first = (base + n * BM) // G  # queries first .. final
            final = (base + n * BM + BM - 1) // G
            if (first // C == final // C) & (latest + lo <= first + PAST) & (final < LQ):
                member = (bits >> (first // C - since)) & 1
                p = gl.where(gl.expand_dims(member, 1) != 0, p, 0.0)
            else:
                i = gl.expand_dims((column + n * BM) // G, 0)
                held = (gl.expand_dims(bits, 1) >> gl.minimum(i // C - since, 31)) & 1
                seen = (held != 0) & (gl.expand_dims(place, 1) + lo <= i + PAST) & (i < LQ)
                p = gl.where(seen, p, 0.0)
        elif (n < near) | (n >= inner):
            a = gl.expand_dims((column + n * BM) // G + PAST, 0)
            e = a - gl.expand_dims(place, 1)
            seen = (e >= lo) & (e < hi) & (a < gl.expand_dims(end, 1))
            p = gl.where(seen, p, 0.0)
        dv = warpgroup_mma(gl.convert_layout(p.to(dtype), weights), do.index(slot), dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
        ds = p * (dp + gl.expand_dims(delta.index(slot).load(by_column), 0))
        dk = warpgroup_mma(gl.convert_layout(ds.to(dtype), weights), q.index(slot), dk, is_async=True)
    dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    async_copy.wait_group(0)
    return dk, dv


@gluon.jit
def attend_backward_keys(
    Q, QF, K, V, KF, VF, END, DO, LSE, DELTA, DK, DV, DKF, DVF, LQ, LK, PAST, W, F, scale, natural,
    q_b, q_t, qf_b, qf_t, k_b, k_t, v_b, v_t, kf_b, kf_t, vf_b, vf_t,
    H: gl.constexpr, G: gl.constexpr, P: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, FADING: gl.constexpr,
    DOCUMENTS: gl.constexpr, WARPS: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """Gradients of in-context and fading keys and values, (b, j, g, p); the grid's last axis is 2 b with FADING."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [256 // P, P // 8], [WARPS, 1], [1, 0])
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
    j = j0 + gl.arange(0, BN, gl.SliceLayout(1, scores))
    least = LQ + PAST
    last = LQ + PAST
    end = gl.where(j < LK, least, 0)  # queries before it see the key
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
    rj = j0 + gl.arange(0, BN, gl.SliceLayout(1, copies))
    row = gl.minimum(rj, LK - 1).to(gl.int64)
    dk, dv = _gradients(
        Q, q_b, q_t, K + b * k_b + kv * P, V + b * v_b + kv * P, row * k_t, row * v_t, DO, LSE, DELTA, b, kv, LQ, PAST,
        (begin - PAST) * G, gl.cdiv(rows, BM), near, inner, lo, hi, j, end, j, 0, 0, 0, scale,
        H, G, P, BM, BN, False, WARPS, DEPTH,
    )  # fmt: skip
    d = gl.arange(0, P, gl.SliceLayout(0, copies))
    at = gl.expand_dims(((b * LK + rj) * heads + kv) * P, 1) + gl.expand_dims(d, 0)
    on = gl.expand_dims(rj < LK, 1)
    gl.store(DK + at, gl.convert_layout((dk * natural).to(Q.dtype.element_ty), copies), mask=on)
    gl.store(DV + at, gl.convert_layout(dv.to(Q.dtype.element_ty), copies), mask=on)


@gluon.jit
def attend_backward_slots(
    Q, KE, VE, UNION, BITS, COUNT, POSITION, DO, LSE, DELTA, PARTS, LQ, PAST, W, C, R, U, groups, scale, natural,
    q_b, q_t, ke_b, ke_t, ve_b, ve_t,
    H: gl.constexpr, G: gl.constexpr, P: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, CHUNKS: gl.constexpr,
    PLACED: gl.constexpr, WARPS: gl.constexpr, DEPTH: gl.constexpr,
):  # fmt: skip
    """Gradients of the eidetic keys and values of one group of chunks: PARTS (b, groups, U, g, 2, p) float32."""
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, P, 16])
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [256 // P, P // 8], [WARPS, 1], [1, 0])
    u0 = gl.program_id(0) * BN
    kv = gl.program_id(1)
    heads = gl.num_programs(1)
    at = gl.program_id(2).to(gl.int64)  # b * groups + group
    b = at // groups
    group = (at % groups).to(gl.int32)
    count = gl.load(COUNT + at)
    if u0 < count:
        u = u0 + gl.arange(0, BN, gl.SliceLayout(1, scores))
        j = gl.load(UNION + at * U + u, mask=u < count, other=0)
        bits = gl.load(BITS + at * R + j, mask=u < count, other=0)
        place = j
        if PLACED:
            place = gl.load(POSITION + b * R + j)
        ru = gl.minimum(u0 + gl.arange(0, BN, gl.SliceLayout(1, copies)), count - 1)
        row = gl.load(UNION + at * U + ru).to(gl.int64)
        begin = group * CHUNKS * C
        rows = (gl.minimum(begin + CHUNKS * C, LQ) - begin) * G
        dk, dv = _gradients(
            Q, q_b, q_t, KE + b * ke_b + kv * P, VE + b * ve_b + kv * P, row * ke_t, row * ve_t, DO, LSE, DELTA, b, kv,
            LQ, PAST, begin * G, gl.cdiv(rows, BM), 0, 0, W, 0, place, place, bits, group * CHUNKS, gl.max(place, 0), C,
            scale, H, G, P, BM, BN, True, WARPS, DEPTH,
        )  # fmt: skip
        wu = u0 + gl.arange(0, BN, gl.SliceLayout(1, sums))
        d = gl.arange(0, P, gl.SliceLayout(0, sums))
        out = gl.expand_dims(((at * U + wu) * heads + kv) * 2 * P, 1) + gl.expand_dims(d, 0)
        on = gl.expand_dims(wu < count, 1)
        gl.store(PARTS + out, dk * natural, mask=on)
        gl.store(PARTS + out + P, dv, mask=on)
