"""Memory attention's forward pass for Hopper GPUs in Gluon; how the work is shared out is in hopper_list_kernels.py."""

# Triton's language, not Python's: constant conditions stand alone.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from bmojo_cuda.hopper_list_kernels import copy_ahead, is_whole, make_barriers, make_ring, piece, seen_by

NEG = gl.constexpr(-1.0e30)


@gluon.jit
def _attend(
    COUNT, SAFE, START, O, LSE, LQ, PAST, W, F, C, E, scale, heads, batch, pieces,
    q, keys, values, places, full, empty, ready, drained,
    HALF: gl.constexpr, H: gl.constexpr, G: gl.constexpr, P: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    FADING: gl.constexpr, EIDETIC: gl.constexpr, ALIGN_F: gl.constexpr, ALIGN_E: gl.constexpr, DOCUMENTS: gl.constexpr,
    KINDS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Half of the rows of every tile of queries. The product with the values of a tile runs beside the next scores."""
    BH: gl.constexpr = BM // 2
    dtype: gl.constexpr = keys.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    copies: gl.constexpr = gl.BlockedLayout([1, 8], [256 // P, P // 8], [4, 1], [1, 0])
    by_row: gl.constexpr = gl.SliceLayout(1, scores)
    HOLD: gl.constexpr = KINDS == 1  # queries of one kind stay in registers
    column = gl.arange(0, BN, gl.SliceLayout(0, scores))
    nothing = gl.zeros([BH, BN], gl.float32, scores)
    turn = 0
    for n in range(gl.program_id(0), pieces, gl.num_programs(0)):
        first, kv, b, a0, a1, contexts, whole, bands, whole_f, total, safe, _ = piece(
            n, LQ, PAST, W, F, C, heads, batch, START, COUNT, SAFE, G, BM, BN, FADING, EIDETIC, ALIGN_F, ALIGN_E,
            DOCUMENTS,
        )  # fmt: skip
        row = first + HALF * BH + gl.arange(0, BH, by_row)
        i = gl.minimum(row // G, LQ - 1)
        a = i + PAST
        start = i * 0
        if DOCUMENTS:
            start = gl.load(START + b * LQ + i)
        m = gl.full([BH], NEG, gl.float32, by_row)
        l = gl.full([BH], 0.0, gl.float32, by_row)
        p = gl.zeros([BH, BN], dtype, weights)
        acc = warpgroup_mma_init(gl.zeros([BH, P], gl.float32, sums))
        tiles = gl.cdiv(total, BN)
        mbarrier.wait(ready, (n - gl.program_id(0)) // gl.num_programs(0) & 1)
        if HOLD:
            held = q.index(0).slice(HALF * BH, BH).load(gl.DotOperandLayout(0, scores, 2))
            mbarrier.arrive(drained)
        mbarrier.wait(full.index(turn % SLOTS), turn // SLOTS & 1)
        for t in range(tiles):
            slot = turn % SLOTS
            fence_async_shared()
            x0 = t * BN
            entire = is_whole(x0, BN, a1 - a0, contexts, whole, bands, whole_f, safe)
            k = keys.index(slot).permute((1, 0))
            if HOLD:
                s = warpgroup_mma(held, k, nothing, use_acc=False, is_async=True)
            else:
                kind = 0
                if ALIGN_F:
                    kind = gl.where(x0 >= contexts, 1, 0)
                if ALIGN_E:
                    kind = gl.where(x0 >= bands, KINDS - 1, kind)
                s = warpgroup_mma(q.index(kind).slice(HALF * BH, BH), k, nothing, use_acc=False, is_async=True)
            # The first time the weights are 0, and the tile's own values stand for those of a tile before it.
            before = gl.where(t == 0, turn, turn - 1) % SLOTS
            acc = warpgroup_mma(p, values.index(before), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=(s,))
            if not entire:
                place = places.index(slot).load(gl.SliceLayout(0, scores))
                seen = seen_by(
                    column + x0, place, a, start, contexts, bands, total, a1 + 1, a1 - W + 1, W, F,
                    DOCUMENTS or KINDS > 1,
                )  # fmt: skip
                s = gl.where(seen, s, NEG)
            peak = gl.maximum(m, gl.max(s, 1) * scale)
            w = gl.exp2(s * scale - gl.expand_dims(peak, 1))
            shrink = gl.exp2(m - peak)
            l = l * shrink + gl.sum(w, 1)
            m = peak
            p = gl.convert_layout(w.to(dtype), weights)
            # This branch also keeps the assembler from waiting for the sums before the weights.
            if t + 1 < tiles:
                mbarrier.wait(full.index((turn + 1) % SLOTS), (turn + 1) // SLOTS & 1)
            grown, p = warpgroup_mma_wait(0, deps=(acc, p))
            mbarrier.arrive(empty.index(before), pred=t > 0)
            acc = warpgroup_mma_init(grown * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, sums)), 1))
            turn += 1
        if not HOLD:
            mbarrier.arrive(drained)
        last = (turn - 1) % SLOTS
        acc = warpgroup_mma(p, values.index(last), acc, is_async=True)
        out = warpgroup_mma_wait(0, deps=(acc,))
        mbarrier.arrive(empty.index(last))
        out = out / gl.expand_dims(gl.convert_layout(l, gl.SliceLayout(1, sums)), 1)
        wide = gl.convert_layout(out.to(dtype), copies)
        r = first + HALF * BH + gl.arange(0, BH, gl.SliceLayout(1, copies))
        d = gl.arange(0, P, gl.SliceLayout(0, copies))
        at = (b * LQ + r // G) * (H * P) + (kv * G + r % G) * P
        gl.store(O + gl.expand_dims(at, 1) + gl.expand_dims(d, 0), wide, mask=gl.expand_dims(r // G < LQ, 1))
        gl.store(LSE + (b * LQ + i) * H + kv * G + row % G, m + gl.log2(l), mask=row // G < LQ)


@gluon.jit
def attend_forward(
    Q, QF, QE, K, V, KF, VF, KE, VE, INDEX, COUNT, SAFE, PLACES, START, O, LSE, LQ, PAST, W, F, C, E, scale,
    heads, batch, pieces,
    q_b, q_t, qf_b, qf_t, qe_b, qe_t, k_b, k_t, v_b, v_t, kf_b, kf_t, vf_b, vf_t, ke_b, ke_t, ve_b, ve_t,
    H: gl.constexpr, G: gl.constexpr, P: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, FADING: gl.constexpr,
    EIDETIC: gl.constexpr, TIED_F: gl.constexpr, TIED_E: gl.constexpr, DOCUMENTS: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """O (b, i, heads, p) and LSE. With EIDETIC a tile lies within one chunk of C queries: BM divides C * G."""
    dtype: gl.constexpr = Q.dtype.element_ty
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, P], dtype)
    ALIGN_F: gl.constexpr = FADING and not TIED_F
    ALIGN_E: gl.constexpr = EIDETIC and not TIED_E
    KINDS: gl.constexpr = 1 + (1 if ALIGN_F else 0) + (1 if ALIGN_E else 0)
    UPPER: gl.constexpr = 0
    LOWER: gl.constexpr = 1
    q = gl.allocate_shared_memory(dtype, [KINDS, BM, P], shared)
    keys, values, places = make_ring(dtype, BN, P, SLOTS)
    full, empty, ready, drained = make_barriers(SLOTS)
    gl.warp_specialize(
        [
            (_attend, (
                COUNT, SAFE, START, O, LSE, LQ, PAST, W, F, C, E, scale, heads, batch, pieces,
                q, keys, values, places, full, empty, ready, drained,
                UPPER, H, G, P, BM, BN, FADING, EIDETIC, ALIGN_F, ALIGN_E, DOCUMENTS, KINDS, SLOTS,
            )),
            (_attend, (
                COUNT, SAFE, START, O, LSE, LQ, PAST, W, F, C, E, scale, heads, batch, pieces,
                q, keys, values, places, full, empty, ready, drained,
                LOWER, H, G, P, BM, BN, FADING, EIDETIC, ALIGN_F, ALIGN_E, DOCUMENTS, KINDS, SLOTS,
            )),
            (copy_ahead, (
                Q, QF, QE, K, V, KF, VF, KE, VE, INDEX, COUNT, SAFE, PLACES, START, LQ, PAST, W, F, C, E, heads,
                batch, pieces,
                q_b, q_t, qf_b, qf_t, qe_b, qe_t, k_b, k_t, v_b, v_t, kf_b, kf_t, vf_b, vf_t, ke_b, ke_t, ve_b, ve_t,
                q, keys, values, places, full, empty, ready, drained,
                G, P, BM, BN, FADING, EIDETIC, ALIGN_F, ALIGN_E, DOCUMENTS, KINDS, SLOTS,
            )),
        ],
        [4, 4],
        [224, 56],
    )  # fmt: skip
