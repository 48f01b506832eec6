    // Tokens of a call against bands and pinned columns in one online softmax. A threadgroup takes 32 queries of a
    // head, a SIMD-group 8 of them; keys come in tiles, and only those that one of the 32 may see.
    constexpr int BLOCKS = (HEAD_DIM + 7) / 8, STRIDE = BLOCKS * 8 + 4;
    constexpr int KEYS = BLOCKS <= 8 ? 32 : BLOCKS <= 16 ? 16 : 8;
    threadgroup T k_tile[KEYS * STRIDE];
    threadgroup T v_tile[KEYS * STRIDE];
    bmojo_lane at;
    at.index = int(thread_index_in_simdgroup);
    at.row = (at.index / 4 & 4) + (at.index / 2 & 3);
    at.column = (at.index / 4 & 2) * 2 + (at.index & 1) * 2;
    at.thread_index = int(thread_index_in_threadgroup);
    at.group = int(simdgroup_index_in_threadgroup);
    const int row = int(threadgroup_position_in_grid.z), head = int(threadgroup_position_in_grid.y);
    const int heads = int(q0_shape[1]), tokens = int(q0_shape[2]), kv_heads = int(k0_shape[1]);
    const int first = int(threadgroup_position_in_grid.x) * 32, last = metal::min(first + 32, tokens) - 1;
    const int query = first + at.group * 8 + at.row;
    const ulong queries = ulong(row * heads + head) * tokens * HEAD_DIM;
    const ulong kv = ulong(row * kv_heads + head / (heads / kv_heads)) * HEAD_DIM;
    const long start = long(position[row * tokens]);

    bmojo_rows<BLOCKS> rows;
    rows.m = -INFINITY;
    rows.l = 0.0f;
    for (int i = BLOCKS; i-- > 0;) {
        rows.o[i] = metal::make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    {
        const int columns = int(k0_shape[2]);
        bmojo_load_queries<HEAD_DIM>(rows, q0 + queries, query, tokens, scale, at);
        bmojo_read_band<HEAD_DIM, KEYS, STRIDE>(
            rows, k_tile, v_tile, k0 + kv * columns, v0 + kv * columns, columns, tokens, start, first, last,
            int(sizes[0]), int(sizes[1]), at);
    }
    if (BAND1) {
        const int columns = int(k1_shape[2]);
        bmojo_load_queries<HEAD_DIM>(rows, q1 + queries, query, tokens, scale, at);
        bmojo_read_band<HEAD_DIM, KEYS, STRIDE>(
            rows, k_tile, v_tile, k1 + kv * columns, v1 + kv * columns, columns, tokens, start, first, last,
            int(sizes[2]), int(sizes[3]), at);
    }
    if (PINNED) {
        const int columns = int(k2_shape[2]), near = int(sizes[4]);
        bmojo_load_queries<HEAD_DIM>(rows, q2 + queries, query, tokens, scale, at);
        if (LISTS) {
            const int chunks = int(lists_shape[1]), count = int(lists_shape[2]);
            const int mine = query < tokens ? int(chunk[row * tokens + query]) : -1;
            const int newest = int(chunk[row * tokens + last]);
            for (int c = int(chunk[row * tokens + first]); c <= newest; ++c) {
                bmojo_read_list<HEAD_DIM, KEYS, STRIDE, true>(
                    rows, k_tile, v_tile, k2 + kv * columns, v2 + kv * columns, held + row * columns,
                    lists + (row * chunks + c) * count, count, start + first, last - first + 1, near, mine == c, at);
            }
        } else {
            bmojo_read_list<HEAD_DIM, KEYS, STRIDE, false>(
                rows, k_tile, v_tile, k2 + kv * columns, v2 + kv * columns, held + row * columns, lists, columns,
                start + first, last - first + 1, near, true, at);
        }
    }
    const float factor = rows.l > 0.0f ? 1.0f / rows.l : 0.0f;
    for (int i = 0; i < BLOCKS; ++i) {
        for (int e = 0; e < 2; ++e) {
            const int d = i * 8 + at.column + e;
            if (query < tokens && d < HEAD_DIM) {
                const ulong place = ulong(row * tokens + query) * heads + head;
                out[place * HEAD_DIM + d] = T(rows.o[i].thread_elements()[e] * factor);
            }
        }
    }
