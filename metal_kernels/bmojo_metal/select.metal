    // The columns of the e largest scores that a chunk may keep, ascending, then -1; ties go to the earlier column.
    // One threadgroup of GROUPS SIMD-groups a row and chunk. The e-th largest score is found bit by bit: as integers, the
    // bits of floats that are not negative order as the floats do. Then columns are counted off in order.
    threadgroup uint counts[2][GROUPS];  // one is written while the other may still be read
    const int thread_index = int(thread_index_in_threadgroup), lane = int(thread_index_in_simdgroup);
    const int group = int(simdgroup_index_in_threadgroup);
    const int chunk = int(threadgroup_position_in_grid.y), row = int(threadgroup_position_in_grid.z);
    const int n = int(scores_shape[1]), chunks = int(limits_shape[1]);
    const int64_t limit = limits[row * chunks + chunk], from = row * int64_t(n);

    int threshold = 0;
    uint above = 0;  // how many are larger than the threshold
    for (int bit = 30; bit >= -1; --bit) {
        const int floor = bit < 0 ? threshold : (threshold | 1 << bit) - 1;
        uint count = 0;
        for (int i = thread_index; i < n; i += GROUPS * 32) {
            count += bmojo_eidetic_key(scores[from + i], position[from + i], first, limit) > floor;
        }
        count = bmojo_sum<32>(count);
        if (lane == 0) counts[bit & 1][group] = count;
        threadgroup_barrier(metal::mem_flags::mem_threadgroup);  // every SIMD-group's count is there
        above = 0;
        for (int g = 0; g < GROUPS; ++g) above += counts[bit & 1][g];
        if (bit >= 0 && above >= uint(e)) threshold = floor + 1;
    }
    const uint ties = uint(e) - above;  // how many of those that equal the threshold are taken

    uint larger = 0, equal = 0;  // columns of either kind before this block
    int64_t at = (int64_t(row) * chunks + chunk) * e;
    for (int block = 0, turn = 0; block < n; block += GROUPS * 32, turn ^= 1) {
        const int i = block + thread_index;
        const int key = i < n ? bmojo_eidetic_key(scores[from + i], position[from + i], first, limit) : -1;
        const uint mine = key > threshold ? 0x10000u : key == threshold ? 1u : 0u;  // both counts in one word
        uint before = metal::simd_prefix_exclusive_sum(mine);
        if (lane == 31) counts[turn][group] = before + mine;
        threadgroup_barrier(metal::mem_flags::mem_threadgroup);  // every SIMD-group's counts are there
        uint all = 0;
        for (int g = 0; g < GROUPS; ++g) {
            if (g == group) before += all;
            all += counts[turn][g];
        }
        const uint rank = equal + (before & 0xffffu);
        if (key > threshold || (key == threshold && rank < ties)) {
            index[at + larger + (before >> 16) + metal::min(rank, ties)] = i;
        }
        larger += all >> 16;
        equal += all & 0xffffu;
    }
    for (int i = int(larger + metal::min(equal, ties)) + thread_index; i < e; i += GROUPS * 32) index[at + i] = -1;
