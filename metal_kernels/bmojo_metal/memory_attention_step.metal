    // One token against rings and pinned slots in one online softmax. A threadgroup takes HEADS queries of one
    // key/value head and one of `parts` equal shares of the keys that the row's position says are visible.
    constexpr int GROUPS = 8, W = (HEAD_DIM + 7) / 8;
    threadgroup float maxima[GROUPS][HEADS];
    threadgroup float sums[GROUPS][HEADS];
    threadgroup float mixed[GROUPS][HEADS][HEAD_DIM];
    const int group = int(simdgroup_index_in_threadgroup), lane = int(thread_index_in_simdgroup);
    const int share = int(threadgroup_position_in_grid.x), row = int(threadgroup_position_in_grid.z);
    const int head = int(threadgroup_position_in_grid.y) * HEADS;
    const int batch = int(q0_shape[0]), heads = int(q0_shape[1]), kv_heads = int(k0_shape[1]);
    const int kv = row * kv_heads + head / (heads / kv_heads), query = (row * heads + head) * HEAD_DIM;
    const int near1 = int(sizes[0]), near2 = int(sizes[1]), near3 = int(sizes[2]), parts = int(sizes[3]);
    const long now = long(position[row]);

    // How many keys of each memory are visible: those of rings are neighbours in position, oldest first.
    const int slots0 = int(k0_shape[2]), slots1 = int(k1_shape[2]);
    const int count0 = now + 1 < long(slots0) ? int(now + 1) : slots0;
    const long aged = now + 1 - long(near1);
    const int room1 = slots1 > near1 ? slots1 - near1 : 0;
    const int count1 = !RING1 || aged <= 0 ? 0 : aged < long(room1) ? int(aged) : room1;
    const int count2 = PINNED2 && now >= long(near2) ? int(k2_shape[2]) : 0;
    const int count3 = PINNED3 && now >= long(near3) ? int(k3_shape[2]) : 0;
    const int total = count0 + count1 + count2 + count3;
    int from = int(long(total) * share / parts), to = int(long(total) * (share + 1) / parts);

    bmojo_step_rows<HEADS, W> rows;
    for (int h = 0; h < HEADS; ++h) {
        rows.m[h] = -INFINITY;
        rows.l[h] = 0.0f;
        for (int j = 0; j < W; ++j) {
            rows.o[h][j] = 0.0f;
        }
    }
    {
        const ulong begin = ulong(kv) * slots0 * HEAD_DIM;
        bmojo_step_query<HEAD_DIM, HEADS, W>(rows, q0 + query, lane & 7, scale);
        bmojo_step_ring<HEAD_DIM, HEADS, W>(
            rows, k0 + begin, v0 + begin, now - count0 + 1, slots0, from, metal::min(to, count0), group, lane);
    }
    from = metal::max(from - count0, 0);
    to -= count0;
    if (RING1) {
        const ulong begin = ulong(kv) * slots1 * HEAD_DIM;
        bmojo_step_query<HEAD_DIM, HEADS, W>(rows, q1 + query, lane & 7, scale);
        bmojo_step_ring<HEAD_DIM, HEADS, W>(
            rows, k1 + begin, v1 + begin, aged - count1, slots1, from, metal::min(to, count1), group, lane);
    }
    from = metal::max(from - count1, 0);
    to -= count1;
    if (PINNED2) {
        const ulong begin = ulong(kv) * k2_shape[2] * HEAD_DIM;
        const int held_row = held2_shape[0] == 1 ? 0 : row * int(k2_shape[2]);
        bmojo_step_query<HEAD_DIM, HEADS, W>(rows, q2 + query, lane & 7, scale);
        bmojo_step_pinned<HEAD_DIM, HEADS, W>(
            rows, k2 + begin, v2 + begin, held2 + held_row, now - near2, from, metal::min(to, count2), group, lane);
    }
    from = metal::max(from - count2, 0);
    to -= count2;
    if (PINNED3) {
        const ulong begin = ulong(kv) * k3_shape[2] * HEAD_DIM;
        const int held_row = held3_shape[0] == 1 ? 0 : row * int(k3_shape[2]);
        bmojo_step_query<HEAD_DIM, HEADS, W>(rows, q3 + query, lane & 7, scale);
        bmojo_step_pinned<HEAD_DIM, HEADS, W>(
            rows, k3 + begin, v3 + begin, held3 + held_row, now - near3, from, metal::min(to, count3), group, lane);
    }

    // The four keys in flight become one, then the eight SIMD-groups do.
    for (int h = 0; h < HEADS; ++h) {
        float m = rows.m[h];
        m = metal::max(m, metal::simd_shuffle_xor(m, 8));
        m = metal::max(m, metal::simd_shuffle_xor(m, 16));
        const float factor = rows.m[h] == -INFINITY ? 0.0f : metal::exp(rows.m[h] - m);
        float l = rows.l[h] * factor;
        l += metal::simd_shuffle_xor(l, 8);
        l += metal::simd_shuffle_xor(l, 16);
        if (lane == 0) {
            maxima[group][h] = m;
            sums[group][h] = l;
        }
        for (int j = 0; j < W; ++j) {
            float o = rows.o[h][j] * factor;
            o += metal::simd_shuffle_xor(o, 8);
            o += metal::simd_shuffle_xor(o, 16);
            if (lane * W + j < HEAD_DIM) {
                mixed[group][h][lane * W + j] = o;
            }
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // every SIMD-group's share is there
    for (int i = int(thread_index_in_threadgroup); i < HEADS * HEAD_DIM; i += GROUPS * 32) {
        const int h = i / HEAD_DIM, d = i % HEAD_DIM;
        float m = -INFINITY, l = 0.0f, o = 0.0f;
        for (int g = 0; g < GROUPS; ++g) {
            m = metal::max(m, maxima[g][h]);
        }
        for (int g = 0; g < GROUPS; ++g) {
            const float factor = maxima[g][h] == -INFINITY ? 0.0f : metal::exp(maxima[g][h] - m);
            l += sums[g][h] * factor;
            o += mixed[g][h][d] * factor;
        }
        const int place = (share * batch + row) * heads + head + h;
        out[ulong(place) * HEAD_DIM + d] = O(parts == 1 ? o / l : o);
        if (d == 0) {
            stats[2 * place] = m;
            stats[2 * place + 1] = l;
        }
    }
