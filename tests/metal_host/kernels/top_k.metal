    // The K largest of each row, the earlier first on a tie: each SIMD-group finds its best, then the threadgroup does.
    constexpr uint GROUPS = 4, NONE = 0xffffffffu;
    threadgroup float best_value[GROUPS];
    threadgroup uint best_index[GROUPS];
    threadgroup uint taken[(N + 31) / 32];  // one bit a column
    const uint thread_index = thread_index_in_threadgroup, lane = thread_index_in_simdgroup;
    const uint group = simdgroup_index_in_threadgroup, row = threadgroup_position_in_grid.x;
    for (uint i = thread_index; i < uint(N + 31) / 32; i += GROUPS * 32) taken[i] = 0;
    threadgroup_barrier(mem_flags::mem_threadgroup);  // nothing is taken
    for (uint k = 0; k < K; ++k) {
        float value = -INFINITY;
        uint index = NONE;
        for (uint i = thread_index; i < N; i += GROUPS * 32) {
            const float candidate = float(x[row * N + i]);
            const bool is_free = !(taken[i >> 5] >> (i & 31) & 1u);
            if (is_free && (candidate > value || index == NONE)) {
                value = candidate;
                index = i;
            }
        }
        for (ushort distance = 16; distance > 0; distance >>= 1) {
            const float other = simd_shuffle_xor(value, distance);
            const uint other_index = simd_shuffle_xor(index, distance);
            const bool is_earlier = other == value && other_index < index;
            if (other_index != NONE && (index == NONE || other > value || is_earlier)) {
                value = other;
                index = other_index;
            }
        }
        if (lane == 0) {
            best_value[group] = value;
            best_index[group] = index;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);  // every SIMD-group's best is there
        if (thread_index == 0) {
            value = best_value[0];
            index = best_index[0];
            for (uint s = 1; s < GROUPS; ++s) {
                const bool is_earlier = best_value[s] == value && best_index[s] < index;
                if (best_index[s] != NONE && (index == NONE || best_value[s] > value || is_earlier)) {
                    value = best_value[s];
                    index = best_index[s];
                }
            }
            taken[index >> 5] |= 1u << (index & 31);
            values[row * K + k] = value;
            indices[row * K + k] = index;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);  // the winner is taken
    }
