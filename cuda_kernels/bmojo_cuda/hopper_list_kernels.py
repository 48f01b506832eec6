"""What the Hopper kernels of memory attention share: the list of keys of a tile of queries, in Gluon.

The keys of a tile of queries form ONE list: in-context from the newest down, fading from the newest down, then eidetic.
x counts along it. A tile of the list may straddle two memories, since every row has a pointer of its own; only tiles
that some query does not see whole are masked. Letters as in attention_kernels.py.

A program takes pieces of the work in turn: tiles of BM rows of queries of one key/value head. Four warps copy what
the others will need (cp.async into a ring of SLOTS tiles, `full` and `empty` barriers), and two groups of four warps
each compute half of the rows, so the products of one run while the other turns scores into weights.
"""

# Triton's language, not Python's: constant conditions stand alone.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier

NEVER = gl.constexpr(1 << 30)  # the position of an empty slot
COPIERS = gl.constexpr(4)  # warps that copy


@gluon.jit
def copy_keys(slot, x0, x, kept, d, X, XF, XE, x_t, xf_t, xe_t, contexts, bands, top, top_f, BN: gl.constexpr):
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
def copy_rows(slot, X, b, kv, first, x, d, LQ, x_b, x_t, G: gl.constexpr, P: gl.constexpr, ROWS: gl.constexpr):
    """Start copying ROWS rows from `first` of the (position, head) grid of one key/value head into a shared tile."""
    for r0 in gl.static_range(0, ROWS, x.shape[0]):  # in parts: fewer pointers at a time
        r = first + r0 + x
        i = gl.minimum(r // G, LQ - 1).to(gl.int64)
        at = X + b * x_b + i * x_t + (kv * G + r % G) * P
        part = slot.slice(r0, x.shape[0])
        async_copy.async_copy_global_to_shared(part, gl.expand_dims(at, 1) + gl.expand_dims(d, 0))


@gluon.jit
def eidetic_rows(INDEX, y, chunk, E, bands, total, EIDETIC: gl.constexpr):
    """The eidetic rows at places y, -1 elsewhere."""
    if EIDETIC:
        return gl.load(INDEX + chunk.to(gl.int64) * E + y - bands, mask=(y >= bands) & (y < total), other=-1)
    return y * 0 - 1


@gluon.jit
def seen_by(y, place, a, start, contexts, bands, total, top, top_f, W, F, BOUNDED: gl.constexpr):
    """Which queries (rows, at a) see which places y of the list (columns); `place` are positions of eidetic tokens."""
    near = y < contexts
    band = y < bands
    j = gl.where(near, top - 1 - y, gl.where(band, top_f - 1 - y + contexts, gl.where(y < total, place, NEVER)))
    nearest = gl.expand_dims(j + gl.where(near, 0, W), 0)
    span = gl.expand_dims(gl.where(near, W, gl.where(band, F, NEVER)), 0)
    seen = (gl.expand_dims(a, 1) - nearest).to(gl.uint32) < span.to(gl.uint32)  # below `nearest` it wraps around
    if BOUNDED:
        seen = seen & ((gl.expand_dims(j, 0) >= gl.expand_dims(start, 1)) | gl.expand_dims(y >= bands, 0))
    return seen


@gluon.jit
def is_whole(x0, BN: gl.constexpr, spread, contexts, whole, bands, whole_f, safe):
    """Whether every query sees all BN places from x0."""
    x1 = x0 + BN
    near = (x0 >= spread) & (x1 <= whole)
    far = (x0 >= contexts + spread) & (x1 <= contexts + whole_f)
    return near | far | ((x0 >= bands) & (x1 <= bands + safe))


@gluon.jit
def piece(
    n, LQ, PAST, W, F, C, heads, batch, START, COUNT, SAFE,
    G: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, FADING: gl.constexpr, EIDETIC: gl.constexpr,
    ALIGN_F: gl.constexpr, ALIGN_E: gl.constexpr, DOCUMENTS: gl.constexpr,
):  # fmt: skip
    """Piece n of the work: its first row, head, sequence, and its list of keys. Late tiles, with more keys, come first.

    Of the list: its in-context part, its in-context and fading parts, all of it, and how far every query sees each.
    A part whose successor has queries of its own is filled up to whole tiles with rows that nobody sees.
    """
    pairs = heads * batch
    first = (gl.cdiv(LQ * G, BM) - 1 - n // pairs) * BM
    kv = n % heads
    b = n % pairs // heads
    a0 = first // G + PAST
    a1 = gl.minimum((first + BM - 1) // G, LQ - 1) + PAST
    low = a0 * 0
    high = a0 * 0  # a key row at or after `low` is in the first query's document, one at or after `high` in every one's
    if DOCUMENTS:
        low = gl.load(START + b.to(gl.int64) * LQ + a0 - PAST)
        high = gl.load(START + b.to(gl.int64) * LQ + a1 - PAST)
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
    total = bands
    safe = bands * 0
    chunk = bands * 0
    if EIDETIC:
        chunk = b * gl.cdiv(LQ, C) + (first // G) // C
        total = bands + gl.load(COUNT + chunk)
        safe = gl.load(SAFE + chunk)
    return first, kv, b.to(gl.int64), a0, a1, contexts, whole, bands, whole_f, total, safe, chunk


@gluon.jit
def copy_ahead(
    Q, QF, QE, K, V, KF, VF, KE, VE, INDEX, COUNT, SAFE, PLACES, START, LQ, PAST, W, F, C, E, heads, batch, pieces,
    q_b, q_t, qf_b, qf_t, qe_b, qe_t, k_b, k_t, v_b, v_t, kf_b, kf_t, vf_b, vf_t, ke_b, ke_t, ve_b, ve_t,
    q, keys, values, places, full, empty, ready, drained,
    G: gl.constexpr, P: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, FADING: gl.constexpr, EIDETIC: gl.constexpr,
    ALIGN_F: gl.constexpr, ALIGN_E: gl.constexpr, DOCUMENTS: gl.constexpr, KINDS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The copying warps: queries, tiles of keys and values, each as soon as its place is free."""
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [256 // P, P // 8], [COPIERS, 1], [1, 0])
    across: gl.constexpr = gl.SliceLayout(1, copies)
    d = gl.arange(0, P, gl.SliceLayout(0, copies))
    x = gl.arange(0, BN, across)
    z = gl.arange(0, BN, gl.BlockedLayout([1], [32], [COPIERS], [0]))
    turn = 0
    for n in range(gl.program_id(0), pieces, gl.num_programs(0)):
        first, kv, b, _, a1, contexts, _, bands, _, total, _, chunk = piece(
            n, LQ, PAST, W, F, C, heads, batch, START, COUNT, SAFE, G, BM, BN, FADING, EIDETIC, ALIGN_F, ALIGN_E,
            DOCUMENTS,
        )  # fmt: skip
        k_at = K + b * k_b + kv * P
        v_at = V + b * v_b + kv * P
        kf_at = KF + b * kf_b + kv * P
        vf_at = VF + b * vf_b + kv * P
        ke_at = KE + b * ke_b + kv * P
        ve_at = VE + b * ve_b + kv * P
        top = a1 + 1
        top_f = a1 - W + 1
        kept = eidetic_rows(INDEX, x, chunk, E, bands, total, EIDETIC)
        for x0 in range(0, total, BN):
            slot = turn % SLOTS
            mbarrier.wait(empty.index(slot), (turn // SLOTS & 1) ^ 1)
            copy_keys(
                keys.index(slot), x0, x, kept, d, k_at, kf_at, ke_at, k_t, kf_t, ke_t, contexts, bands, top, top_f, BN
            )
            copy_keys(
                values.index(slot), x0, x, kept, d, v_at, vf_at, ve_at, v_t, vf_t, ve_t, contexts, bands, top, top_f, BN
            )
            if EIDETIC:  # noqa: SIM102  (known when compiling, the other is not)
                if x0 + BN > bands:
                    e = gl.minimum(gl.maximum(z + x0 - bands, 0), E - 1)
                    async_copy.async_copy_global_to_shared(places.index(slot), PLACES + chunk.to(gl.int64) * E + e)
            async_copy.mbarrier_arrive(full.index(slot), increment_count=False)
            kept = eidetic_rows(INDEX, x + x0 + BN, chunk, E, bands, total, EIDETIC)
            turn += 1
            if x0 == 0:  # keys go ahead of queries, whose place may still be in use
                mbarrier.wait(drained, ((n - gl.program_id(0)) // gl.num_programs(0) & 1) ^ 1)
                r = gl.arange(0, 32, across)
                copy_rows(q.index(0), Q, b, kv, first, r, d, LQ, q_b, q_t, G, P, BM)
                if ALIGN_F:
                    copy_rows(q.index(1), QF, b, kv, first, r, d, LQ, qf_b, qf_t, G, P, BM)
                if ALIGN_E:
                    copy_rows(q.index(KINDS - 1), QE, b, kv, first, r, d, LQ, qe_b, qe_t, G, P, BM)
                async_copy.mbarrier_arrive(ready, increment_count=False)
    async_copy.wait_group(0)


@gluon.jit
def make_ring(dtype: gl.constexpr, BN: gl.constexpr, P: gl.constexpr, SLOTS: gl.constexpr):
    """Shared tiles of keys, of values, of positions of eidetic tokens."""
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, P], dtype)
    keys = gl.allocate_shared_memory(dtype, [SLOTS, BN, P], shared)
    values = gl.allocate_shared_memory(dtype, [SLOTS, BN, P], shared)
    places = gl.allocate_shared_memory(gl.int32, [SLOTS, BN], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    return keys, values, places


@gluon.jit
def make_barriers(SLOTS: gl.constexpr):
    """Of the ring: copied, free again; of the queries: copied, free again."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    drained = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for s in gl.static_range(SLOTS):
        mbarrier.init(full.index(s), count=32 * COPIERS)
        mbarrier.init(empty.index(s), count=2)
    mbarrier.init(ready, count=32 * COPIERS)
    mbarrier.init(drained, count=2)
    return full, empty, ready, drained
