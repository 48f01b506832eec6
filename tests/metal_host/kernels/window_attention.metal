    // Windowed causal attention. A threadgroup takes 32 queries, a SIMD-group 8 of them; keys come in tiles of 16.
    // Online softmax: m is the running maximum, l the running sum of a query, o the running output.
    constexpr int QUERIES = 32, KEYS = 16, GROUPS = 4;
    threadgroup float k_tile[KEYS][HEAD_DIM + 4];
    threadgroup float v_tile[KEYS][HEAD_DIM + 4];
    threadgroup float scores[GROUPS][8][KEYS + 4];
    threadgroup float diagonal[GROUPS][8][8];  // scales the rows of o, as a matrix product
    const uint group = simdgroup_index_in_threadgroup;
    const int lane = int(thread_index_in_simdgroup), thread_index = int(thread_index_in_threadgroup);
    const int length = int(q_shape[1]), window = int(limits[0]);
    const int first_query = int(threadgroup_position_in_grid.x) * QUERIES, head = int(threadgroup_position_in_grid.y);
    const int first_row = first_query + int(group) * 8;
    simdgroup_matrix<float, 8, 8> q_rows[HEAD_DIM / 8], o[HEAD_DIM / 8];
    for (int i = 0; i < HEAD_DIM / 8; ++i) {
        simdgroup_load(q_rows[i], q + (head * length + first_row) * HEAD_DIM + i * 8, HEAD_DIM);
        o[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    const int row = lane / 4, quad = lane & 3;  // in the softmax, four lanes share a query
    const int query = first_row + row;
    float m = -INFINITY, l = 0.0f;
    int first_key = first_query - window + 1;
    first_key = first_key < 0 ? 0 : first_key / KEYS * KEYS;
    for (int tile = first_key; tile < first_query + QUERIES; tile += KEYS) {
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the last tile has been read
        for (int i = thread_index; i < KEYS * HEAD_DIM; i += GROUPS * 32) {
            const int key = i / HEAD_DIM, column = i % HEAD_DIM;
            const bool inside = tile + key < length;
            k_tile[key][column] = inside ? k[(head * length + tile + key) * HEAD_DIM + column] : 0.0f;
            v_tile[key][column] = inside ? v[(head * length + tile + key) * HEAD_DIM + column] : 0.0f;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);  // this tile is there
        for (int j = 0; j < KEYS / 8; ++j) {
            simdgroup_matrix<float, 8, 8> s = make_filled_simdgroup_matrix<float, 8, 8>(0.0f), k_columns;
            for (int i = 0; i < HEAD_DIM / 8; ++i) {
                simdgroup_load(k_columns, &k_tile[j * 8][i * 8], HEAD_DIM + 4, ulong2(0, 0), true);
                simdgroup_multiply_accumulate(s, q_rows[i], k_columns, s);
            }
            simdgroup_store(s, &scores[group][0][j * 8], KEYS + 4);
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);  // the scores are there
        float score[KEYS / 4], new_m = m;
        for (int c = 0; c < KEYS / 4; ++c) {
            const int key = tile + quad + 4 * c;
            const bool visible = key <= query && key > query - window;
            score[c] = visible ? scores[group][row][quad + 4 * c] * scale : -INFINITY;
            new_m = metal::max(new_m, score[c]);
        }
        new_m = metal::max(new_m, simd_shuffle_xor(new_m, 1));
        new_m = metal::max(new_m, simd_shuffle_xor(new_m, 2));
        const float decay = new_m == -INFINITY ? 1.0f : metal::exp(m - new_m);
        float sum = 0.0f;
        for (int c = 0; c < KEYS / 4; ++c) {
            const float p = new_m == -INFINITY ? 0.0f : metal::exp(score[c] - new_m);
            sum += p;
            scores[group][row][quad + 4 * c] = p;
        }
        sum += simd_shuffle_xor(sum, 1);
        sum += simd_shuffle_xor(sum, 2);
        l = l * decay + sum;
        m = new_m;
        diagonal[group][row][quad] = quad == row ? decay : 0.0f;
        diagonal[group][row][quad + 4] = quad + 4 == row ? decay : 0.0f;
        simdgroup_barrier(mem_flags::mem_threadgroup);  // the probabilities and decays are there
        simdgroup_matrix<float, 8, 8> decays, p_rows, v_rows;
        simdgroup_load(decays, &diagonal[group][0][0], 8);
        for (int i = 0; i < HEAD_DIM / 8; ++i) {
            simdgroup_multiply(o[i], decays, o[i]);
            for (int j = 0; j < KEYS / 8; ++j) {
                simdgroup_load(p_rows, &scores[group][0][j * 8], KEYS + 4);
                simdgroup_load(v_rows, &v_tile[j * 8][i * 8], HEAD_DIM + 4);
                simdgroup_multiply_accumulate(o[i], p_rows, v_rows, o[i]);
            }
        }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);  // the last decays have been read
    diagonal[group][row][quad] = quad == row ? 1.0f / l : 0.0f;
    diagonal[group][row][quad + 4] = quad + 4 == row ? 1.0f / l : 0.0f;
    simdgroup_barrier(mem_flags::mem_threadgroup);  // 1 / l is there
    simdgroup_matrix<float, 8, 8> scales;
    simdgroup_load(scales, &diagonal[group][0][0], 8);
    for (int i = 0; i < HEAD_DIM / 8; ++i) {
        simdgroup_multiply(o[i], scales, o[i]);
        simdgroup_store(o[i], out + (head * length + first_row) * HEAD_DIM + i * 8, HEAD_DIM);
    }
