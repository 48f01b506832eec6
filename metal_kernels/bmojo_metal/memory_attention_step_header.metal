// Helpers of memory_attention_step: eight lanes share a key, a SIMD-group reads four keys at a time.
// Lane `part` of the eight has elements part * W ... part * W + W - 1 of a head; what is past HEAD_DIM is zero.

// An online softmax over the keys that came by so far, for HEADS queries of one key/value head.
template <int HEADS, int W>
struct bmojo_step_rows {
    float q[HEADS][W];
    float o[HEADS][W];
    float m[HEADS];
    float l[HEADS];
};

template <int HEAD_DIM, int HEADS, int W, typename Q>
inline void bmojo_step_query(thread bmojo_step_rows<HEADS, W>& rows, Q q, int part, float scale) {
    for (int h = 0; h < HEADS; ++h) {
        for (int j = 0; j < W; ++j) {
            const int d = part * W + j;
            rows.q[h][j] = d < HEAD_DIM ? float(q[h * HEAD_DIM + d]) * scale : 0.0f;
        }
    }
}

// All lanes must come here together; lanes whose key is not `seen` read nothing.
template <int HEAD_DIM, int HEADS, int W, typename K>
inline void bmojo_step_key(thread bmojo_step_rows<HEADS, W>& rows, K k, K v, int slot, bool seen, int part) {
    float key[W], value[W];
    for (int j = 0; j < W; ++j) {
        const int d = part * W + j;
        const bool inside = seen && d < HEAD_DIM;
        key[j] = inside ? float(k[slot * HEAD_DIM + d]) : 0.0f;
        value[j] = inside ? float(v[slot * HEAD_DIM + d]) : 0.0f;
    }
    for (int h = 0; h < HEADS; ++h) {
        float score = 0.0f;
        for (int j = 0; j < W; ++j) {
            score += rows.q[h][j] * key[j];
        }
        score += metal::simd_shuffle_xor(score, 1);
        score += metal::simd_shuffle_xor(score, 2);
        score += metal::simd_shuffle_xor(score, 4);
        if (seen) {
            const float m = metal::max(rows.m[h], score);
            const float kept = metal::exp(rows.m[h] - m), weight = metal::exp(score - m);
            rows.m[h] = m;
            rows.l[h] = rows.l[h] * kept + weight;
            for (int j = 0; j < W; ++j) {
                rows.o[h][j] = rows.o[h][j] * kept + weight * value[j];
            }
        }
    }
}

// Keys first ... first + count - 1 of a memory, of which this threadgroup has those numbered from ... to - 1.
// `ring` slots hold positions modulo their number.
template <int HEAD_DIM, int HEADS, int W, typename K>
inline void bmojo_step_ring(
    thread bmojo_step_rows<HEADS, W>& rows, K k, K v, long first, int ring, int from, int to, int group, int lane) {
    const int base = int(first % ring);
    for (int at = from + group * 4; at < to; at += 32) {
        const int mine = at + lane / 8;
        int slot = base + mine;
        slot = slot >= ring ? slot - ring : slot;
        bmojo_step_key<HEAD_DIM, HEADS, W>(rows, k, v, slot, mine < to, lane & 7);
    }
}

// Slots from ... to - 1 that hold a position of at most `newest`; negative = empty.
template <int HEAD_DIM, int HEADS, int W, typename K, typename H>
inline void bmojo_step_pinned(
    thread bmojo_step_rows<HEADS, W>& rows, K k, K v, H held, long newest, int from, int to, int group, int lane) {
    for (int at = from + group * 4; at < to; at += 32) {
        const int slot = at + lane / 8;
        const long position = slot < to ? long(held[slot]) : -1;
        bmojo_step_key<HEAD_DIM, HEADS, W>(rows, k, v, slot, position >= 0 && position <= newest, lane & 7);
    }
}
