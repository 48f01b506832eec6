    // Second pass over long prompts: passes states on from chunk to chunk. One thread a state.
    const int index = int(thread_position_in_grid.x), row = int(thread_position_in_grid.y);
    const int channels = int(A_log_shape[0]), channel = index / N;
    const float a = -metal::exp(float(A_log[index]));
    float s = state[int64_t(row) * channels * N + index];
    for (int chunk = 0; chunk < chunks; ++chunk) {
        starts[(int64_t(row) * chunks + chunk) * channels * N + index] = s;
        if (chunk < chunks - 1) {
            const int64_t at = (int64_t(row) * (chunks - 1) + chunk) * channels;
            s = metal::exp(sums[at + channel] * a) * s + ends[at * N + index];
        }
    }
