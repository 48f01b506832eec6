// Helpers of memory_attention: 8 queries a SIMD-group, KEYS keys a tile, 8x8 matrices held in registers.
// A lane owns elements (row, column) and (row, column + 1) of every matrix, as MLX's own kernels have it; four lanes,
// which differ in bits 0 and 3, share a row. What is past HEAD_DIM is zero.

constant constexpr int bmojo_hidden = -(1 << 30);  // age of a key that is not there

struct bmojo_lane {
    int index, row, column;  // of the SIMD-group's lanes; of its matrices
    int thread_index, group;  // in the threadgroup
};

// An online softmax of one row a lane: its maximum, its sum, and what it mixed so far.
template <int BLOCKS>
struct bmojo_rows {
    metal::simdgroup_matrix<float, 8, 8> q[BLOCKS];
    metal::simdgroup_matrix<float, 8, 8> o[BLOCKS];
    float m, l;
};

template <int HEAD_DIM, int BLOCKS, typename Q>
inline void bmojo_load_queries(
    thread bmojo_rows<BLOCKS>& rows, Q q, int query, int tokens, float scale, bmojo_lane at) {
    for (int i = 0; i < BLOCKS; ++i) {
        for (int e = 0; e < 2; ++e) {
            const int d = i * 8 + at.column + e;
            const bool inside = query < tokens && d < HEAD_DIM;
            rows.q[i].thread_elements()[e] = inside ? float(q[query * HEAD_DIM + d]) * scale : 0.0f;
        }
    }
}

// Lane i of every SIMD-group knows the memory's column that key i is, or -1.
template <int HEAD_DIM, int KEYS, int STRIDE, typename T, typename K>
inline void bmojo_load_tile(
    threadgroup T* k_tile, threadgroup T* v_tile, K k, K v, int column, bmojo_lane at) {
    constexpr int WIDTH = (HEAD_DIM + 7) / 8 * 8;
    for (int i = at.thread_index; i < KEYS * WIDTH; i += 128) {
        const int key = i / WIDTH, d = i % WIDTH;
        const int from = metal::simd_shuffle(column, ushort(key));
        const bool inside = from >= 0 && d < HEAD_DIM;
        k_tile[key * STRIDE + d] = inside ? T(k[from * HEAD_DIM + d]) : T(0.0f);
        v_tile[key * STRIDE + d] = inside ? T(v[from * HEAD_DIM + d]) : T(0.0f);
    }
}

// Lane i knows the age of key i as the threadgroup's first query has it; a row that does not `read` sees no key.
template <int KEYS, int STRIDE, int BLOCKS, typename T>
inline void bmojo_attend_tile(
    thread bmojo_rows<BLOCKS>& rows, const threadgroup T* k_tile, const threadgroup T* v_tile,
    int age, int near, int far, bool reads, bmojo_lane at) {
    metal::simdgroup_matrix<float, 8, 8> scores[KEYS / 8];
    float m = rows.m;
    for (int j = 0; j < KEYS / 8; ++j) {
        scores[j] = metal::make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        for (int i = 0; i < BLOCKS; ++i) {
            metal::simdgroup_matrix<float, 8, 8> k;
            k.thread_elements()[0] = float(k_tile[(j * 8 + at.column) * STRIDE + i * 8 + at.row]);
            k.thread_elements()[1] = float(k_tile[(j * 8 + at.column + 1) * STRIDE + i * 8 + at.row]);
            metal::simdgroup_multiply_accumulate(scores[j], rows.q[i], k, scores[j]);
        }
        for (int e = 0; e < 2; ++e) {
            const int distance = metal::simd_shuffle(age, ushort(j * 8 + at.column + e)) + at.group * 8 + at.row;
            const bool visible = reads && distance >= near && distance < far;
            const float score = visible ? scores[j].thread_elements()[e] : -INFINITY;
            scores[j].thread_elements()[e] = score;
            m = metal::max(m, score);
        }
    }
    m = metal::max(m, metal::simd_shuffle_xor(m, 1));
    m = metal::max(m, metal::simd_shuffle_xor(m, 8));
    const float kept = rows.m == -INFINITY ? 0.0f : metal::exp(rows.m - m);
    float sum = 0.0f;
    for (int j = 0; j < KEYS / 8; ++j) {
        for (int e = 0; e < 2; ++e) {
            const float score = scores[j].thread_elements()[e];
            const float weight = score == -INFINITY ? 0.0f : metal::exp(score - m);
            scores[j].thread_elements()[e] = weight;
            sum += weight;
        }
    }
    sum += metal::simd_shuffle_xor(sum, 1);
    sum += metal::simd_shuffle_xor(sum, 8);
    rows.l = rows.l * kept + sum;
    rows.m = m;
    for (int i = 0; i < BLOCKS; ++i) {
        rows.o[i].thread_elements()[0] *= kept;
        rows.o[i].thread_elements()[1] *= kept;
        for (int j = 0; j < KEYS / 8; ++j) {
            metal::simdgroup_matrix<float, 8, 8> v;
            v.thread_elements()[0] = float(v_tile[(j * 8 + at.row) * STRIDE + i * 8 + at.column]);
            v.thread_elements()[1] = float(v_tile[(j * 8 + at.row) * STRIDE + i * 8 + at.column + 1]);
            metal::simdgroup_multiply_accumulate(rows.o[i], scores[j], v, rows.o[i]);
        }
    }
}

// Queries first ... last of a call against a band: `columns` neighbours in position, the last `tokens` the call's own.
template <int HEAD_DIM, int KEYS, int STRIDE, int BLOCKS, typename T, typename K>
inline void bmojo_read_band(
    thread bmojo_rows<BLOCKS>& rows, threadgroup T* k_tile, threadgroup T* v_tile, K k, K v,
    int columns, int tokens, long start, int first, int last, int near, int far, bmojo_lane at) {
    const int carried = columns - tokens;
    const int written = start < long(carried) ? carried - int(start) : 0;  // the row's position 0
    const int oldest = metal::max(carried + first - far + 1, written);
    const int end = carried + last - near + 1;
    for (int tile = oldest; tile < end; tile += KEYS) {
        const int column = tile + at.index;
        const bool there = at.index < KEYS && column < end;
        const int age = there ? carried + first - column : bmojo_hidden;
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the last tile has been read
        bmojo_load_tile<HEAD_DIM, KEYS, STRIDE>(k_tile, v_tile, k, v, there ? column : -1, at);
        threadgroup_barrier(mem_flags::mem_threadgroup);  // this tile is there
        if (metal::simd_any(age + at.group * 8 + 7 >= near && age + at.group * 8 < far)) {
            bmojo_attend_tile<KEYS, STRIDE>(rows, k_tile, v_tile, age, near, far, true, at);
        }
    }
}

// The same against one list of `count` columns, or all columns in turn without LISTS.
template <int HEAD_DIM, int KEYS, int STRIDE, bool LISTS, int BLOCKS, typename T, typename K, typename H, typename I>
inline void bmojo_read_list(
    thread bmojo_rows<BLOCKS>& rows, threadgroup T* k_tile, threadgroup T* v_tile, K k, K v, H held, I index,
    int count, long now, int tokens, int near, bool reads, bmojo_lane at) {
    for (int tile = 0; tile < count; tile += KEYS) {
        const int entry = tile + at.index;
        int column = -1;
        if (at.index < KEYS && entry < count) {
            column = LISTS ? int(index[entry]) : entry;
        }
        const long position = column >= 0 ? long(held[column]) : -1;
        const int age = position >= 0 ? int(metal::min(now - position, long(1 << 29))) : bmojo_hidden;
        if (!metal::simd_any(age + tokens > near)) {
            continue;  // no query of the threadgroup sees any of them
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the last tile has been read
        bmojo_load_tile<HEAD_DIM, KEYS, STRIDE>(k_tile, v_tile, k, v, position >= 0 ? column : -1, at);
        threadgroup_barrier(mem_flags::mem_threadgroup);  // this tile is there
        if (metal::simd_any(reads) && metal::simd_any(age + at.group * 8 + 7 >= near)) {
            bmojo_attend_tile<KEYS, STRIDE>(rows, k_tile, v_tile, age, near, 1 << 30, reads, at);
        }
    }
}
