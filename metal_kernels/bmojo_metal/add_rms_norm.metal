    // h + x, rounded, and its RMSNorm. One threadgroup a row.
    threadgroup float squares[GROUPS];
    const int thread_index = int(thread_index_in_threadgroup), row = int(threadgroup_position_in_grid.y);
    const int channels = int(h_shape[1]), step = GROUPS * 32;
    const ulong begin = ulong(row) * channels;
    float square = 0.0f;
    for (int i = thread_index; i < channels; i += step) {
        const T value = T(float(h[begin + i]) + float(x[begin + i]));
        sum[begin + i] = value;
        square += float(value) * float(value);
    }
    square = bmojo_sum<32>(square);
    if (thread_index_in_simdgroup == 0) {
        squares[simdgroup_index_in_threadgroup] = square;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);  // every SIMD-group's squares are there
    float total = 0.0f;
    for (int g = 0; g < GROUPS; ++g) {
        total += squares[g];
    }
    const float factor = metal::rsqrt(total / float(channels) + eps);
    for (int i = thread_index; i < channels; i += step) {
        const T value = T(float(h[begin + i]) + float(x[begin + i]));
        normed[begin + i] = O(float(value) * factor * float(weight[i]));
    }
